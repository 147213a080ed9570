"""analog_bits on CUDA tensors. Ids are [outer, K, inner], bits [outer, N, inner], any strides."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.ops.analog_bits.layout import require_in_range, split_at
from foveate.ops.analog_bits.triton.words import float64_of, float64_pattern

_PIXELS_LAST = 128  # pixels of a program, channels last: a tile of [pixels, channels of a map]
_PIXELS_FIRST = 1024  # pixels of a program, channels first: a row of pixels per channel


@triton.jit
def _encode_map(
    ids,  # [PIXELS]
    out,  # [PIXELS] addresses of the map's first channel
    stride,
    inside,
    high,
    low,
    N: tl.constexpr,
    MSB: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    if CHANNELS_LAST:
        j = tl.arange(0, triton.next_power_of_2(N))
        shift = tl.maximum(N - 1 - j, 0) if MSB else j  # padded lanes must shift by >= 0 too
        bit = (ids[:, None] >> shift[None, :]) & 1
        tl.store(
            out[:, None] + j[None, :] * stride,
            tl.where(bit != 0, high, low),
            mask=inside[:, None] & (j[None, :] < N),
        )
    else:
        for j in range(N):
            bit = (ids >> (N - 1 - j if MSB else j)) & 1
            tl.store(out + j * stride, tl.where(bit != 0, high, low), mask=inside)


@triton.jit
def _decode_map(
    bits,  # [PIXELS] addresses of the map's first channel
    stride,
    inside,
    N: tl.constexpr,
    MSB: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
):
    if CHANNELS_LAST:
        j = tl.arange(0, triton.next_power_of_2(N))
        shift = tl.maximum(N - 1 - j, 0) if MSB else j
        value = tl.load(
            bits[:, None] + j[None, :] * stride,
            mask=inside[:, None] & (j[None, :] < N),
            other=0,
        )
        ids = tl.sum((value > 0).to(tl.int64) << shift[None, :], 1)
    else:
        ids = tl.zeros([PIXELS], tl.int64)
        for j in range(N):
            value = tl.load(bits + j * stride, mask=inside, other=0)
            ids |= (value > 0).to(tl.int64) << (N - 1 - j if MSB else j)
    return ids


@triton.jit(do_not_specialize=["high_bits", "low_bits"])
def _bits_encode_kernel(
    x,  # ids [outer, K, inner]
    out,  # [outer, N, inner]
    n_pixels,  # outer * inner
    inner,
    x_outer_stride,
    x_map_stride,
    x_inner_stride,
    out_outer_stride,
    out_channel_stride,
    out_inner_stride,
    high_bits,  # float64 patterns: a float argument would be rounded to float32
    low_bits,
    N_BITS: tl.constexpr,  # K widths
    MSB: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    row = pixel // inner
    column = pixel % inner
    x += row * x_outer_stride + column * x_inner_stride
    out += row * out_outer_stride + column * out_inner_stride
    high = float64_of(high_bits)
    low = float64_of(low_bits)
    if out.dtype.element_ty != tl.float64:
        high = high.to(tl.float32)
        low = low.to(tl.float32)
    high = high.to(out.dtype.element_ty)
    low = low.to(out.dtype.element_ty)
    channel = 0
    for k in tl.static_range(len(N_BITS)):
        ids = tl.load(x + k * x_map_stride, mask=inside, other=0).to(tl.int64)
        _encode_map(
            ids,
            out + channel * out_channel_stride,
            out_channel_stride,
            inside,
            high,
            low,
            N_BITS[k],
            MSB,
            CHANNELS_LAST,
        )
        channel += N_BITS[k]


@triton.jit
def _bits_decode_kernel(
    bits,  # [outer, N, inner]
    out,  # ids [outer, K, inner], contiguous
    n_pixels,  # outer * inner
    inner,
    bits_outer_stride,
    bits_channel_stride,
    bits_inner_stride,
    N_BITS: tl.constexpr,  # K widths
    MAX_VALUE: tl.constexpr,  # K limits, -1 for none
    MSB: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PIXELS: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    row = pixel // inner
    column = pixel % inner
    bits += row * bits_outer_stride + column * bits_inner_stride
    out += row * (len(N_BITS) * inner) + column
    channel = 0
    for k in tl.static_range(len(N_BITS)):
        ids = _decode_map(
            bits + channel * bits_channel_stride,
            bits_channel_stride,
            inside,
            N_BITS[k],
            MSB,
            CHANNELS_LAST,
            PIXELS,
        )
        if MAX_VALUE[k] >= 0:
            ids = tl.minimum(ids, MAX_VALUE[k])
        tl.store(out + k * inner, ids.to(out.dtype.element_ty), mask=inside)
        channel += N_BITS[k]


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
    if check:
        require_in_range(x, n_bits, dim)
    outer, inner = split_at(x.shape, dim)
    channels = sum(n_bits)
    if out is None:
        out = x.new_empty((*x.shape[:dim], channels, *x.shape[dim + 1 :]), dtype=dtype)
    n_pixels = outer * inner
    if n_pixels == 0:
        return out
    ids = x.reshape(outer, len(n_bits), inner)
    try:
        rows = out.view(outer, channels, inner)
    except RuntimeError:  # its axes do not collapse
        rows = torch.empty_like(out, memory_format=torch.contiguous_format)
        rows = rows.view(outer, channels, inner)
    last = inner == 1
    pixels = _PIXELS_LAST if last else _PIXELS_FIRST
    _bits_encode_kernel[(triton.cdiv(n_pixels, pixels),)](
        ids.view(torch.uint8) if ids.dtype == torch.bool else ids,
        rows,
        n_pixels,
        inner,
        *ids.stride(),
        *rows.stride(),
        float64_pattern(high),
        float64_pattern(low),
        N_BITS=tuple(n_bits),
        MSB=msb,
        CHANNELS_LAST=last,
        PIXELS=pixels,
        enable_fp_fusion=False,
    )
    if rows.data_ptr() != out.data_ptr():
        out.copy_(rows.view(out.shape))
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
    out = bits.new_empty((*bits.shape[:dim], len(n_bits), *bits.shape[dim + 1 :]), dtype=dtype)
    n_pixels = outer * inner
    if n_pixels == 0:
        return out
    rows = bits.reshape(outer, sum(n_bits), inner)
    last = inner == 1
    pixels = _PIXELS_LAST if last else _PIXELS_FIRST
    _bits_decode_kernel[(triton.cdiv(n_pixels, pixels),)](
        rows.view(torch.uint8) if rows.dtype == torch.bool else rows,
        out,
        n_pixels,
        inner,
        *rows.stride(),
        N_BITS=tuple(n_bits),
        MAX_VALUE=tuple(max_value),
        MSB=msb,
        CHANNELS_LAST=last,
        PIXELS=pixels,
        enable_fp_fusion=False,
    )
    return out
