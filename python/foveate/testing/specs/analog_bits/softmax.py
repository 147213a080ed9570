"""bits_softmax_cross_entropy and bits_softmax_expectation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import foveate
from foveate.testing import inputs
from foveate.testing.spec import BadInput, Bench, Call, Cases, Cost, OpSpec
from foveate.testing.specs.analog_bits.codec import bad, random_ids

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _widths(case: dict[str, Any]) -> tuple[int, int]:
    """(groups, bits of a group)."""
    n_bits = case["n_bits"]
    widths = n_bits if isinstance(n_bits, tuple) else (n_bits,)
    groups = case.get("groups") or len(widths)
    return groups, sum(widths) // groups


def _logits(
    case: dict[str, Any], pixels: tuple[int, ...], dtype: torch.dtype, device: str, seed: int
) -> torch.Tensor:
    groups, bits = _widths(case)
    generator = torch.Generator().manual_seed(seed + 1)
    values: torch.Tensor = case.get("spread", 2.0) * torch.randn(
        (*pixels, groups, 1 << bits), generator=generator
    )
    if case.get("holes"):
        values[..., 1::3] = float("-inf")
    dim = case.get("dim", -1)
    if dim != -1:
        values = values.movedim((-2, -1), (dim, dim + 1))
        if case.get("axes", 1) == 1:
            values = values.flatten(dim, dim + 1)
    elif case.get("axes", 1) == 1:
        values = values.flatten(-2)
    return values.contiguous().to(dtype).to(device).requires_grad_()


def _loss_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    ids = random_ids(case, device, seed)
    pixels = case["pixels"]
    generator = torch.Generator().manual_seed(seed)
    kwargs: dict[str, Any] = {
        "groups": case.get("groups"),
        "bit_order": case.get("bit_order", "lsb"),
        "dim": case.get("dim", -1),
        "reduction": case.get("reduction", "mean"),
    }
    if case.get("weight"):
        sizes = pixels if case["weight"] == "pixel" else pixels[:1]
        kwargs["weight"] = torch.rand(sizes, generator=generator).to(device)
    return Call((_logits(case, pixels, dtype, device, seed), ids, case["n_bits"]), kwargs)


def _expectation_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    groups, bits = _widths(case)
    one = case.get("axes", 1) == 1
    return Call(
        (_logits(case, case["pixels"], dtype, device, seed), bits),
        {
            "groups": groups if one else None,
            "scale": 0.1,
            "bit_order": case.get("bit_order", "lsb"),
            "dim": case.get("dim", -1),
        },
    )


def _draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    maps = integers(1, 3)
    bits = integers(1, 6)
    return {
        "pixels": tuple(integers(0, 6) for _ in range(integers(1, 3))),
        "n_bits": (bits,) * maps,
        "groups": None if integers(0, 1) else maps,
        "dim": (-1, 1)[integers(0, 1)],
        "axes": integers(1, 2),
        "bit_order": ("lsb", "msb")[integers(0, 1)],
        "reduction": ("mean", "sum", "none")[integers(0, 2)],
        "weight": (None, "pixel", "sample")[integers(0, 2)],
    }


_CASES: dict[str, dict[str, Any]] = {
    "one": {"pixels": (1,), "n_bits": (1,)},
    "panoptic": {"pixels": (2, 3, 3), "n_bits": (5, 5), "weight": "pixel"},
    "panoptic, 256 classes": {"pixels": (2, 5), "n_bits": (8, 8), "axes": 2},
    "channels first": {"pixels": (2, 5, 7), "n_bits": (4, 4), "dim": 1, "bit_order": "msb"},
    "first, two axes": {"pixels": (2, 17), "n_bits": (3, 3, 3), "dim": 1, "axes": 2},
    "16 groups of 16 bits": {"pixels": (19,), "n_bits": (8, 8), "groups": 16},
    "2 groups of one map": {"pixels": (2, 9), "n_bits": (10,), "groups": 2, "reduction": "none"},
    "saturated": {"pixels": (16,), "n_bits": (4,), "spread": 1e4, "reduction": "sum"},
    "block + 1, none": {
        "pixels": (17,),
        "n_bits": (4, 4),
        "weight": "sample",
        "reduction": "none",
        "bit_order": "msb",
    },
    "straddling words": {"pixels": (3,), "n_bits": (9,) * 5},
}


def _one_hot(
    logits: torch.Tensor, x: torch.Tensor, n_bits: tuple[int, ...], **_: Any
) -> torch.Tensor:
    """The published chain: a one-hot tensor and a soft-target cross entropy."""
    m = n_bits[0]
    rows = logits.flatten(0, -2).view(-1, 1 << m)
    return F.cross_entropy(rows, F.one_hot(x.flatten().long(), 1 << m).float())


def _indices(
    logits: torch.Tensor, x: torch.Tensor, n_bits: tuple[int, ...], **_: Any
) -> torch.Tensor:
    """The strongest plain form: F.cross_entropy on class indices."""
    return F.cross_entropy(logits.reshape(-1, 1 << n_bits[0]), x.flatten().long())


def _softmax_table(
    logits: torch.Tensor, n_bits: int, *, groups: int, scale: float, **_: Any
) -> torch.Tensor:
    """The strongest plain form: softmax times the table of code words."""
    k = torch.arange(1 << n_bits, device=logits.device).unsqueeze(-1)
    table = ((k >> torch.arange(n_bits, device=logits.device)) & 1).to(logits.dtype)
    p = logits.unflatten(-1, (groups, 1 << n_bits)).softmax(-1)
    expected: torch.Tensor = scale * (2 * (p @ table) - 1)
    return expected.flatten(-2)


def _maps(size: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        ids = inputs.panoptic_maps(1, size)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn((*ids.shape[:-1], 512), generator=generator)
        return Call((logits.to(device).requires_grad_(), ids.to(device), (8, 8)))

    return make


def _map_logits(size: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        logits = _maps(size)(device).args[0].detach()
        return Call((logits, 8), {"groups": 2, "scale": 0.1})

    return make


def _loss_cost(call: Call) -> Cost:
    logits, ids = call.args[0], call.args[1]
    passes = 2 if logits.requires_grad else 1
    moved = passes * logits.numel() * logits.element_size() + ids.numel() * ids.element_size()
    return Cost(20 * logits.numel(), moved)


def _expectation_cost(call: Call) -> Cost:
    logits = call.args[0]
    passes = 3 if logits.requires_grad else 1
    return Cost(20 * logits.numel(), passes * logits.numel() * logits.element_size())


_X = torch.tensor([[1, 2], [3, 0]])
_L = torch.zeros(2, 2, 4)


def _b(id: str, error: type[Exception], match: str, **kwargs: Any) -> BadInput:
    logits, x = kwargs.pop("logits", _L), kwargs.pop("x", _X)
    return bad(id, error, match, logits, x, kwargs.pop("n_bits", 2), **kwargs)


SPECS = (
    OpSpec(
        name="bits_softmax_cross_entropy",
        api=foveate.bits_softmax_cross_entropy,
        backends=("triton", "cpu"),
        dtypes=_FLOATS,
        make_inputs=_loss_inputs,
        cases=Cases(_CASES, _draw),
        bench=(
            Bench(
                "512 logits, 128 x 128",
                _maps(128),
                {"one-hot": _one_hot, "F.cross_entropy": _indices},
                quick=True,
            ),
            Bench("512 logits, 256 x 256", _maps(256), {"F.cross_entropy": _indices}),
        ),
        cost=_loss_cost,
        bad_inputs=(
            _b("logits dtype", TypeError, "logits must be floating", logits=_L.int()),
            _b("logits shape", ValueError, r"groups \* 2\*\*bits = 1 \* 4 = 4", logits=_L[..., :3]),
            _b("groups", ValueError, "groups=3 must divide N=2", groups=3),
            _b("groups 0", ValueError, "groups must be at least 1", groups=0),
            _b("unequal", ValueError, "groups must be given for maps of unequal", n_bits=(1, 2)),
            _b("wide group", ValueError, "at most 16 bits", n_bits=17),
            _b("reduction", ValueError, "reduction must be one of", reduction="avg"),
            _b("weight", ValueError, r"weight must be \[\*pixel\]", weight=torch.zeros(3)),
            _b("weight dtype", TypeError, "weight must be floating", weight=torch.ones(2).int()),
            _b("weight grad", ValueError, "weight gets no gradient",
               weight=torch.zeros(2, requires_grad=True)),
            _b("id", ValueError, r"ids must be in \[0, 4\)", x=_X * 3),
            _b("float ids", TypeError, "expected integer ids", x=_X.float()),
        ),
    ),
    OpSpec(
        name="bits_softmax_expectation",
        api=foveate.bits_softmax_expectation,
        backends=("triton", "cpu"),
        dtypes=_FLOATS,
        make_inputs=_expectation_inputs,
        cases=Cases(
            {
                **_CASES,
                # At 1e4 every slope is a rounding error of the float64 reference: 1 - p is 0 there.
                "saturated": {"pixels": (16,), "n_bits": (4,), "spread": 10.0},
                "holes": {"pixels": (9,), "n_bits": (4,), "holes": True},
            },
            _draw,
        ),
        bench=(
            Bench(
                "512 logits, 128 x 128",
                _map_logits(128),
                {"softmax @ table": _softmax_table},
                quick=True,
            ),
        ),
        cost=_expectation_cost,
        bad_inputs=(
            bad("dtype", TypeError, "logits must be floating", _L.int(), 2, groups=1),
            bad("shape", ValueError, "groups", _L, 3, groups=1),
            bad("bits", ValueError, r"n_bits must be in 1\.\.16", _L, 17, groups=1),
            bad("bits type", TypeError, "n_bits must be an int", _L, 2.0, groups=1),
            bad("groups", ValueError, "groups must be at least 1", _L, 2, groups=0),
            bad("one axis", ValueError, "two axes|axes", torch.zeros(4), 2),
            bad("out shape", ValueError, "out must have shape", _L, 2, groups=1,
                out=torch.zeros(2, 2, 3)),
            bad("out dtype", TypeError, "out must have dtype", _L, 2, groups=1,
                out=torch.zeros(2, 2, 2).double()),
            bad("result dtype", TypeError, "dtype must be floating", _L, 2, groups=1,
                dtype=torch.int32),
        ),
    ),
)  # fmt: skip
