"""bits_noise and bits_q_sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import foveate
from foveate.testing import inputs
from foveate.testing.check import on_part
from foveate.testing.spec import BadInput, Bench, Call, Cases, Cost, OpSpec
from foveate.testing.specs.analog_bits.codec import bad, exact, random_ids, table_lookup

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _noise_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    return Call(
        (case["shape"], case.get("seed", 7919 * seed + 1)),
        {
            "offset": case.get("offset", 0),
            "dim": case.get("dim", -1),
            "dtype": dtype,
            "device": device,
        },
    )


def _draw_noise(integers: Callable[[int, int], int]) -> dict[str, Any]:
    axes = integers(1, 4)
    shape = tuple(integers(0, 7) for _ in range(axes))
    return {
        "shape": shape,
        "dim": integers(-axes, axes - 1),
        "seed": integers(0, 2**63 - 1),
        "offset": integers(0, 2**32 - 1),
    }


def _q_sample_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    ids = random_ids(case, device, seed)
    dim = case.get("dim", -1)
    generator = torch.Generator().manual_seed(seed)
    gamma: Any = case.get("gamma")
    if gamma is None:
        gamma = torch.rand(ids.shape[0], generator=generator, dtype=torch.float64).to(device)
    kwargs: dict[str, Any] = {
        "scale": case.get("scale", 0.1),
        "bit_order": case.get("bit_order", "lsb"),
        "dim": dim,
        "dtype": dtype,
        "return_noise": case.get("return_noise", False),
    }
    if case.get("noise"):
        shape = foveate.bits_encode(ids, case["n_bits"], dim=dim, backend="reference").shape
        kwargs["noise"] = torch.randn(shape, generator=generator).to(device)
    else:
        kwargs["seed"], kwargs["offset"] = 11 * seed + 3, 5
    return Call((ids, case["n_bits"], gamma), kwargs)


def _draw_q_sample(integers: Callable[[int, int], int]) -> dict[str, Any]:
    axes = integers(1, 3)
    maps = integers(0, 3)
    return {
        "pixels": tuple(integers(0, 7) for _ in range(axes)),
        "n_bits": tuple(integers(1, 40) for _ in range(maps)) if maps else integers(1, 63),
        "dim": (-1, 1)[integers(0, 1)],
        "bit_order": ("lsb", "msb")[integers(0, 1)],
        "noise": bool(integers(0, 1)),
        "return_noise": bool(integers(0, 1)),
    }


def _q_sample_chain(
    x: torch.Tensor, n_bits: tuple[int, ...], gamma: torch.Tensor, *, scale: float, **_: Any
) -> torch.Tensor:
    """The published chain: int64 shifts, float bits, two roots, a normal tensor, two products."""
    shifts = torch.arange(n_bits[0], device=x.device)
    bits = ((x.long().unsqueeze(-1) >> shifts) % 2).flatten(-2).float()
    signal = (bits * 2 - 1) * scale
    level = gamma.view(-1, 1, 1, 1).float()
    return level.sqrt() * signal + (1 - level).sqrt() * torch.randn_like(signal)


def _q_sample_table(
    x: torch.Tensor, n_bits: tuple[int, ...], gamma: torch.Tensor, *, scale: float, **_: Any
) -> torch.Tensor:
    """The strongest plain form: a table of code words, randn, one addcmul."""
    level = gamma.view(-1, 1, 1, 1).float()
    signal = table_lookup(x, n_bits, scale).mul_(level.sqrt())
    return signal.addcmul_(torch.randn_like(signal), (1 - level).sqrt())


def _maps_with_levels(batch: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        ids = inputs.panoptic_maps(batch, 512).to(device)
        gamma = torch.linspace(0.02, 0.98, batch, dtype=torch.float64).to(device)
        return Call((ids, (8, 8), gamma), {"scale": 0.1, "seed": 1})

    return make


def _first_rows(call: Call) -> Call:
    """The call on the first rows of the first map, whose noise is where the whole call's begins."""
    ids, n_bits, gamma = call.args
    return Call((ids[:1, :_PART_ROWS].contiguous(), n_bits, gamma[:1]), call.kwargs)


_PART_ROWS = 32  # the reference's noise takes 0.6 us a value on the development machine
_ON_FIRST_ROWS = on_part(_first_rows, lambda _, value: value[:1, :_PART_ROWS])


def _noise_cost(call: Call) -> Cost:
    shape, item = call.args[0], call.kwargs.get("dtype", torch.float32).itemsize
    values = 1
    for size in shape:
        values *= size
    return Cost(45 * values, values * item)


def _q_sample_cost(call: Call) -> Cost:
    ids, n_bits = call.args[0], call.args[1]
    widths = n_bits if isinstance(n_bits, tuple) else (n_bits,)
    values = ids.numel() // len(widths) * sum(widths)
    item = call.kwargs.get("dtype", torch.float32).itemsize
    return Cost(47 * values, ids.numel() * ids.element_size() + values * item)


_X = torch.tensor([[1, 2], [3, 0]])
_G = torch.tensor([0.5, 0.25])


def _q(id: str, error: type[Exception], match: str, gamma: Any = _G, **kwargs: Any) -> BadInput:
    return bad(id, error, match, _X, 2, gamma, **kwargs)


