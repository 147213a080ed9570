"""bits_linear_softmax_cross_entropy and bits_linear_softmax_expectation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import foveate
from foveate.testing import inputs
from foveate.testing.spec import BadInput, Bench, Call, Cases, Cost, OpSpec
from foveate.testing.specs.analog_bits.codec import bad, random_ids

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _head(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> list[Any]:
    """h, proj and bias of a case."""
    n_bits, groups = case["n_bits"], case.get("groups")
    widths = n_bits if isinstance(n_bits, tuple) else (n_bits,)
    count = groups or len(widths)
    logits = count << (sum(widths) // count)
    dim, d = case.get("dim", -1), case.get("d", 6)
    pixels = case["pixels"]
    shape = (*pixels, d) if dim == -1 else (*pixels[:dim], d, *pixels[dim:])
    generator = torch.Generator().manual_seed(seed + 1)

    def normal(*size: int) -> torch.Tensor:
        value = torch.randn(size, generator=generator)
        return value.to(dtype).to(device).requires_grad_()

    return [normal(*shape), normal(logits, d), None if case.get("no_bias") else normal(logits)]


def _loss_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    ids = random_ids(case, device, seed)
    generator = torch.Generator().manual_seed(seed)
    kwargs: dict[str, Any] = {
        "groups": case.get("groups"),
        "bit_order": case.get("bit_order", "lsb"),
        "dim": case.get("dim", -1),
        "reduction": case.get("reduction", "mean"),
        "chunk": case.get("chunk"),
    }
    if case.get("weight"):
        sizes = case["pixels"] if case["weight"] == "pixel" else case["pixels"][:1]
        kwargs["weight"] = torch.rand(sizes, generator=generator).to(device)
    return Call((*_head(case, dtype, device, seed), ids, case["n_bits"]), kwargs)


def _expectation_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    n_bits = case["n_bits"]
    widths = n_bits if isinstance(n_bits, tuple) else (n_bits,)
    bits = sum(widths) // (case.get("groups") or len(widths))
    kwargs = {
        "scale": 0.1,
        "bit_order": case.get("bit_order", "lsb"),
        "dim": case.get("dim", -1),
        "chunk": case.get("chunk"),
    }
    return Call((*_head(case, dtype, device, seed), bits), kwargs)


# No weight: a planted 1e30 overflows the float16 logits' gradient of the reference alone.
def _draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    bits = integers(1, 5)
    return {
        "pixels": tuple(integers(0, 6) for _ in range(integers(1, 3))),
        "n_bits": (bits,) * integers(1, 3),
        "d": integers(4, 12),
        "dim": (-1, 1)[integers(0, 1)],
        "bit_order": ("lsb", "msb")[integers(0, 1)],
        "reduction": ("mean", "sum", "none")[integers(0, 2)],
        "chunk": (None, 1, 4)[integers(0, 2)],
        "no_bias": bool(integers(0, 1)),
    }


_CASES: dict[str, dict[str, Any]] = {
    "one": {"pixels": (1,), "n_bits": (1,)},
    "panoptic": {"pixels": (2, 3, 3), "n_bits": (5, 5), "weight": "pixel"},
    "chunks of 4": {"pixels": (2, 9), "n_bits": (4, 4), "chunk": 4, "no_bias": True},
    "channels first, part of a sample": {
        "pixels": (2, 5, 7),
        "n_bits": (4, 4),
        "dim": 1,
        "bit_order": "msb",
        "chunk": 8,
    },
    "channels first, two samples": {
        "pixels": (5, 7),
        "n_bits": (3, 3),
        "dim": 1,
        "chunk": 15,
        "weight": "sample",
        "reduction": "sum",
    },
    "2 groups of one map, none": {
        "pixels": (2, 9),
        "n_bits": (10,),
        "groups": 2,
        "reduction": "none",
    },
}


def _maps(size: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        ids = inputs.panoptic_maps(1, size)
        generator = torch.Generator().manual_seed(0)
        h = torch.randn((*ids.shape[:-1], 128), generator=generator)
        proj = torch.randn((512, 128), generator=generator) / math.sqrt(128)
        bias = torch.zeros(512)
        head = (value.to(device).requires_grad_() for value in (h, proj, bias))
        return Call((*head, ids.to(device), (8, 8)))

    return make


def _linear_then_loss(
    h: torch.Tensor, proj: torch.Tensor, bias: torch.Tensor, x: torch.Tensor,
    n_bits: tuple[int, ...], **_: Any,
) -> torch.Tensor:  # fmt: skip
    """The strongest plain form: F.linear, F.cross_entropy on class indices."""
    logits = F.linear(h, proj, bias)
    return F.cross_entropy(logits.view(-1, 1 << n_bits[0]), x.flatten().long())


def _cost(call: Call) -> Cost:
    h, proj = call.args[0], call.args[1]
    products = 3 if h.requires_grad else 1
    pixels = h.numel() // proj.shape[1]
    flops = 2 * products * pixels * proj.numel() + 20 * pixels * len(proj)
    return Cost(flops, (2 if h.requires_grad else 1) * h.numel() * h.element_size())


_X = torch.tensor([[1, 2], [3, 0]])
_H = torch.zeros(2, 2, 3)
_P = torch.zeros(4, 3)


def _b(id: str, error: type[Exception], match: str, **kwargs: Any) -> BadInput:
    values = [kwargs.pop(name, value) for name, value in (("h", _H), ("proj", _P), ("bias", None))]
    return bad(id, error, match, *values, kwargs.pop("x", _X), kwargs.pop("n_bits", 2), **kwargs)


SPECS = (
    OpSpec(
        name="bits_linear_softmax_cross_entropy",
        api=foveate.bits_linear_softmax_cross_entropy,
        backends=("cpu",),
        dtypes=_FLOATS,
        make_inputs=_loss_inputs,
        cases=Cases(_CASES, _draw),
        bench=(
            Bench(
                "128 -> 512 logits, 128 x 128",
                _maps(128),
                {"linear, F.cross_entropy": _linear_then_loss},
                quick=True,
            ),
        ),
        cost=_cost,
        bad_inputs=(
            _b("h dtype", TypeError, "h must be float16", h=_H.int()),
            _b("mixed", TypeError, "h is torch.float32, proj is torch.float64", proj=_P.double()),
            _b("proj", ValueError, r"proj must be .* = \[1 \* 2\*\*2 = 4, 3\], got \(5, 3\)",
               proj=torch.zeros(5, 3)),
            _b("proj d", ValueError, r"proj must be .*got \(4, 2\)", proj=torch.zeros(4, 2)),
            _b("bias", ValueError, r"bias must be \(4,\), got \(3,\)", bias=torch.zeros(3)),
            _b("pixels", ValueError, r"h must have the pixels \(2, 2\)", h=torch.zeros(2, 3, 3)),
            _b("chunk", ValueError, "chunk must be at least 1", chunk=0),
            _b("groups", ValueError, "groups=3 must divide N=2", groups=3),
            _b("wide group", ValueError, "at most 16 bits", n_bits=17),
            _b("reduction", ValueError, "reduction must be one of", reduction="avg"),
            _b("weight", ValueError, r"weight must be \[\*pixel\]", weight=torch.zeros(3)),
            _b("id", ValueError, r"ids must be in \[0, 4\), got min 0, max 9", x=_X * 3),
            _b("float ids", TypeError, "expected integer ids", x=_X.float()),
        ),
    ),
    OpSpec(
        name="bits_linear_softmax_expectation",
        api=foveate.bits_linear_softmax_expectation,
        backends=("cpu",),
        dtypes=_FLOATS,
        make_inputs=_expectation_inputs,
        cases=Cases(_CASES, _draw),
        bench=(),
        cost=_cost,
        bad_inputs=(
            bad("h dtype", TypeError, "h must be float16", _H.int(), _P, None, 2),
            bad("proj", ValueError, r"proj must be .*got \(5, 3\)", _H, torch.zeros(5, 3), None, 2),
            bad("bias", ValueError, r"bias must be \(4,\)", _H, _P, torch.zeros(3), 2),
            bad("bits", ValueError, r"n_bits must be in 1\.\.16", _H, _P, None, 17),
            bad("dim", ValueError, r"dim must be in -3\.\.2", _H, _P, None, 2, dim=3),
            bad("chunk", ValueError, "chunk must be at least 1", _H, _P, None, 2, chunk=0),
        ),
    ),
)  # fmt: skip
