"""The bits expected under a softmax over the integers of a group, and their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.ops.analog_bits.layout import split_at
from foveate.ops.analog_bits.triton.groups import load_rows, place_rows, tile_of
from foveate.ops.analog_bits.triton.words import float64_of, float64_pattern


@triton.jit
def _expected(
    logits,  # [rows] addresses of the first value
    out,  # [rows] addresses of the first channel
    stride,
    out_stride,
    scale,
    inside,
    DOUBLE: tl.constexpr,
    MSB: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    # Each fold adds neighbours, whose numbers differ in the lowest bit left: its share is the
    # sum of the upper ones. A group costs two additions a value, not one for each bit.
    value = load_rows(logits, stride, inside, C, DOUBLE)
    value -= tl.max(value, 1)[:, None]
    p = tl.exp(value)
    total = tl.sum(p, 1)
    for j in tl.static_range(C):
        lower, upper = tl.split(tl.reshape(p, (p.shape[0], 1 << (C - 1 - j), 2)))
        bit = scale * (2.0 * (tl.sum(upper, 1) / total) - 1.0)
        channel = M - 1 - j if MSB else j
        tl.store(out + channel * out_stride, bit.to(out.dtype.element_ty), mask=inside)
        p = lower + upper


@triton.jit
def _chunk_sums(
    logits,
    stride,
    inside,
    channel,  # [2^J] positions of the bits
    DOUBLE: tl.constexpr,
    MSB: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    """Maximum, sum of exponentials and its part with each bit set, over all chunks of a group."""
    work = tl.float64 if DOUBLE else tl.float32
    k = tl.arange(0, 1 << C)
    top = tl.full([inside.shape[0]], float("-inf"), work)
    total = tl.zeros([inside.shape[0]], work)
    share = tl.zeros([inside.shape[0], channel.shape[0]], work)
    for chunk in range(1 << (M - C)):
        value = load_rows(logits + (chunk << C) * stride, stride, inside, C, DOUBLE)
        above = tl.maximum(top, tl.max(value, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp(value - base[:, None])
        decay = tl.exp(top - base)
        total = total * decay + tl.sum(p, 1)
        share *= decay[:, None]
        for j in range(M):
            bit = ((k + (chunk << C)) >> (M - 1 - j if MSB else j)) & 1
            part = tl.sum(tl.where(bit[None, :] != 0, p, 0.0), 1)
            share += tl.where(channel[None, :] == j, part[:, None], 0.0)
        top = above
    return top, total, share


@triton.jit(do_not_specialize=["scale_bits"])
def _bits_softmax_expectation_kernel(
    logits,  # [outer, G 2^m, inner] contiguous
    out,  # [outer, G m, inner] contiguous
    scale_bits,  # float64 pattern
    n_pixels,
    groups,
    inner,
    outer_stride,
    channel_stride,
    inner_stride,
    out_outer_stride,
    out_channel_stride,
    out_inner_stride,
    DOUBLE: tl.constexpr,
    MSB: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    J: tl.constexpr,  # 2^J >= M
    PIXELS: tl.constexpr,
    G_TILE: tl.constexpr,
):
    work = tl.float64 if DOUBLE else tl.float32
    scale = float64_of(scale_bits).to(work)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS * G_TILE) // G_TILE
    for tile in range(tl.cdiv(groups, G_TILE)):
        group, place = place_rows(pixel, tile, outer_stride, inner, inner_stride, G_TILE)
        inside = (pixel < n_pixels) & (group < groups)
        place += (group.to(tl.int64) << M) * channel_stride
        to = (pixel // inner) * out_outer_stride + (pixel % inner) * out_inner_stride
        to += group.to(tl.int64) * M * out_channel_stride
        if M == C:
            _expected(
                logits + place,
                out + to,
                channel_stride,
                out_channel_stride,
                scale,
                inside,
                DOUBLE,
                MSB,
                M,
                C,
            )
        else:
            j = tl.arange(0, 1 << J)
            _top, total, share = _chunk_sums(
                logits + place, channel_stride, inside, j, DOUBLE, MSB, M, C
            )
            bit = scale * (2.0 * (share / total[:, None]) - 1.0)
            tl.store(
                out + to[:, None] + j[None, :] * out_channel_stride,
                bit.to(out.dtype.element_ty),
                mask=inside[:, None] & (j < M)[None, :],
            )


@triton.jit
def _pulls(
    upstream,  # [rows] addresses of the first channel
    stride,
    high,  # number of the chunk
    inside,
    work: tl.constexpr,
    MSB: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
):
    """[rows, 2^C]: the sum of the incoming gradients of the bits that are set in each value."""
    pull = tl.zeros([inside.shape[0], 1], work)
    for j in tl.static_range(M - C):
        channel = j if MSB else M - 1 - j
        given = tl.load(upstream + channel * stride, mask=inside, other=0.0).to(work)
        pull += (given * ((high >> (M - C - 1 - j)) & 1))[:, None]
    for j in tl.static_range(C):
        channel = M - C + j if MSB else C - 1 - j
        given = tl.load(upstream + channel * stride, mask=inside, other=0.0).to(work)
        pull = tl.reshape(tl.join(pull, pull + given[:, None]), (inside.shape[0], 2 << j))
    return pull


@triton.jit(do_not_specialize=["scale_bits"])
def _bits_softmax_expectation_slope_kernel(
    logits,  # [outer, G 2^m, inner] contiguous
    upstream,  # [outer, G m, inner] contiguous
    slope,  # like logits
    scale_bits,  # float64 pattern
    n_pixels,
    groups,
    inner,
    outer_stride,
    channel_stride,
    inner_stride,
    up_outer_stride,
    up_channel_stride,
    up_inner_stride,
    DOUBLE: tl.constexpr,
    MSB: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    G_TILE: tl.constexpr,
):
    work: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    scale = 2.0 * float64_of(scale_bits).to(work)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS * G_TILE) // G_TILE
    k = tl.arange(0, 1 << C)
    for tile in range(tl.cdiv(groups, G_TILE)):
        group, place = place_rows(pixel, tile, outer_stride, inner, inner_stride, G_TILE)
        inside = (pixel < n_pixels) & (group < groups)
        place += (group.to(tl.int64) << M) * channel_stride
        at = (pixel // inner) * up_outer_stride + (pixel % inner) * up_inner_stride
        at += group.to(tl.int64) * M * up_channel_stride
        top = tl.full([PIXELS * G_TILE], float("-inf"), work)
        total = tl.zeros([PIXELS * G_TILE], work)
        mean = tl.zeros([PIXELS * G_TILE], work)
        for chunk in range(1 << (M - C)):
            shifted = place + (chunk << C) * channel_stride
            value = load_rows(logits + shifted, channel_stride, inside, C, DOUBLE)
            pull = _pulls(upstream + at, up_channel_stride, chunk, inside, work, MSB, M, C)
            above = tl.maximum(top, tl.max(value, 1))
            base = tl.where(above == float("-inf"), 0.0, above)
            p = tl.exp(value - base[:, None])
            decay = tl.exp(top - base)
            total = total * decay + tl.sum(p, 1)
            mean = mean * decay + tl.sum(p * pull, 1)
            top = above
        mean /= total
        for chunk in range(1 << (M - C)):
            shifted = place + (chunk << C) * channel_stride
            value = load_rows(logits + shifted, channel_stride, inside, C, DOUBLE)
            pull = _pulls(upstream + at, up_channel_stride, chunk, inside, work, MSB, M, C)
            p = tl.exp(value - top[:, None]) / total[:, None]
            steep = scale * p * (pull - mean[:, None])
            tl.store(
                slope + shifted[:, None] + k[None, :] * channel_stride,
                steep.to(slope.dtype.element_ty),
                mask=inside[:, None],
            )


def bits_softmax_expectation_fwd(
    logits: torch.Tensor,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    outer, inner = split_at(logits.shape, dim)
    shape = (*logits.shape[:dim], groups * bits, *logits.shape[dim + 1 :])
    out = logits.new_empty(shape, dtype=dtype)
    if out.numel() == 0:
        return out
    rows = logits.contiguous().view(outer, groups << bits, inner)
    tile = tile_of(groups, bits, inner == 1)
    _bits_softmax_expectation_kernel[(triton.cdiv(outer * inner, tile.pixels),)](
        rows,
        out,
        float64_pattern(scale),
        outer * inner,
        groups,
        inner,
        *rows.stride(),
        *out.view(outer, groups * bits, inner).stride(),
        DOUBLE=logits.dtype == torch.float64,
        MSB=msb,
        M=bits,
        C=tile.bits,
        J=(bits - 1).bit_length(),
        PIXELS=tile.pixels,
        G_TILE=tile.groups,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out


def bits_softmax_expectation_bwd(
    logits: torch.Tensor,
    upstream: torch.Tensor,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
) -> torch.Tensor:
    outer, inner = split_at(logits.shape, dim)
    slope = logits.new_empty(logits.shape)
    if slope.numel() == 0:
        return slope
    rows = logits.contiguous().view(outer, groups << bits, inner)
    given = upstream.contiguous().view(outer, groups * bits, inner)
    tile = tile_of(groups, bits, inner == 1)
    _bits_softmax_expectation_slope_kernel[(triton.cdiv(outer * inner, tile.pixels),)](
        rows,
        given,
        slope,
        float64_pattern(scale),
        outer * inner,
        groups,
        inner,
        *rows.stride(),
        *given.stride(),
        DOUBLE=logits.dtype == torch.float64,
        MSB=msb,
        M=bits,
        C=tile.bits,
        PIXELS=tile.pixels,
        G_TILE=tile.groups,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return slope