SPECS = (
    OpSpec(
        name="bits_noise",
        api=foveate.bits_noise,
        backends=("cpu", "triton"),
        dtypes=_FLOATS,
        make_inputs=_noise_inputs,
        cases=Cases(
            {
                "empty": {"shape": (0, 16)},
                "one": {"shape": (1,), "seed": 0},
                "channels last": {"shape": (3, 43, 16), "offset": 9},
                "channels first": {"shape": (2, 16, 7, 19), "dim": 1, "seed": 2**63 - 1},
                "five channels": {"shape": (65, 5), "offset": 2**32 - 1},
                "65 channels": {"shape": (3, 65, 9), "dim": 1},
                "tile + 1": {"shape": (257, 4)},
                "first axis": {"shape": (3, 40), "dim": 0},
            },
            _draw_noise,
        ),
        bench=(
            Bench(
                "4 x 512 x 512 x 16",
                lambda device: Call(((4, 512, 512, 16), 1), {"device": device}),
                {"torch.randn": lambda shape, _seed, device: torch.randn(shape, device=device)},
            ),
        ),
        cost=_noise_cost,
        bad_inputs=(
            bad("seed < 0", ValueError, "seed must be in 0", (3, 4), -1),
            bad("seed float", TypeError, "seed must be an int", (3, 4), 1.5),
            bad("offset", ValueError, "offset must be in 0", (3, 4), 1, offset=2**32),
            bad("seed tensor", ValueError, "one-element int64", (3, 4), torch.tensor([1, 2])),
            bad("dtype", TypeError, "dtype must be float32", (3, 4), 1, dtype=torch.int32),
            bad("dim", ValueError, r"dim must be in -2\.\.1", (3, 4), 1, dim=2),
            bad("scalar", ValueError, "axis of channels", (), 1),
            bad("out", ValueError, r"out must have shape \(3, 4\)", (3, 4), 1,
                out=torch.empty(3, 5)),
        ),
        check=exact,
    ),
    OpSpec(
        name="bits_q_sample",
        api=foveate.bits_q_sample,
        backends=("cpu", "triton"),
        dtypes=_FLOATS,
        make_inputs=_q_sample_inputs,
        cases=Cases(
            {
                "empty": {"pixels": (0, 3), "n_bits": 8},
                "one": {"pixels": (1,), "n_bits": 1},
                "panoptic, channels last": {"pixels": (2, 13, 11), "n_bits": (8, 8)},
                "rgb, channels first": {
                    "pixels": (2, 9, 7),
                    "n_bits": (8, 8, 8),
                    "dim": 1,
                    "bit_order": "msb",
                    "return_noise": True,
                },
                "given noise": {"pixels": (3, 37), "n_bits": 5, "noise": True},
                "given noise, first": {"pixels": (3, 37), "n_bits": 3, "noise": True, "dim": 1},
                "all signal": {"pixels": (2, 30), "n_bits": 8, "gamma": 1.0},
                "all noise": {"pixels": (2, 30), "n_bits": 8, "gamma": 0.0},
                "tile + 1": {"pixels": (257,), "n_bits": 4},
                "80 channels": {"pixels": (33,), "n_bits": (40, 40), "bit_order": "msb"},
            },
            _draw_q_sample,
        ),
        bench=(
            Bench(
                "Pix2Seq-D maps, b=2",
                _maps_with_levels(2),
                {"original chain": _q_sample_chain, "table, randn, addcmul": _q_sample_table},
                quick=True,
                oracle=_ON_FIRST_ROWS,
            ),
            Bench(
                "Pix2Seq-D maps, b=16",
                _maps_with_levels(16),
                {"original chain": _q_sample_chain, "table, randn, addcmul": _q_sample_table},
                oracle=_ON_FIRST_ROWS,
            ),
        ),
        cost=_q_sample_cost,
        bad_inputs=(
            _q("gamma shape", ValueError, r"gamma must be a float or \[b\] = \(2,\)", _G[:1]),
            _q("gamma > 1", ValueError, r"gamma must be in \[0, 1\], got 1.5", 1.5),
            _q("gamma NaN", ValueError, r"gamma must be in \[0, 1\], got nan at sample 1",
               torch.tensor([0.5, float("nan")])),
            _q("gamma grad", ValueError, "gamma gets no gradient",
               torch.tensor([0.5, 0.5], requires_grad=True)),
            _q("gamma half", TypeError, "gamma must be a float or float32", _G.half()),
            _q("dim 0", ValueError, "dim=0", dim=0),
            _q("noise shape", ValueError, r"noise must have shape \(2, 2, 2\), got \(2, 2\)",
               noise=torch.zeros(2, 2)),
            _q("noise dtype", TypeError, "noise must be floating",
               noise=torch.zeros(2, 2, 2, dtype=torch.int64)),
            _q("two sources", ValueError, "exclude each other", noise=torch.zeros(2, 2, 2), seed=1),
            _q("seed and generator", ValueError, "exclude each other", seed=1,
               generator=torch.Generator()),
            _q("seed", ValueError, "seed must be in 0", seed=-1),
            _q("dtype", TypeError, "dtype must be float32", dtype=torch.int64),
            _q("out dtype", TypeError, "out must have dtype", out=torch.empty(2, 2, 2).double()),
            bad("id", ValueError, r"ids must be in \[0, 2\)", _X, 1, _G),
            bad("float ids", TypeError, "expected integer ids", _G, 1, 0.5),
        ),
    ),
)  # fmt: skip
