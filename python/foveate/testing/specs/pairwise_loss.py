"""pairwise_loss: sigmoid and softmax losses over all pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import foveate
from foveate.testing.spec import Call, Cases, OpSpec
from foveate.testing.specs.pairwise_loss_bad_inputs import BAD_INFO_NCE, BAD_SIGMOID
from foveate.testing.specs.pairwise_loss_bench import INFO_NCE_BENCH, SIGMOID_BENCH, cost

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _features(
    case: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows: x_i and y_i share a direction."""
    n, m, d = case["n"], case.get("m", case["n"]), case["d"]
    x, y = torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)
    k = min(n, m)
    y[:k] += case.get("aligned", 1.0) * x[:k]
    norm = case.get("norm", 1.0)
    frozen = case.get("frozen", "")
    return (
        (norm * F.normalize(x)).to(device, dtype).requires_grad_("x" not in frozen),
        (norm * F.normalize(y)).to(device, dtype).requires_grad_("y" not in frozen),
    )


def _scalar(case: dict[str, Any], name: str, dtype: torch.dtype, device: str) -> Any:
    value = case.get(name)
    if value is None or case.get("numbers"):
        return value
    shape = case.get("scalar_shape", ())
    return torch.full(shape, value, dtype=_accumulator(dtype), device=device, requires_grad=True)


def _ids(n: int, classes: int, device: str, generator: torch.Generator) -> torch.Tensor:
    """Ids with some -1, which match nothing."""
    return torch.randint(-1, classes, (n,), generator=generator).to(device)


