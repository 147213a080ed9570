"""bits_encode and bits_decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import foveate
from foveate.testing import inputs
from foveate.testing.check import Verdict, evaluate
from foveate.testing.spec import BadInput, Bench, Call, Cases, Cost, OpSpec

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def exact(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
    """Encoding and decoding have one right answer: every element equals the reference's."""
    got = evaluate(spec.api, call, backend)["out"]
    want = evaluate(spec.api, call, "reference")["out"]
    wrong = "" if got.dtype == want.dtype and torch.equal(got, want) else "not equal"
    same_size = got.shape == want.shape and got.numel() > 0
    error = float((got.double() - want.double()).abs().max()) if same_size else 0.0
    return [Verdict("out", error, 0.0, wrong)]


def random_ids(case: dict[str, Any], device: str, seed: int) -> torch.Tensor:
    """Ids over the whole range of each map, with K maps at `dim` for a tuple of n_bits."""
    n_bits, dim = case["n_bits"], case.get("dim", -1)
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for n in n_bits if isinstance(n_bits, tuple) else (n_bits,):
        bits = torch.randint(0, 2, (*case["pixels"], n), generator=generator)
        ids: torch.Tensor = (bits << torch.arange(n)).sum(-1)
        maps.append(ids.to(case.get("id_dtype", torch.int64)))
    ids = torch.stack(maps, dim) if isinstance(n_bits, tuple) else maps[0]
    return ids.to(device)


def _encode_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    return Call(
        (random_ids(case, device, seed), case["n_bits"]),
        {
            "scale": case.get("scale", 0.1),
            "bit_order": case.get("bit_order", "lsb"),
            "dim": case.get("dim", -1),
            "dtype": dtype,
        },
    )


def _decode_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    n_bits, dim = case["n_bits"], case.get("dim", -1)
    widths = n_bits if isinstance(n_bits, tuple) else (n_bits,)
    generator = torch.Generator().manual_seed(seed)
    shape = list(case["pixels"])
    shape.insert(dim if dim >= 0 else len(shape) + 1 + dim, sum(widths))
    bits = torch.randn(shape, generator=generator).to(dtype)
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), float("-inf")]).to(dtype)
    where = torch.rand(shape, generator=generator) < 0.2
    chosen = special[torch.randint(0, 5, shape, generator=generator)]
    return Call(
        (torch.where(where, chosen, bits).to(device),),
        {
            "n_bits": n_bits,
            "max_value": case.get("max_value"),
            "bit_order": case.get("bit_order", "lsb"),
            "dim": dim,
            "dtype": case.get("id_dtype", torch.int64),
        },
    )


def _draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    axes = integers(0, 3)
    pixels = tuple(integers(0, 9) for _ in range(axes))
    maps = integers(0, 3)
    n_bits = tuple(integers(1, 63) for _ in range(maps)) if maps else integers(1, 63)
    return {
        "pixels": pixels,
        "n_bits": n_bits,
        "dim": integers(-axes - 1, axes),
        "bit_order": ("lsb", "msb")[integers(0, 1)],
        "scale": (1.0, 0.1, 1e-3)[integers(0, 2)],
    }


_CASES = Cases(
    {
        "empty": {"pixels": (0, 3), "n_bits": 8},
        "one pixel": {"pixels": (), "n_bits": 3},
        "one bit": {"pixels": (5, 7), "n_bits": 1},
        "panoptic, channels last": {
            "pixels": (2, 13, 11),
            "n_bits": (8, 8),
            "id_dtype": torch.int32,
        },
        "rgb, channels first": {
            "pixels": (2, 16, 9),
            "n_bits": (7, 7, 7),
            "id_dtype": torch.uint8,
            "dim": 1,
            "bit_order": "msb",
        },
        "tile - 1": {"pixels": (127,), "n_bits": (8, 8)},
        "tile": {"pixels": (128,), "n_bits": (8, 8)},
        "tile + 1": {"pixels": (129,), "n_bits": 16, "bit_order": "msb"},
        "block + 1, channels first": {"pixels": (1025,), "n_bits": 5, "dim": 0},
        "odd widths": {"pixels": (37,), "n_bits": (5, 3, 11), "bit_order": "msb"},
        "seven flags": {"pixels": (3, 29), "n_bits": (1,) * 7, "dim": 1},
        "31 bits": {"pixels": (17,), "n_bits": 31, "id_dtype": torch.int32},
        "63 bits": {"pixels": (17,), "n_bits": 63, "bit_order": "msb"},
        "straddling words": {"pixels": (33,), "n_bits": (40, 40), "dim": 0},
    },
    _draw,
)
_DECODE_CASES = Cases(
    {**_CASES.listed, "limited": {"pixels": (41,), "n_bits": (8, 8), "max_value": [100, 7]}},
    _draw,
)


