"""Cross entropy over groups of bits.

A group above 12 bits is read twice: for the maximum and the sum, and for its slope.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from foveate.ops.analog_bits.groups import SoftmaxTarget
from foveate.ops.analog_bits.layout import (
    mean_divisor,
    pixel_shape,
    pixels_per_weight,
    require_in_range,
    split_at,
    work_dtype,
)
from foveate.ops.analog_bits.triton.groups import load_rows, place_rows, tile_of
from foveate.ops.analog_bits.triton.sums import mean_of_partials
from foveate.ops.analog_bits.triton.words import (
    code_word,
    float64_of,
    float64_pattern,
    reverse_bits,
)


@triton.jit
def _field(word, first, W: tl.constexpr, M: tl.constexpr):
    # Bits first .. first + M - 1 of the channels as far as word W holds them.
    shift = first - 64 * W
    right = tl.minimum(tl.maximum(shift, 0), 63)
    held = tl.minimum(64 - right, M)
    low = (word >> right) & ((tl.full(word.shape, 1, tl.int64) << held) - 1)
    left = tl.minimum(tl.maximum(-shift, 0), 63)
    high = (word << left) & ((1 << M) - 1)
    field = tl.where(shift >= 0, low, high)
    return tl.where((shift < 64) & (shift > -M), field, 0)


@triton.jit
def _targets(
    x, map_stride, group, inside, N_BITS: tl.constexpr, MSB: tl.constexpr,
    CHANNELS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The integer that each row's bits spell, int64."""
    target = tl.zeros(group.shape, tl.int64)
    for word in tl.static_range(triton.cdiv(CHANNELS, 64)):
        held = code_word(x, map_stride, inside, N_BITS, MSB, word)
        target |= _field(held, group * M, word, M)
    return reverse_bits(target, M) if MSB else target


