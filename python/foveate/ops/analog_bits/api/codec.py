"""Ids to analog bits and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import FLOATING, one_of, same_device
from foveate._dispatch import register, select
from foveate.ops.analog_bits.layout import (
    bit_widths,
    ids_with_map_axis,
    is_msb,
    normalize_dim,
)

_FAMILY = "analog_bits"
_CAPACITY = {torch.uint8: 8, torch.int16: 15, torch.int32: 31, torch.int64: 63}  # bits of an id


def bits_encode(
    x: Any,
    n_bits: int | Sequence[int],
    *,
    scale: float = 1.0,
    low: float | None = None,
    bit_order: str = "lsb",
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
    out: Any = None,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """The bits of integer ids as real numbers: `scale` where a bit is set, `low` where not.

    out[.., c, ..] = scale if (x_k >> j) & 1 else low, where channel c is bit j of map k, counted
    from the least significant with bit_order "lsb", from the most significant with "msb".
    Source: Chen, Zhang, Hinton, "Analog Bits" (ICLR 2023), Algorithm 1; Pix2Seq-D (ICCV 2023).

    Args:
        x: ids, bool (for n_bits=1), uint8, int8, int16, int32 or int64, any strides.
            n_bits an int: `[*pixel]`. n_bits K ints: K maps at axis `dim`. NumPy and CuPy arrays
            are taken and given back.
        n_bits: bits of an id, 1..63; a tuple gives the bits of each of K maps.
        scale: value of a set bit.
        low: value of a clear bit; None is -scale.
        bit_order: "lsb" or "msb", the bit that comes first.
        dim: axis of the N = sum(n_bits) channels in the result.
        dtype: dtype of the result: float32, float64, bfloat16 or float16.
        out: tensor of the result's shape and dtype to write to (may be a strided view).
        check: whether ids outside [0, 2^n_bits) are an error. None: on CPU yes (it is free), on
            CUDA no (it synchronises). Unchecked ids use their low bits.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        `[.., N, ..]` of `dtype`, contiguous; or `out`.

    Raises:
        TypeError: x holds no integers; `dtype` is not floating; n_bits is not an int.
        ValueError: an id outside its range, n_bits outside 1..63, a shape that does not fit.
        NotImplementedError: the named backend cannot run this.
    """
    (x, out), back = as_tensors(x=x, out=out)
    widths = bit_widths(n_bits)
    msb = is_msb(bit_order)
    ids, dim = ids_with_map_axis(x, widths, dim)
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    one_of("check", check, (None, True, False))
    if out is not None:
        expected = (*ids.shape[:dim], widths.channels, *ids.shape[dim + 1 :])
        if tuple(out.shape) != expected:
            raise ValueError(f"out must have shape {expected}, got {tuple(out.shape)}")
        if out.dtype != dtype:
            raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
        same_device(x=x, out=out)
    device = x.device.type
    name = select(_FAMILY, "bits_encode", backend, device)
    if check is None:
        check = device == "cpu"
    high = float(scale)
    args = (
        ids,
        widths.n_bits,
        high,
        -high if low is None else float(low),
        msb,
        dim,
        dtype,
        check,
        name,
    )
    if out is None:
        return back(_encode(*args))
    _encode_out(*args, out=out)
    return back(out)


def bits_decode(
    bits: Any,
    *,
    n_bits: int | Sequence[int] | None = None,
    max_value: int | Sequence[int] | None = None,
    bit_order: str = "lsb",
    dim: int = -1,
    dtype: torch.dtype = torch.int64,
    backend: str = "auto",
) -> Any:
    """The integer ids whose bits are set where a value is greater than 0.

    A bit is (value > 0), strictly: 0, -0 and NaN read as 0, whatever the scale of the bits.
    Source: Chen, Zhang, Hinton, "Analog Bits" (ICLR 2023), Algorithm 2.

    Args:
        bits: `[.., N, ..]` floating or bool, channels at axis `dim`, any strides; NumPy and CuPy
            arrays are taken and given back.
        n_bits: None or N: one integer per pixel. K ints of sum N: K maps.
        max_value: ids above it become it; an int, or one for each map.
        bit_order: "lsb" or "msb", the bit that comes first.
        dim: axis of the channels.
        dtype: uint8, int16, int32 or int64, wide enough for the bits.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        Ids of `dtype`, contiguous: `[*pixel]`, or with K maps at axis `dim` for a tuple.

    Raises:
        TypeError: bits are integers.
        ValueError: N differs from n_bits; `dtype` is too narrow.
        NotImplementedError: the named backend cannot run this.
    """
    (bits,), back = as_tensors(bits=bits)
    if bits.dtype not in (*FLOATING, torch.bool):
        raise TypeError(f"bits must be floating or bool, got {bits.dtype}")
    if bits.ndim == 0:
        raise ValueError("bits must have an axis of channels, got a scalar")
    msb = is_msb(bit_order)
    dim = normalize_dim(dim, bits.ndim)
    n_channels = bits.shape[dim]
    widths = bit_widths(n_channels if n_bits is None else n_bits)
    if widths.channels != n_channels:
        fits = [axis for axis, size in enumerate(bits.shape) if size == widths.channels]
        hint = f"; pass dim={fits[0]}" if fits else ""
        raise ValueError(
            f"bits must have sum(n_bits) = {widths.channels} channels at dim {dim}, "
            f"got {n_channels} in shape {tuple(bits.shape)}{hint}"
        )
    one_of("dtype", dtype, _CAPACITY)
    for width in widths.n_bits:
        if width > _CAPACITY[dtype]:
            raise ValueError(f"n_bits={width} needs a wider dtype than {dtype}")
    limits = [-1] * len(widths.n_bits)
    if max_value is not None:
        limits = (
            [int(value) for value in max_value]
            if isinstance(max_value, (tuple, list))
            else [int(max_value)] * len(limits)  # type: ignore[arg-type]
        )
        if len(limits) != len(widths.n_bits):
            raise ValueError(
                f"max_value must be an int or {len(widths.n_bits)} ints, got {len(limits)}"
            )
        if min(limits) < 0:
            raise ValueError(f"max_value must be at least 0, got {min(limits)}")
    name = select(_FAMILY, "bits_decode", backend, bits.device.type)
    ids = _decode(bits, widths.n_bits, limits, msb, dim, dtype, name)
    return back(ids.squeeze(dim) if widths.single else ids)


def _encode_fake(
    x: torch.Tensor,
    n_bits: list[int],
    high: float,
    low: float,
    msb: bool,
    dim: int,
    dtype: torch.dtype,
    check: bool,
    backend: str,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:dim], sum(n_bits), *x.shape[dim + 1 :]), dtype=dtype)


def _encode_out_fake(*args: Any, out: torch.Tensor) -> None:
    return None


def _decode_fake(
    bits: torch.Tensor,
    n_bits: list[int],
    max_value: list[int],
    msb: bool,
    dim: int,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    return bits.new_empty((*bits.shape[:dim], len(n_bits), *bits.shape[dim + 1 :]), dtype=dtype)


_ENCODE = (
    "(Tensor x, int[] n_bits, float high, float low, bool msb, int dim, ScalarType dtype, "
    "bool check, str backend"
)
_encode = register(_FAMILY, f"bits_encode{_ENCODE}) -> Tensor", _encode_fake)
_encode_out = register(
    _FAMILY, f"bits_encode_out{_ENCODE}, *, Tensor(a!) out) -> ()", _encode_out_fake
)
_decode = register(
    _FAMILY,
    "bits_decode(Tensor bits, int[] n_bits, int[] max_value, bool msb, int dim, ScalarType dtype, "
    "str backend) -> Tensor",
    _decode_fake,
)
