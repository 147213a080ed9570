"""analog_bits on CPU tensors: csrc/cpu/analog_bits.cpp."""

from __future__ import annotations

import array
import functools

import torch

from foveate._native import DTYPE_CODES, native
from foveate.ops.analog_bits.layout import require_in_range, split_at

_cpu = native("_cpu")
_SERIAL = 1 << 15  # elements below which a second thread costs more than it brings


@functools.cache
def int32_table(values: tuple[int, ...]) -> array.array[int]:
    """A C int array of `values`, kept alive by the cache; `buffer_info()[0]` is its address."""
    return array.array("i", values)


@functools.cache
def _int64(values: tuple[int, ...]) -> array.array[int]:
    return array.array("q", values)


def threads_for(elements: int) -> int:
    """Threads for a kernel over `elements` values."""
    return 1 if elements < _SERIAL else torch.get_num_threads()


def _rows(tensor: torch.Tensor, outer: int, channels: int, inner: int) -> torch.Tensor | None:
    """`tensor` as [outer, channels, inner] in the strides the kernels take, or None."""
    try:
        rows = tensor.view(outer, channels, inner)
    except RuntimeError:  # its axes do not collapse
        return None
    return rows if rows.stride(1 if inner == 1 else 2) == 1 else None


def bits_encode(
    x: torch.Tensor,
    n_bits: list[int],
    high: float,
    low: float,
    msb: bool,
    dim: int,
    dtype: torch.dtype,
    check: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    outer, inner = split_at(x.shape, dim)
    channels = sum(n_bits)
    if x.is_contiguous():
        ids = x
        id_strides: tuple[int, ...] = (len(n_bits) * inner, inner, 1)
    else:
        ids = x.reshape(outer, len(n_bits), inner)
        id_strides = ids.stride()
    if out is None:
        out = x.new_empty((*x.shape[:dim], channels, *x.shape[dim + 1 :]), dtype=dtype)
        target, row_stride, channel_stride = out, channels * inner, inner
    else:
        rows = _rows(out, outer, channels, inner)
        target = out.new_empty(outer, channels, inner) if rows is None else rows
        row_stride, channel_stride, _ = target.stride()
    excess = _cpu.bits_encode(
        ids.data_ptr(),
        DTYPE_CODES[ids.dtype],
        *id_strides,
        int32_table(tuple(n_bits)).buffer_info()[0],
        len(n_bits),
        outer,
        inner,
        msb,
        high,
        low,
        DTYPE_CODES[dtype],
        row_stride,
        channel_stride,
        threads_for(outer * channels * inner),
        target.data_ptr(),
    )
    if check and excess:
        require_in_range(x, n_bits, dim)
    if target.data_ptr() != out.data_ptr():
        out.copy_(target.view(out.shape))
    return out


def bits_decode(
    bits: torch.Tensor,
    n_bits: list[int],
    max_value: list[int],
    msb: bool,
    dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    outer, inner = split_at(bits.shape, dim)
    channels = sum(n_bits)
    if bits.is_contiguous():
        rows, row_stride, channel_stride = bits, channels * inner, inner
    else:
        strided = _rows(bits, outer, channels, inner)
        rows = bits.contiguous().view(outer, channels, inner) if strided is None else strided
        row_stride, channel_stride, _ = rows.stride()
    out = bits.new_empty((*bits.shape[:dim], len(n_bits), *bits.shape[dim + 1 :]), dtype=dtype)
    _cpu.bits_decode(
        rows.data_ptr(),
        DTYPE_CODES[rows.dtype],
        row_stride,
        channel_stride,
        int32_table(tuple(n_bits)).buffer_info()[0],
        _int64(tuple(max_value)).buffer_info()[0],
        len(n_bits),
        outer,
        inner,
        msb,
        DTYPE_CODES[dtype],
        threads_for(rows.numel()),
        out.data_ptr(),
    )
    return out