@triton.jit(do_not_specialize=["slope_scale_bits", "divisor_bits"])
def _bits_softmax_loss_kernel(
    x,  # ids [outer, K, inner]
    logits,  # [outer, G 2^m, inner] contiguous
    weight,  # [P / pixels_per_weight], or unused
    upstream,  # [1] or [P], or unused
    partial,  # [programs] float64, or unused
    pixel_loss,  # [P], or unused
    slope,  # like logits, or unused; may be logits
    slope_scale_bits,  # float64 patterns
    divisor_bits,  # of pixel_loss
    n_pixels,
    groups,
    inner,
    pixels_per_weight,
    x_outer_stride,
    x_map_stride,
    x_inner_stride,
    outer_stride,
    channel_stride,
    inner_stride,
    HAS_WEIGHT: tl.constexpr,
    UPSTREAM: tl.constexpr,  # 0: none, 1: one factor, 2: one per pixel
    WRITES_PARTIAL: tl.constexpr,
    WRITES_PIXELS: tl.constexpr,
    WRITES_SLOPE: tl.constexpr,
    DOUBLE: tl.constexpr,
    N_BITS: tl.constexpr,
    MSB: tl.constexpr,
    CHANNELS: tl.constexpr,
    M: tl.constexpr,  # bits of a group
    C: tl.constexpr,  # bits of a chunk
    PIXELS: tl.constexpr,
    G_TILE: tl.constexpr,
):
    work = tl.float64 if DOUBLE else tl.float32
    slope_scale = float64_of(slope_scale_bits).to(work)
    divisor = float64_of(divisor_bits).to(work)
    begin = tl.program_id(0).to(tl.int64) * PIXELS
    pixel = begin + tl.arange(0, PIXELS * G_TILE) // G_TILE
    loss = tl.zeros([PIXELS * G_TILE], work)
    k = tl.arange(0, 1 << C)
    for tile in range(tl.cdiv(groups, G_TILE)):
        group, place = place_rows(pixel, tile, outer_stride, inner, inner_stride, G_TILE)
        inside = (pixel < n_pixels) & (group < groups)
        place += (group.to(tl.int64) << M) * channel_stride
        ids = x + (pixel // inner) * x_outer_stride + (pixel % inner) * x_inner_stride
        target = _targets(ids, x_map_stride, group, inside, N_BITS, MSB, CHANNELS, M)
        if M == C:
            value = load_rows(logits + place, channel_stride, inside, C, DOUBLE)
            top = tl.max(value, 1)
            value -= top[:, None]
            p = tl.exp(value)
            total = tl.sum(p, 1)
            hit = k[None, :] == target[:, None]
            at_target = tl.sum(tl.where(hit, value, 0.0), 1)
        else:
            top = tl.full([PIXELS * G_TILE], float("-inf"), work)
            total = tl.zeros([PIXELS * G_TILE], work)
            for chunk in range(1 << (M - C)):
                shifted = place + (chunk << C) * channel_stride
                value = load_rows(logits + shifted, channel_stride, inside, C, DOUBLE)
                above = tl.maximum(top, tl.max(value, 1))
                # Where all is -inf so far, or NaN, the sums are of zeros or NaN whatever `base` is.
                base = tl.where(above == float("-inf"), 0.0, above)
                total = total * tl.exp(top - base) + tl.sum(tl.exp(value - base[:, None]), 1)
                top = above
            at = tl.load(logits + place + target * channel_stride, mask=inside, other=0.0)
            at_target = at.to(work) - top
        loss += tl.where(inside, libdevice.log(total) - at_target, 0.0)
        if WRITES_SLOPE:
            factor = tl.zeros([PIXELS * G_TILE], work) + slope_scale
            if HAS_WEIGHT:
                factor *= tl.load(weight + pixel // pixels_per_weight, mask=inside, other=0.0)
            if UPSTREAM == 1:
                factor *= tl.load(upstream)
            if UPSTREAM == 2:
                factor *= tl.load(upstream + pixel, mask=inside, other=0.0)
            if M == C:
                steep = p / total[:, None] - tl.where(hit, 1.0, 0.0)
                tl.store(
                    slope + place[:, None] + k[None, :] * channel_stride,
                    (factor[:, None] * steep).to(slope.dtype.element_ty),
                    mask=inside[:, None],
                )
            else:
                for chunk in range(1 << (M - C)):
                    shifted = place + (chunk << C) * channel_stride
                    value = load_rows(logits + shifted, channel_stride, inside, C, DOUBLE)
                    steep = tl.exp(value - top[:, None]) / total[:, None]
                    hit = (k[None, :] + (chunk << C)) == target[:, None]
                    steep -= tl.where(hit, 1.0, 0.0)
                    tl.store(
                        slope + shifted[:, None] + k[None, :] * channel_stride,
                        (factor[:, None] * steep).to(slope.dtype.element_ty),
                        mask=inside[:, None],
                    )
    per_pixel = tl.sum(tl.reshape(loss, (PIXELS, G_TILE)), 1)
    pixel = begin + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    if HAS_WEIGHT:
        per_pixel *= tl.load(weight + pixel // pixels_per_weight, mask=inside, other=0.0)
    if WRITES_PIXELS:
        tl.store(pixel_loss + pixel, per_pixel / divisor, mask=inside)
    if WRITES_PARTIAL:
        per_pixel = tl.where(inside, per_pixel, 0.0).to(tl.float64)
        tl.store(partial + tl.program_id(0), tl.sum(per_pixel, 0))


def softmax_loss(
    logits: torch.Tensor,
    t: SoftmaxTarget,
    *,
    upstream: torch.Tensor | None = None,
    slope_scale: float = 0.0,
    divisor: float = 1.0,
    pixel_loss: torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
) -> torch.Tensor:
    """Partial sums of the weighted losses; writes `pixel_loss` and `slope`, which may be logits."""
    outer, inner = split_at(logits.shape, t.dim)
    rows = logits.contiguous().view(outer, logits.shape[t.dim], inner)
    ids = t.x.reshape(outer, len(t.n_bits), inner)
    tile = tile_of(t.groups, t.bits, inner == 1)
    programs = triton.cdiv(outer * inner, tile.pixels)
    sums = upstream is None and pixel_loss is None
    partial = logits.new_empty(programs if sums else 0, dtype=torch.float64)
    _bits_softmax_loss_kernel[(programs,)](
        ids.view(torch.uint8) if ids.dtype == torch.bool else ids,
        rows,
        partial if t.weight is None else t.weight,
        partial if upstream is None else upstream,
        partial,
        partial if pixel_loss is None else pixel_loss,
        rows if slope is None else slope,
        float64_pattern(slope_scale),
        float64_pattern(divisor),
        outer * inner,
        t.groups,
        inner,
        1 if t.weight is None else pixels_per_weight(t.weight, outer * inner),
        *ids.stride(),
        *rows.stride(),
        HAS_WEIGHT=t.weight is not None,
        UPSTREAM=0 if upstream is None else (2 if upstream.ndim > 0 else 1),
        WRITES_PARTIAL=sums,
        WRITES_PIXELS=pixel_loss is not None,
        WRITES_SLOPE=slope is not None,
        DOUBLE=logits.dtype == torch.float64,
        N_BITS=tuple(t.n_bits),
        MSB=t.msb,
        CHANNELS=t.groups * t.bits,
        M=t.bits,
        C=tile.bits,
        PIXELS=tile.pixels,
        G_TILE=tile.groups,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return partial


def _divisor(logits: torch.Tensor, t: SoftmaxTarget) -> float:
    outer, inner = split_at(logits.shape, t.dim)
    return mean_divisor(t.reduction, outer * inner, t.groups)


def bits_softmax_loss_fwd(logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    t = SoftmaxTarget(*args[:-2])
    with_slope, check = args[-2:]
    if check:
        require_in_range(t.x, t.n_bits, t.dim)
    work = work_dtype(logits.dtype)
    divisor = _divisor(logits, t)
    slope = logits.new_empty(logits.shape if with_slope else (0,))
    if t.reduction == "none":
        pixel_loss = logits.new_empty(pixel_shape(logits.shape, t.dim), dtype=work)
        if pixel_loss.numel() > 0:
            softmax_loss(logits, t, divisor=divisor, pixel_loss=pixel_loss)
        return pixel_loss, slope
    if logits.numel() == 0:
        return logits.new_full((), 0.0 / divisor, dtype=work), slope
    partial = softmax_loss(
        logits, t, slope_scale=1.0 / divisor, slope=slope if with_slope else None
    )
    return mean_of_partials(partial, divisor, work), slope


def bits_softmax_loss_bwd(logits: torch.Tensor, upstream: torch.Tensor, *args: Any) -> torch.Tensor:
    t = SoftmaxTarget(*args)
    divisor = _divisor(logits, t)
    slope = logits.new_empty(logits.shape)
    if slope.numel() > 0:
        factor = upstream.to(work_dtype(logits.dtype)).contiguous()
        scale = 0.0 if math.isnan(divisor) else 1.0 / divisor
        softmax_loss(logits, t, upstream=factor, slope_scale=scale, slope=slope)
    return slope
