"""Losses on predicted bits; the target exists in registers alone."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from foveate.ops.analog_bits.layout import (
    LossTarget,
    mean_divisor,
    pixel_shape,
    pixels_per_weight,
    require_in_range,
    split_at,
    work_dtype,
)
from foveate.ops.analog_bits.seeds import pixels_per_sample
from foveate.ops.analog_bits.triton.noise import normals_by_channel, tile_sizes
from foveate.ops.analog_bits.triton.sums import mean_of_partials
from foveate.ops.analog_bits.triton.words import code_word, float64_of, float64_pattern

_STEPS = 4  # tiles of a program
# layout.py, LOSS_KINDS.
_EPS, _V, _SIGMOID = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _sigmoid_term(f, bit, eps, SMOOTHED: tl.constexpr):
    z = tl.where(bit, f, -f)
    negative = z < 0
    decay = tl.exp(tl.where(negative, z, -z))  # NaN stays NaN
    small = decay / (1.0 + decay)  # sigmoid(-|z|)
    other = tl.where(negative, 1.0 - small, small)  # sigmoid(-z)
    if SMOOTHED:
        q = tl.where(negative, small, 1.0 - small)
        loss = -libdevice.log(q + eps)
        slope = -q * other / (q + eps)
    else:
        loss = tl.where(negative, -z, 0.0) + libdevice.log1p(decay)
        slope = -other
    return loss, tl.where(bit, slope, -slope)


@triton.jit
def _term(f, bit, set_level, clear_level, root, e, eps, KIND: tl.constexpr, SMOOTHED: tl.constexpr):
    """A loss and its slope in the prediction f."""
    if KIND == _SIGMOID:
        loss, slope = _sigmoid_term(f, bit, eps, SMOOTHED)
    else:
        s = tl.where(bit, set_level, clear_level)
        if KIND == _EPS:
            target = e
        elif KIND == _V:
            target = tl.fma(root, e, -s)
        else:
            target = s
        d = f - target
        loss = d * d
        slope = 2.0 * d
    return loss, slope


@triton.jit
def _loss_tile(
    x,
    pred,
    noise,
    slope,
    pixel,
    inside,
    at,
    seed,
    offset,
    set_level,
    clear_level,
    root,
    factor,
    eps,
    x_map_stride,
    channel_stride,
    KIND: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    WRITES_SLOPE: tl.constexpr,
    N_BITS: tl.constexpr,
    MSB: tl.constexpr,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Sum over the tile's channels of each pixel's losses, before its weight."""
    channel = FIRST + tl.arange(0, 4 * GROUPS)
    where = at[:, None] + channel[None, :] * channel_stride
    mask = inside[:, None] & (channel < CHANNELS)[None, :]
    f = tl.load(pred + where, mask=mask, other=0.0).to(factor.dtype)
    e = tl.zeros_like(f)
    if KIND == _EPS or KIND == _V:  # noqa: SIM109 (Triton has no `in`)
        if HAS_NOISE:
            e = tl.load(noise + where, mask=mask, other=0.0)
        else:
            e = normals_by_channel(pixel, seed, offset, FIRST // 4, GROUPS).to(factor.dtype)
    word = code_word(x, x_map_stride, inside, N_BITS, MSB, FIRST // 64)
    bit = ((word[:, None] >> (channel % 64)[None, :]) & 1) != 0
    loss, steep = _term(
        f,
        bit,
        set_level[:, None],
        clear_level[:, None],
        root[:, None] + tl.zeros_like(f),
        e,
        eps,
        KIND,
        SMOOTHED,
    )
    if WRITES_SLOPE:
        steep = factor[:, None] * steep
        tl.store(slope + where, steep.to(slope.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, loss, 0.0), 1)


@triton.jit(
    do_not_specialize=[
        "seed",
        "offset",
        "scale_bits",
        "eps_bits",
        "slope_scale_bits",
        "divisor_bits",
    ]
)
def _bits_loss_kernel(
    x,  # ids [outer, K, inner]
    pred,  # [outer, N, inner] contiguous
    gamma,  # [samples] float64, or unused
    noise,  # like pred in the dtype of the arithmetic, or unused
    seed_tensor,  # [1] int64, or unused
    weight,  # [P / pixels_per_weight], or unused
    upstream,  # [1] or [P], or unused
    partial,  # [programs] float64, or unused
    pixel_loss,  # [P], or unused
    slope,  # like pred, or unused
    seed,
    offset,
    scale_bits,  # float64 patterns
    eps_bits,
    slope_scale_bits,
    divisor_bits,  # of pixel_loss
    n_pixels,
    inner,
    pixels_per_sample,
    pixels_per_weight,
    x_outer_stride,
    x_map_stride,
    x_inner_stride,
    outer_stride,
    channel_stride,
    inner_stride,
    KIND: tl.constexpr,
    SMOOTHED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_SEED_TENSOR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    UPSTREAM: tl.constexpr,  # 0: none, 1: one factor, 2: one per pixel
    WRITES_PARTIAL: tl.constexpr,
    WRITES_PIXELS: tl.constexpr,
    WRITES_SLOPE: tl.constexpr,
    DOUBLE: tl.constexpr,
    N_BITS: tl.constexpr,
    MSB: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,  # groups of four channels in a tile, a power of two <= 16
    STEPS: tl.constexpr,
):
    if HAS_SEED_TENSOR:
        seed = tl.load(seed_tensor)
    work = tl.float64 if DOUBLE else tl.float32
    scale = float64_of(scale_bits)
    eps = float64_of(eps_bits).to(work)
    slope_scale = float64_of(slope_scale_bits).to(work)
    divisor = float64_of(divisor_bits).to(work)
    total = tl.zeros([PIXELS], tl.float64)
    for step in range(STEPS):
        begin = (tl.program_id(0).to(tl.int64) * STEPS + step) * PIXELS
        pixel = begin + tl.arange(0, PIXELS)
        inside = pixel < n_pixels
        row = pixel // inner
        column = pixel % inner
        ids = x + row * x_outer_stride + column * x_inner_stride
        at = row * outer_stride + column * inner_stride
        signal = tl.zeros([PIXELS], tl.float64) + 1.0
        root = tl.zeros([PIXELS], tl.float64)
        if KIND == _V:
            level = tl.load(gamma + pixel // pixels_per_sample, mask=inside, other=0.0)
            signal = tl.sqrt(1.0 - level)
            root = tl.sqrt(level)
        set_level = (signal * scale).to(work)
        clear_level = -set_level
        importance = tl.zeros([PIXELS], work) + 1.0
        if HAS_WEIGHT:
            importance = tl.load(weight + pixel // pixels_per_weight, mask=inside, other=0.0)
        factor = slope_scale * importance
        if UPSTREAM == 1:
            factor *= tl.load(upstream)
        if UPSTREAM == 2:
            factor *= tl.load(upstream + pixel, mask=inside, other=0.0)
        loss = tl.zeros([PIXELS], work)
        for tile in tl.static_range(triton.cdiv(CHANNELS, 4 * GROUPS)):
            loss += _loss_tile(
                ids,
                pred,
                noise,
                slope,
                pixel,
                inside,
                at,
                seed,
                offset,
                set_level,
                clear_level,
                root.to(work),
                factor,
                eps,
                x_map_stride,
                channel_stride,
                KIND,
                SMOOTHED,
                HAS_NOISE,
                WRITES_SLOPE,
                N_BITS,
                MSB,
                CHANNELS,
                tile * 4 * GROUPS,
                GROUPS,
            )
        loss = tl.where(inside, importance * loss, 0.0)
        if WRITES_PIXELS:
            tl.store(pixel_loss + pixel, loss / divisor, mask=inside)
        total += loss
    if WRITES_PARTIAL:
        tl.store(partial + tl.program_id(0), tl.sum(total, 0))


def _run(
    pred: torch.Tensor,
    t: LossTarget,
    *,
    upstream: torch.Tensor | None = None,
    slope_scale: float = 0.0,
    divisor: float = 1.0,
    pixel_loss: torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
) -> torch.Tensor:
    """Partial sums of the weighted losses; `pixel_loss` and `slope` are written."""
    outer, inner = split_at(pred.shape, t.dim)
    channels = pred.shape[t.dim]
    rows = pred.contiguous().view(outer, channels, inner)
    ids = t.x.reshape(outer, len(t.n_bits), inner)
    pixels, groups = tile_sizes(channels)
    programs = triton.cdiv(outer * inner, pixels * _STEPS)
    sums = upstream is None and pixel_loss is None
    partial = pred.new_empty(programs if sums else 0, dtype=torch.float64)
    _bits_loss_kernel[(programs,)](
        ids.view(torch.uint8) if ids.dtype == torch.bool else ids,
        rows,
        partial if t.gamma is None else t.gamma.contiguous(),
        rows if t.noise is None else t.noise,
        partial if t.seed_tensor is None else t.seed_tensor,
        partial if t.weight is None else t.weight,
        partial if upstream is None else upstream,
        partial,
        partial if pixel_loss is None else pixel_loss,
        rows if slope is None else slope,
        t.seed,
        t.offset,
        float64_pattern(t.scale),
        float64_pattern(t.eps),
        float64_pattern(slope_scale),
        float64_pattern(divisor),
        outer * inner,
        inner,
        1 if t.gamma is None else pixels_per_sample(t.gamma, pred.shape, t.dim),
        1 if t.weight is None else pixels_per_weight(t.weight, outer * inner),
        *ids.stride(),
        *rows.stride(),
        KIND=t.kind,
        SMOOTHED=t.eps > 0,
        HAS_NOISE=t.noise is not None,
        HAS_SEED_TENSOR=t.seed_tensor is not None,
        HAS_WEIGHT=t.weight is not None,
        UPSTREAM=0 if upstream is None else (2 if upstream.ndim > 0 else 1),
        WRITES_PARTIAL=sums,
        WRITES_PIXELS=pixel_loss is not None,
        WRITES_SLOPE=slope is not None,
        DOUBLE=pred.dtype == torch.float64,
        N_BITS=tuple(t.n_bits),
        MSB=t.msb,
        CHANNELS=channels,
        PIXELS=pixels,
        GROUPS=groups,
        STEPS=_STEPS,
        enable_fp_fusion=False,
    )
    return partial


def _divisor(pred: torch.Tensor, t: LossTarget) -> float:
    outer, inner = split_at(pred.shape, t.dim)
    return mean_divisor(t.reduction, outer * inner, pred.shape[t.dim])


def bits_loss_fwd(pred: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    t = LossTarget(*args[:-2])
    with_slope, check = args[-2:]
    if check:
        require_in_range(t.x, t.n_bits, t.dim)
    work = work_dtype(pred.dtype)
    divisor = _divisor(pred, t)
    slope = pred.new_empty(pred.shape if with_slope else (0,))
    if t.reduction == "none":
        pixel_loss = pred.new_empty(pixel_shape(pred.shape, t.dim), dtype=work)
        if pixel_loss.numel() > 0:
            _run(pred, t, divisor=divisor, pixel_loss=pixel_loss)
        return pixel_loss, slope
    if pred.numel() == 0:
        return pred.new_full((), 0.0 / divisor, dtype=work), slope
    partial = _run(pred, t, slope_scale=1.0 / divisor, slope=slope if with_slope else None)
    return mean_of_partials(partial, divisor, work), slope


def bits_loss_bwd(pred: torch.Tensor, upstream: torch.Tensor, *args: Any) -> torch.Tensor:
    t = LossTarget(*args)
    divisor = _divisor(pred, t)
    slope = pred.new_empty(pred.shape)
    if slope.numel() > 0:
        factor = upstream.to(work_dtype(pred.dtype)).contiguous()
        scale = 0.0 if math.isnan(divisor) else 1.0 / divisor
        _run(pred, t, upstream=factor, slope_scale=scale, slope=slope)
    return slope