def _encode_chain(x: torch.Tensor, n_bits: tuple[int, ...], scale: float, **_: Any) -> torch.Tensor:
    """The published chain: int64 shifts, a remainder, a float copy, two more passes."""
    shifts = torch.arange(n_bits[0], device=x.device)
    bits = (x.long().unsqueeze(-1) >> shifts) % 2
    return (bits.flatten(-2).float() * 2 - 1) * scale


_TABLES: dict[tuple[int, float], torch.Tensor] = {}


def table_lookup(x: torch.Tensor, n_bits: tuple[int, ...], scale: float, **_: Any) -> torch.Tensor:
    """The strongest plain form: a lookup in the table of all code words of a map."""
    key = (n_bits[0], scale)
    if key not in _TABLES:
        words = torch.arange(1 << n_bits[0]).unsqueeze(-1)
        _TABLES[key] = _encode_chain(words, n_bits[:1], scale)
    return torch.nn.functional.embedding(x, _TABLES[key].to(x.device)).flatten(-2)


def _decode_chain(bits: torch.Tensor, n_bits: tuple[int, ...], **_: Any) -> torch.Tensor:
    """The published chain: compare, int64, weights, sum."""
    n = n_bits[0]
    maps: torch.Tensor = (bits > 0).unflatten(-1, (-1, n)).long()
    return (maps * (1 << torch.arange(n, device=bits.device))).sum(-1).int()


def _decode_packbits(bits: torch.Tensor, n_bits: tuple[int, ...], **_: Any) -> torch.Tensor:
    """The strongest plain form: numpy.packbits."""
    import numpy as np

    assert n_bits == (8, 8)
    packed = np.packbits((bits > 0).numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed).int()


