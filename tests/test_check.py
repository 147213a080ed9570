"""The error budget of the package: what it lets pass and what not."""

from __future__ import annotations

import functools

import pytest
import torch

from foveate.testing import Call, Cases, Cost, OpSpec, verdicts


def _total(x, *, backend):
    if backend == "reference":
        return functools.reduce(torch.add, x)  # one rounding after another
    return x.sum(0)  # pairwise


def _biased(x, *, backend):
    return _total(x, backend=backend) * (1 if backend == "reference" else 1 + 1e-9)


def _spec(api):
    return OpSpec(
        "total", api, ("cpu",), (torch.float64,), lambda *_: Call(()), Cases({}, lambda _: {}), (),
        lambda _: Cost(0, 0), (),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_float64_kernels_may_round_as_the_reference_does_and_no_more(seed):
    x = torch.randn(1_000, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (fair,) = verdicts(_spec(_total), Call((x,)), "cpu")
    assert fair.ok
    assert fair.error > 2 * torch.finfo(torch.float64).eps * float(
        x.sum().abs()
    )  # eps alone refuses it
    (biased,) = verdicts(_spec(_biased), Call((x,)), "cpu")
    assert biased.wrong == "over budget"
