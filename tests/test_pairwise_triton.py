"""The Triton kernels of the pairwise losses where several tiles meet, in float64 too."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import foveate
from foveate.ops.pairwise_loss import engine
from foveate.ops.pairwise_loss.checks import sigmoid_pairs
from foveate.ops.pairwise_loss.triton_sigmoid import lift_for, slope_bound

pytestmark = pytest.mark.gpu
_N, _M, _D = 11, 13, 4


def _features(dtype, n=_N, m=_M):
    generator = torch.Generator().manual_seed(5)
    return [
        F.normalize(torch.randn(k, _D, generator=generator)).to("cuda", dtype).requires_grad_()
        for k in (n, m)
    ]


def _sigmoid_options():
    generator = torch.Generator().manual_seed(6)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator).cuda()

    ids = integers(-1, 4, _N), integers(-1, 4, _M)
    soft = integers(0, 9, _N, _M) / 8 * integers(0, 2, _N, _M)
    return {
        "index": {"positives": integers(-1, _M, _N)},
        "ids": {"positives": ids, "positive_share": "both"},
        "soft": {"positives": soft, "ignore": ids, "focal_gamma": 0.7},
        "sparse": {"positives": soft.to_sparse_coo(), "row_weight": integers(0, 3, _N) / 2.0},
    }


def _compare(loss, args, options, statistics):
    found = []
    for backend in ("triton", "reference"):
        value, stats = loss(*args, backend=backend, return_stats=True, **options)
        leaves = [t for t in args if isinstance(t, torch.Tensor)]
        upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
        gradients = torch.autograd.grad(value, leaves, upstream.to(value.device))
        found.append((value.detach(), *gradients, *stats[: 10 if statistics else 0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["index", "ids", "soft", "sparse"])
def test_ragged_tiles_give_the_references_sigmoid_loss_in_float64(monkeypatch, name):
    monkeypatch.setitem(engine.TILE, "triton", (8, 4))
    options = _sigmoid_options()[name]
    reduction = "none" if name == "ids" else "row_mean"
    s, b = (
        torch.tensor(v, dtype=torch.float64, device="cuda", requires_grad=True) for v in (7, -2)
    )
    args = *_features(torch.float64), s, b
    _compare(foveate.sigmoid_loss, args, {**options, "reduction": reduction}, True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_ragged_tiles_give_the_references_info_nce_loss_in_float64(monkeypatch, symmetric):
    monkeypatch.setitem(engine.TILE, "triton", (8, 4))
    monkeypatch.setitem(engine.RESIDENT, "triton", 0)
    x, y = _features(torch.float64, m=_N if symmetric else _M)
    ids = torch.arange(_N) % 4, torch.arange(len(y)) % 4
    options = {"symmetric": symmetric, "ignore": tuple(i.cuda() for i in ids)}
    s = torch.tensor(7.0, dtype=torch.float64, device="cuda", requires_grad=True)
    _compare(foveate.info_nce_loss, (x, y, s), options, True)


def test_a_far_negatives_gradient_survives_float16():
    x = torch.full((1, 1), 1.0, dtype=torch.float16, device="cuda", requires_grad=True)
    y = torch.full((1, 1), -18.0, dtype=torch.float16, device="cuda")
    foveate.sigmoid_loss(x, y, 1.0, positives=None, neg_weight=4096.0, backend="triton").backward()
    # sigma(-18) is 1.5e-8, the smallest number of float16 6e-8.
    want = -18 * 4096 / (1 + torch.tensor(18.0).exp())
    torch.testing.assert_close(x.grad.float().cpu()[0, 0], want, rtol=1e-3, atol=0)


def test_the_lift_leaves_room_for_the_largest_slope():
    x = torch.zeros(2, 1)
    pairs = sigmoid_pairs(None, None, "each", x, 2, 2)._replace(
        row_weight=torch.tensor([0.5, 3.0]), neg_weight=5.0, focal_gamma=2.0
    )
    bound = slope_bound(pairs, torch.ones(()))
    assert bound == 45
    lift = lift_for(torch.float16, bound)
    assert lift.log2() == lift.log2().round()
    assert 16384 <= lift * bound <= 65504
    assert lift_for(torch.float16, torch.zeros(())) == 2.0**60
    assert lift_for(torch.bfloat16, bound) == 1
