"""bits_loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import foveate
from foveate.testing import inputs
from foveate.testing.spec import BadInput, Bench, Call, Cases, Cost, OpSpec
from foveate.testing.specs.analog_bits.codec import bad, random_ids, table_lookup

_KINDS = ("x", "eps", "v", "sigmoid")


def _inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    ids = random_ids(case, "cpu", seed)
    dim, n_bits, kind = case.get("dim", -1), case["n_bits"], case.get("kind", "x")
    generator = torch.Generator().manual_seed(seed + 1)
    shape = foveate.bits_encode(ids, n_bits, dim=dim, backend="reference").shape
    pred = (2 * torch.randn(shape, generator=generator)).to(dtype).to(device).requires_grad_()
    pixels = torch.Size((*shape[:dim], *shape[dim:][1:])) if dim >= 0 else shape[:-1]
    kwargs: dict[str, Any] = {
        "kind": kind,
        "scale": case.get("scale", 0.1),
        "bit_order": case.get("bit_order", "lsb"),
        "dim": dim,
        "reduction": case.get("reduction", "mean"),
        "eps": case.get("eps", 0.0),
    }
    if case.get("weight"):
        sizes = pixels if case["weight"] == "pixel" else pixels[:1]
        kwargs["weight"] = torch.rand(sizes, generator=generator).to(device)
    if kind == "v":
        kwargs["gamma"] = case.get("gamma", 0.3)
    if kind in ("eps", "v"):
        if case.get("noise"):
            kwargs["noise"] = torch.randn(shape, generator=generator).to(device)
        else:
            kwargs["seed"], kwargs["offset"] = 5 * seed + 2, 1
    return Call((pred, ids.to(device), n_bits), kwargs)


def _draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    axes, maps = integers(1, 3), integers(0, 2)
    return {
        "pixels": tuple(integers(0, 7) for _ in range(axes)),
        "n_bits": tuple(integers(1, 40) for _ in range(maps)) if maps else integers(1, 63),
        "dim": (-1, 1)[integers(0, 1)],
        "kind": _KINDS[integers(0, 3)],
        "reduction": ("mean", "sum", "none")[integers(0, 2)],
        "weight": (None, "pixel", "sample")[integers(0, 2)],
        "noise": bool(integers(0, 1)),
        "bit_order": ("lsb", "msb")[integers(0, 1)],
    }


def _chain(
    pred: torch.Tensor,
    x: torch.Tensor,
    n_bits: tuple[int, ...],
    *,
    scale: float,
    weight: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """The published chain: int64 bits, a float target, a squared difference, weight, mean."""
    shifts = torch.arange(n_bits[0], device=x.device)
    target = (((x.long().unsqueeze(-1) >> shifts) % 2).flatten(-2).float() * 2 - 1) * scale
    return (weight * F.mse_loss(pred, target, reduction="none").mean(-1)).mean()


def _target_given(
    pred: torch.Tensor,
    x: torch.Tensor,
    n_bits: tuple[int, ...],
    *,
    scale: float,
    weight: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """The strongest plain form: a table of code words, a weighted square, a mean."""
    return (weight.unsqueeze(-1) * (pred - table_lookup(x, n_bits, scale)).square()).mean()


def _maps(batch: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        ids = inputs.panoptic_maps(batch, 512)
        generator = torch.Generator().manual_seed(0)
        pred = foveate.bits_encode(ids, (8, 8), scale=0.1, backend="reference")
        pred += 0.05 * torch.randn(pred.shape, generator=generator)
        weight = torch.rand(ids.shape[:-1], generator=generator)
        return Call(
            (pred.to(device).requires_grad_(), ids.to(device), (8, 8)),
            {"scale": 0.1, "weight": weight.to(device)},
        )

    return make


def _cost(call: Call) -> Cost:
    pred, ids = call.args[0], call.args[1]
    passes = 2 if pred.requires_grad else 1
    weight = call.kwargs.get("weight")
    extra = 0 if weight is None else weight.numel() * weight.element_size()
    moved = passes * pred.numel() * pred.element_size() + ids.numel() * ids.element_size()
    return Cost(6 * pred.numel(), moved + extra)


_X = torch.tensor([[1, 2], [3, 0]])
_PRED = torch.zeros(2, 2, 2)


def _b(id: str, error: type[Exception], match: str, **kwargs: Any) -> BadInput:
    return bad(id, error, match, kwargs.pop("pred", _PRED), kwargs.pop("x", _X), 2, **kwargs)


SPECS = (
    OpSpec(
        name="bits_loss",
        api=foveate.bits_loss,
        backends=("triton", "cpu"),
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        make_inputs=_inputs,
        cases=Cases(
            {
                "one": {"pixels": (1,), "n_bits": 1},
                "panoptic, weighted": {"pixels": (2, 5, 4), "n_bits": (8, 8), "weight": "pixel"},
                "small": {"pixels": (2, 3), "n_bits": 4, "weight": "sample", "kind": "sigmoid"},
                "small v": {"pixels": (2, 3), "n_bits": 5, "kind": "v", "noise": True, "dim": 1},
                "rgb, channels first": {
                    "pixels": (2, 19, 17),
                    "n_bits": (8, 8, 8),
                    "dim": 1,
                    "bit_order": "msb",
                    "weight": "pixel",
                    "reduction": "none",
                },
                "eps, seed": {"pixels": (2, 31), "n_bits": 8, "kind": "eps", "reduction": "sum"},
                "eps, seed, first": {"pixels": (2, 31), "n_bits": 8, "kind": "eps", "dim": 1},
                "v, seed, none": {
                    "pixels": (3, 43),
                    "n_bits": 7,
                    "kind": "v",
                    "reduction": "none",
                    "weight": "pixel",
                },
                "sigmoid": {"pixels": (3, 43), "n_bits": 33, "kind": "sigmoid"},
                "sigmoid, eps": {"pixels": (3, 43), "n_bits": 8, "kind": "sigmoid", "eps": 1e-8},
                "tile + 1": {"pixels": (257,), "n_bits": 6},
                "80 channels": {"pixels": (33,), "n_bits": (40, 40), "weight": "pixel"},
            },
            _draw,
        ),
        bench=(
            Bench(
                "Pix2Seq-D maps, b=2",
                _maps(2),
                {"original chain": _chain, "target given": _target_given},
                quick=True,
            ),
            Bench(
                "Pix2Seq-D maps, b=16",
                _maps(16),
                {"original chain": _chain, "target given": _target_given},
            ),
        ),
        cost=_cost,
        bad_inputs=(
            _b("kind", ValueError, "kind must be one of 'x', 'eps', 'v', 'sigmoid'", kind="l1"),
            _b("reduction", ValueError, "reduction must be one of", reduction="avg"),
            _b("pred shape", ValueError, r"pred must have shape \(2, 2, 2\).*got \(2, 2, 3\)",
               pred=torch.zeros(2, 2, 3)),
            _b("pred dtype", TypeError, "pred must be float16", pred=torch.zeros(2, 2, 2).int()),
            _b("eps without noise", ValueError, "needs noise= or seed=", kind="eps"),
            _b("v without noise", ValueError, "needs noise= or seed=", kind="v", gamma=0.5),
            _b("v without gamma", ValueError, "needs gamma=", kind="v", seed=1),
            _b("noise and seed", ValueError, "exclude each other", kind="eps", seed=1, noise=_PRED),
            _b("noise shape", ValueError, "noise must have shape", kind="eps",
               noise=torch.zeros(2, 2)),
            _b("noise dtype", TypeError, "noise must be floating", kind="eps", noise=_PRED.int()),
            _b("weight shape", ValueError, r"weight must be \[\*pixel\] = \(2, 2\)",
               weight=torch.zeros(3)),
            _b("weight dtype", TypeError, "weight must be floating",
               weight=torch.zeros(2, dtype=torch.int64)),
            _b("weight grad", ValueError, "weight gets no gradient",
               weight=torch.zeros(2, requires_grad=True)),
            _b("eps negative", ValueError, "eps must be at least 0", kind="sigmoid", eps=-1.0),
            _b("id", ValueError, r"ids must be in \[0, 4\), got min 0, max 9", x=_X * 3),
            _b("float ids", TypeError, "expected integer ids", x=_X.float()),
        ),
    ),
)  # fmt: skip