def _positives(
    case: dict[str, Any], dtype: torch.dtype, device: str, generator: torch.Generator
) -> Any:
    form, n, m = case.get("form", "diagonal"), case["n"], case.get("m", case["n"])
    if form == "index":
        low = 0 if case.get("every_row") else -1
        return torch.randint(low, m, (n,), generator=generator).to(device)
    if form == "ids":
        classes = max(1, m // 3)
        return _ids(n, classes, device, generator), _ids(m, classes, device, generator)
    if form in ("bool", "soft", "coo", "csr"):
        present = torch.rand(n, m, generator=generator) < 0.2
        if form == "bool":
            return present.to(device)
        # Eighths are exact in every dtype.
        eighths = torch.randint(0, 9, (n, m), generator=generator) / 8
        target = torch.where(present, eighths, torch.zeros(())).to(device, dtype)
        if form == "soft":
            return target
        if form == "coo":
            return target.to_sparse_coo()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return target.to_sparse_csr()
    return None if form == "none" else form


def _ignore(case: dict[str, Any], device: str, generator: torch.Generator) -> Any:
    if not case.get("ignore"):
        return None
    n, m = case["n"], case.get("m", case["n"])
    return _ids(n, max(1, m // 4), device, generator), _ids(m, max(1, m // 4), device, generator)


def _weights(n: int, device: str, generator: torch.Generator) -> torch.Tensor:
    """Quarters, some of them 0."""
    return (torch.randint(0, 9, (n,), generator=generator) / 4).to(device)


_SIGMOID_OPTIONS = (
    "positive_share",
    "pos_weight",
    "neg_weight",
    "focal_gamma",
    "reduction",
    "grad_mode",
    "return_stats",
)
_INFO_NCE_OPTIONS = ("symmetric", "reduction", "return_stats")


def _sigmoid_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    x, y = _features(case, dtype, device, generator)
    scalars = [_scalar({"scale": 10.0, **case}, k, dtype, device) for k in ("scale", "bias")]
    kwargs: dict[str, Any] = {k: case[k] for k in _SIGMOID_OPTIONS if k in case}
    kwargs["positives"] = _positives(case, dtype, device, generator)
    kwargs["ignore"] = _ignore(case, device, generator)
    if case.get("weights"):
        kwargs["row_weight"] = _weights(x.shape[0], device, generator)
        kwargs["col_weight"] = _weights(y.shape[0], device, generator)
    return Call((x, y, *scalars), kwargs)


def _info_nce_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    x, y = _features(case, dtype, device, generator)
    kwargs: dict[str, Any] = {k: case[k] for k in _INFO_NCE_OPTIONS if k in case}
    kwargs["logit_bias"] = _scalar(case, "bias", dtype, device)
    kwargs["positives"] = _positives(case, dtype, device, generator)
    kwargs["ignore"] = _ignore(case, device, generator)
    # Near 10 these inputs minimise the loss by the scale: what is left of its gradient there is the
    # rounding of the logits, which the error budget would compare with itself.
    return Call((x, y, _scalar({"scale": 3.0, **case}, "scale", dtype, device)), kwargs)


_SIGMOID_CASES: dict[str, dict[str, Any]] = {
    "one": {"n": 1, "d": 1, "bias": -1.0},
    "lane + 1, SigLIP's start": {"n": 9, "d": 7, "bias": -10.0},
    "three": {"n": 3, "d": 5, "scale": 1.0, "bias": 0.0, "scalar_shape": (1,)},
    "row tile - 1, none positive": {"n": 63, "m": 17, "d": 8, "form": "none", "bias": -2.0},
    "block + 1, index": {"n": 5, "m": 513, "d": 16, "form": "index", "bias": -5.0},
    "ids": {"n": 64, "m": 65, "d": 16, "form": "ids", "emulated": False},
    "shared ids": {"n": 33, "m": 47, "d": 6, "form": "ids", "positive_share": "both", "bias": -3.0},
    "row shares": {"n": 31, "m": 29, "d": 4, "form": "ids", "positive_share": "row"},
    "bool targets": {"n": 13, "m": 21, "d": 16, "form": "bool", "bias": -1.0},
    "soft targets, weights": {"n": 19, "m": 26, "d": 9, "form": "soft", "weights": True},
    "sparse targets": {
        "n": 37,
        "m": 129,
        "d": 5,
        "form": "coo",
        "bias": -4.0,
        "emulated": False,
    },
    "compressed targets, focal": {"n": 20, "m": 41, "d": 5, "form": "csr", "focal_gamma": 1.5},
    "ignored, weights": {"n": 33, "d": 8, "ignore": True, "weights": True, "bias": -2.0},
    "ignored ids": {"n": 25, "m": 38, "d": 8, "form": "ids", "ignore": True},
    "class weights": {"n": 21, "d": 8, "pos_weight": 3.0, "neg_weight": 0.25, "bias": -1.0},
    "focal 2": {"n": 18, "m": 35, "d": 8, "form": "ids", "focal_gamma": 2.0, "bias": -1.0},
    "focal 0.5": {"n": 17, "d": 8, "focal_gamma": 0.5, "bias": 0.5},
    "rows": {"n": 17, "m": 23, "d": 8, "form": "ids", "reduction": "none", "bias": -1.0},
    "backward, pair mean": {
        "n": 19,
        "d": 16,
        "bias": -3.0,
        "reduction": "pair_mean",
        "grad_mode": "backward",
    },
    "sum, negative scale": {"n": 12, "d": 16, "scale": -3.0, "reduction": "sum", "norm": 2.0},
    "frozen y": {"n": 24, "d": 16, "frozen": "y", "bias": -3.0},
    "statistics": {"n": 15, "m": 22, "d": 16, "form": "ids", "return_stats": True, "ignore": True},
}

_INFO_NCE_CASES: dict[str, dict[str, Any]] = {
    "one": {"n": 1, "d": 1},
    "lane + 1": {"n": 9, "d": 7, "scale": 4.0},
    "three, biased": {"n": 3, "d": 5, "scale": 1.0, "bias": -3.0, "scalar_shape": (1,)},
    "row tile + 1": {"n": 65, "d": 16, "scale": 30.0, "emulated": False},
    "hard negatives": {"n": 17, "m": 40, "d": 12, "symmetric": False},
    "index": {
        "n": 33,
        "m": 21,
        "d": 8,
        "form": "index",
        "every_row": True,
        "symmetric": False,
    },
    "ignored": {"n": 31, "d": 16, "ignore": True},
    "block + 1, ignored, negative scale": {
        "n": 7,
        "m": 513,
        "d": 16,
        "symmetric": False,
        "ignore": True,
        "scale": -2.0,
    },
    "rows": {"n": 19, "d": 8, "reduction": "none"},
    "sum, far apart": {"n": 24, "d": 16, "reduction": "sum", "scale": 100.0, "norm": 2.0},
    "frozen x": {"n": 24, "d": 16, "frozen": "x"},
    "statistics": {"n": 15, "d": 16, "return_stats": True, "ignore": True},
}


def _draw_sigmoid(integers: Callable[[int, int], int]) -> dict[str, Any]:
    form = ("diagonal", "none", "index", "ids", "bool")[integers(0, 4)]
    n = integers(1, 40)
    # Numbers, since a scale that is inf or NaN is outside the contract.
    return {
        "numbers": True,
        "n": n,
        "m": n if form == "diagonal" else integers(1, 40),
        "d": integers(1, 20),
        "form": form,
        "scale": (1.0, 10.0, 100.0, -3.0)[integers(0, 3)],
        "bias": (None, 0.0, -10.0)[integers(0, 2)],
        "ignore": bool(integers(0, 1)),
        "focal_gamma": (0.0, 0.0, 2.0, 0.7)[integers(0, 3)],
        "reduction": ("row_mean", "sum", "none")[integers(0, 2)],
        "frozen": ("", "", "x", "y")[integers(0, 3)],
    }


def _draw_info_nce(integers: Callable[[int, int], int]) -> dict[str, Any]:
    form = ("diagonal", "index")[integers(0, 1)]
    symmetric = form == "diagonal" and bool(integers(0, 1))
    n = integers(1, 40)
    return {
        "numbers": True,
        "n": n,
        "m": n if symmetric else integers(n if form == "diagonal" else 1, 60),
        "d": integers(1, 20),
        "form": form,
        "every_row": True,
        "symmetric": symmetric,
        "scale": (1.0, 10.0, 100.0, -3.0)[integers(0, 3)],
        "ignore": bool(integers(0, 1)),
        "reduction": ("mean", "sum", "none")[integers(0, 2)],
        "frozen": ("", "", "x", "y")[integers(0, 3)],
    }


SPECS = (
    OpSpec(
        name="sigmoid_loss",
        api=foveate.sigmoid_loss,
        backends=("cpu", "triton"),
        dtypes=_FLOATS,
        make_inputs=_sigmoid_inputs,
        cases=Cases(_SIGMOID_CASES, _draw_sigmoid),
        bench=SIGMOID_BENCH,
        cost=cost,
        bad_inputs=BAD_SIGMOID,
    ),
    OpSpec(
        name="info_nce_loss",
        api=foveate.info_nce_loss,
        backends=("cpu", "triton"),
        dtypes=_FLOATS,
        make_inputs=_info_nce_inputs,
        cases=Cases(_INFO_NCE_CASES, _draw_info_nce),
        bench=INFO_NCE_BENCH,
        cost=cost,
        bad_inputs=BAD_INFO_NCE,
    ),
)