def _label_maps(batch: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        ids = inputs.panoptic_maps(batch, 512).to(device)
        return Call((ids, (8, 8)), {"scale": 0.1})

    return make


def _label_bits(batch: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        ids = inputs.panoptic_maps(batch, 512)
        bits = foveate.bits_encode(ids, (8, 8), scale=0.1, backend="reference")
        noise = torch.randn(bits.shape, generator=torch.Generator().manual_seed(0))
        return Call(((bits + 0.05 * noise).to(device),), {"n_bits": (8, 8), "dtype": torch.int32})

    return make


def _encode_cost(call: Call) -> Cost:
    ids, n_bits = call.args[0], call.args[1]
    widths = n_bits if isinstance(n_bits, tuple) else (n_bits,)
    item = call.kwargs.get("dtype", torch.float32).itemsize
    pixels = ids.numel() // len(widths)
    return Cost(0, ids.numel() * ids.element_size() + pixels * sum(widths) * item)


def _decode_cost(call: Call) -> Cost:
    bits, n_bits = call.args[0], call.kwargs["n_bits"]
    widths = n_bits if isinstance(n_bits, tuple) else (n_bits,)
    pixels = bits.numel() // sum(widths)
    item = call.kwargs.get("dtype", torch.int64).itemsize
    return Cost(0, bits.numel() * bits.element_size() + pixels * len(widths) * item)


def bad(id: str, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> BadInput:
    return BadInput(id, lambda: Call(args, kwargs), error, match)


_ID = torch.tensor([1, 2, 3])
_BITS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

SPECS = (
    OpSpec(
        name="bits_encode",
        api=foveate.bits_encode,
        backends=("cpu", "triton"),
        dtypes=_FLOATS,
        make_inputs=_encode_inputs,
        cases=_CASES,
        bench=(
            Bench(
                "Pix2Seq-D maps, b=2",
                _label_maps(2),
                {"original chain": _encode_chain, "embedding table": table_lookup},
                quick=True,
            ),
            Bench(
                "Pix2Seq-D maps, b=16",
                _label_maps(16),
                {"original chain": _encode_chain, "embedding table": table_lookup},
            ),
        ),
        cost=_encode_cost,
        bad_inputs=(
            bad("float ids", TypeError, "expected integer ids, got torch.float32", _BITS, 8),
            bad("wide bool ids", TypeError, "bool ids need n_bits=1", _BITS > 0, 2),
            bad("id too large", ValueError, r"\[0, 2\), got min 1, max 3", _ID, 1),
            bad("negative id", ValueError, r"\[0, 256\), got min -3, max -1", -_ID, 8),
            bad("n_bits float", TypeError, "n_bits must be an int", _ID, 8.0),
            bad("n_bits bool", TypeError, "n_bits must be an int", _ID, True),
            bad("n_bits 0", ValueError, r"n_bits must be in 1\.\.63, got 0", _ID, 0),
            bad("n_bits 64", ValueError, r"n_bits must be in 1\.\.63, got 64", _ID, 64),
            bad("maps", ValueError, "n_bits has 2 maps, but x has 3", _ID, (8, 8)),
            bad(
                "bit_order",
                ValueError,
                "bit_order must be one of 'lsb', 'msb'",
                _ID,
                8,
                bit_order="big",
            ),
            bad("dim", ValueError, r"dim must be in -2\.\.1", _ID, 8, dim=2),
            bad("dtype", TypeError, "dtype must be float32", _ID, 8, dtype=torch.int32),
            bad(
                "out shape",
                ValueError,
                r"out must have shape \(3, 8\), got \(3, 7\)",
                _ID,
                8,
                out=torch.empty(3, 7),
            ),
            bad(
                "out dtype",
                TypeError,
                "out must have dtype torch.float32",
                _ID,
                8,
                out=torch.empty(3, 8, dtype=torch.float64),
            ),
            bad("backend", ValueError, "backend must be one of 'auto'", _ID, 8, backend="gpu"),
            bad("not an array", TypeError, "x must be a torch.Tensor", [1, 2], 8),
        ),
        check=exact,
    ),
    OpSpec(
        name="bits_decode",
        api=foveate.bits_decode,
        backends=("cpu", "triton"),
        dtypes=_FLOATS,
        make_inputs=_decode_inputs,
        cases=_DECODE_CASES,
        bench=(
            Bench(
                "Pix2Seq-D maps, b=2",
                _label_bits(2),
                {"original chain": _decode_chain, "numpy.packbits": _decode_packbits},
                quick=True,
            ),
            Bench("Pix2Seq-D maps, b=16", _label_bits(16), {"original chain": _decode_chain}),
        ),
        cost=_decode_cost,
        bad_inputs=(
            bad("integer bits", TypeError, "bits must be floating or bool", _ID),
            bad(
                "narrow dtype",
                ValueError,
                "n_bits=9 needs a wider dtype than torch.uint8",
                torch.zeros(2, 9),
                dtype=torch.uint8,
            ),
            bad("sum", ValueError, r"sum\(n_bits\) = 4 channels.*pass dim=0", _BITS, n_bits=(2, 2)),
            bad("dtype", ValueError, "dtype must be one of", _BITS, dtype=torch.float32),
            bad("max_value", ValueError, "max_value must be at least 0", _BITS, max_value=-2),
            bad(
                "max_values",
                ValueError,
                "max_value must be an int or 1 ints",
                _BITS,
                max_value=[1, 2],
            ),
            bad("scalar", ValueError, "axis of channels", torch.tensor(1.0)),
        ),
        check=exact,
    ),
)
