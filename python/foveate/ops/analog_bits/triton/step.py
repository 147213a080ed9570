"""Sampler steps: x_prev = A x_t + B x0 + S z, with z read, drawn from the stream, or absent."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from foveate.ops.analog_bits.layout import split_at
from foveate.ops.analog_bits.steps import Step
from foveate.ops.analog_bits.triton.noise import normals_by_channel, tile_sizes
from foveate.ops.analog_bits.triton.words import float64_of, float64_pattern

_VALUES = 1024  # of a program
# steps.py, PREDICTIONS.
_EPS, _V, _SIGMOID = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _coefficient(coefficients, sample, index, work: tl.constexpr, inside):
    return tl.load(coefficients + sample * 5 + index, mask=inside, other=1.0).to(work)


@triton.jit
def _stepped(
    x,
    f,
    other,
    z,
    coefficients,
    sample,
    inside,
    guidance_bits,
    clip_bits,
    scale_bits,
    KIND: tl.constexpr,
    GUIDED: tl.constexpr,
    NOISE: tl.constexpr,  # 0: none, 1: times the step's S, 2: z has been multiplied
):
    """(x_prev, x0) of values x with the prediction f."""
    work: tl.constexpr = x.dtype
    if GUIDED:
        guidance = float64_of(guidance_bits).to(work)
        f = (1.0 + guidance) * f - guidance * other
    root = _coefficient(coefficients, sample, 0, work, inside)
    spread = _coefficient(coefficients, sample, 1, work, inside)
    if KIND == _EPS:
        x0 = (x - spread * f) / root
    elif KIND == _V:
        x0 = root * x - spread * f
    elif KIND == _SIGMOID:
        scale = float64_of(scale_bits).to(work)
        decay = tl.exp(-tl.abs(f))
        small = decay / (1.0 + decay)
        x0 = scale * (2.0 * tl.where(f < 0, small, 1.0 - small) - 1.0)
    else:
        x0 = f
    clip = float64_of(clip_bits).to(work)
    x0 = tl.where(x0 > clip, clip, tl.where(x0 < -clip, -clip, x0))  # NaN stays NaN
    keep = _coefficient(coefficients, sample, 2, work, inside)
    pull = _coefficient(coefficients, sample, 3, work, inside)
    x_prev = keep * x + pull * x0
    if NOISE == 1:
        x_prev += _coefficient(coefficients, sample, 4, work, inside) * z
    if NOISE == 2:
        x_prev += z
    return x_prev, x0


@triton.jit(do_not_specialize=["guidance_bits", "clip_bits", "scale_bits"])
def _bits_step_kernel(
    x,  # [samples, size], samples at their own stride
    pred,  # [samples, size]
    uncond,  # like pred, or unused
    noise,  # [samples, size], or unused
    sigma,  # [samples, size], or unused
    coefficients,  # [samples or 1, 5] float64
    out,  # [samples, size], may be x
    x0_out,  # [samples, size], or unused
    guidance_bits,  # float64 patterns
    clip_bits,
    scale_bits,
    size,
    blocks,  # programs of a sample
    x_stride,
    out_stride,
    x0_stride,
    KIND: tl.constexpr,
    GUIDED: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    WRITES_X0: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) // blocks
    at = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    flat = sample * size + at
    value = tl.load(x + sample * x_stride + at, mask=inside, other=0.0)
    f = tl.load(pred + flat, mask=inside, other=0.0).to(value.dtype)
    other = f
    if GUIDED:
        other = tl.load(uncond + flat, mask=inside, other=0.0).to(value.dtype)
    z = f
    if HAS_NOISE:
        z = tl.load(noise + flat, mask=inside, other=0.0)
        if HAS_SIGMA:
            z *= tl.load(sigma + flat, mask=inside, other=0.0)
    x_prev, x0 = _stepped(
        value,
        f,
        other,
        z,
        coefficients,
        sample if PER_SAMPLE else 0,
        True,
        guidance_bits,
        clip_bits,
        scale_bits,
        KIND,
        GUIDED,
        (2 if HAS_SIGMA else 1) if HAS_NOISE else 0,
    )
    tl.store(out + sample * out_stride + at, x_prev, mask=inside)
    if WRITES_X0:
        tl.store(x0_out + sample * x0_stride + at, x0, mask=inside)


@triton.jit
def _draw_tile(
    x,
    pred,
    uncond,
    sigma,
    coefficients,
    out,
    x0_out,
    seed,
    offset,
    guidance_bits,
    clip_bits,
    scale_bits,
    pixel,
    sample,
    flat,
    place,
    inner,
    x_stride,
    out_stride,
    x0_stride,
    inside,
    first,
    KIND: tl.constexpr,
    GUIDED: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    WRITES_X0: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    # `place` is the position in the sample; where samples are channels, each has its own stride.
    channel = first + tl.arange(0, 4 * GROUPS)
    mask = inside[:, None] & (channel < CHANNELS)[None, :]
    step = channel.to(tl.int64)[None, :]
    whose = sample[:, None] + (step if BY_CHANNEL else 0 * step)
    within = place[:, None] + (0 * step if BY_CHANNEL else step * inner)
    flat = flat[:, None] + step * inner
    value = tl.load(x + whose * x_stride + within, mask=mask, other=0.0)
    f = tl.load(pred + flat, mask=mask, other=0.0).to(value.dtype)
    other = f
    if GUIDED:
        other = tl.load(uncond + flat, mask=mask, other=0.0).to(value.dtype)
    z = normals_by_channel(pixel, seed, offset, first // 4, GROUPS).to(value.dtype)
    if HAS_SIGMA:
        z *= tl.load(sigma + flat, mask=mask, other=0.0)
    row = (whose if BY_CHANNEL else sample[:, None]) if PER_SAMPLE else 0 * sample[:, None]
    x_prev, x0 = _stepped(
        value,
        f,
        other,
        z,
        coefficients,
        row,
        mask if BY_CHANNEL else inside[:, None],
        guidance_bits,
        clip_bits,
        scale_bits,
        KIND,
        GUIDED,
        2 if HAS_SIGMA else 1,
    )
    tl.store(out + whose * out_stride + within, x_prev, mask=mask)
    if WRITES_X0:
        tl.store(x0_out + whose * x0_stride + within, x0, mask=mask)


@triton.jit(do_not_specialize=["seed", "offset", "guidance_bits", "clip_bits", "scale_bits"])
def _bits_step_draw_kernel(
    x,  # [samples, size], samples at their own stride
    pred,  # [outer, N, inner] contiguous
    uncond,  # like pred, or unused
    sigma,  # the same shape, or unused
    coefficients,  # [samples or 1, 5] float64
    seed_tensor,  # [1] int64, or unused
    out,  # like x, may be x
    x0_out,  # like x, or unused
    seed,
    offset,
    guidance_bits,  # float64 patterns
    clip_bits,
    scale_bits,
    n_pixels,
    inner,
    rows_per_sample,
    x_stride,
    out_stride,
    x0_stride,
    HAS_SEED_TENSOR: tl.constexpr,
    KIND: tl.constexpr,
    GUIDED: tl.constexpr,
    HAS_SIGMA: tl.constexpr,
    WRITES_X0: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    BY_CHANNEL: tl.constexpr,  # axis 0 holds the channels: a sample is a channel
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    if HAS_SEED_TENSOR:
        seed = tl.load(seed_tensor)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    row = pixel // inner
    column = pixel % inner
    sample = row // rows_per_sample
    place = (row % rows_per_sample) * (CHANNELS * inner) + column
    flat = row * (CHANNELS * inner) + column
    for tile in range(triton.cdiv(CHANNELS, 4 * GROUPS)):
        _draw_tile(
            x,
            pred,
            uncond,
            sigma,
            coefficients,
            out,
            x0_out,
            seed,
            offset,
            guidance_bits,
            clip_bits,
            scale_bits,
            pixel,
            sample,
            flat,
            place,
            inner,
            x_stride,
            out_stride,
            x0_stride,
            inside,
            tile * 4 * GROUPS,
            KIND,
            GUIDED,
            HAS_SIGMA,
            WRITES_X0,
            PER_SAMPLE,
            BY_CHANNEL,
            CHANNELS,
            GROUPS,
        )


def _by_sample(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a fresh one like it, in which each sample of axis 0 lies contiguous."""
    if tensor.is_contiguous() or (len(tensor) > 0 and tensor[0].is_contiguous()):
        return tensor
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def bits_step(
    x_t: torch.Tensor,
    pred: torch.Tensor,
    uncond: torch.Tensor | None,
    noise: torch.Tensor | None,
    sigma: torch.Tensor | None,
    coefficients: torch.Tensor,
    *step: object,
    out: torch.Tensor,
    x0_out: torch.Tensor | None,
) -> None:
    if x_t.numel() == 0:
        return
    s = Step(*step)  # type: ignore[arg-type]
    source = _by_sample(x_t)
    if source is not x_t:
        source.copy_(x_t)
    target = _by_sample(out)
    start = target if x0_out is None else _by_sample(x0_out)
    given = pred.contiguous()
    other = given if uncond is None else uncond.contiguous()
    spread = given if sigma is None else sigma.contiguous()
    coefficients = coefficients.contiguous()
    size = math.prod(x_t.shape[1:])
    patterns = [float64_pattern(value) for value in (s.guidance, s.clip, s.scale)]
    strides = [tensor.stride(0) for tensor in (source, target, start)]
    if s.draws:
        channels = x_t.shape[s.dim]
        outer, inner = split_at(x_t.shape, s.dim)
        pixels, groups = tile_sizes(channels)
        pixels //= 2  # more values of a thread spill beside the generator
        _bits_step_draw_kernel[(triton.cdiv(outer * inner, pixels),)](
            source,
            given,
            other,
            spread,
            coefficients,
            coefficients if s.seed_tensor is None else s.seed_tensor,
            target,
            start,
            s.seed,
            s.offset,
            *patterns,
            outer * inner,
            inner,
            max(outer // len(x_t), 1),
            *strides,
            HAS_SEED_TENSOR=s.seed_tensor is not None,
            KIND=s.kind,
            GUIDED=uncond is not None,
            HAS_SIGMA=sigma is not None,
            WRITES_X0=x0_out is not None,
            PER_SAMPLE=len(coefficients) > 1,
            BY_CHANNEL=s.dim == 0,
            CHANNELS=channels,
            PIXELS=pixels,
            GROUPS=groups,
            enable_fp_fusion=False,
        )
    else:
        blocks = triton.cdiv(size, _VALUES)
        _bits_step_kernel[(len(x_t) * blocks,)](
            source,
            given,
            other,
            given if noise is None else noise.contiguous(),
            spread,
            coefficients,
            target,
            start,
            *patterns,
            size,
            blocks,
            *strides,
            KIND=s.kind,
            GUIDED=uncond is not None,
            HAS_NOISE=noise is not None,
            HAS_SIGMA=sigma is not None,
            WRITES_X0=x0_out is not None,
            PER_SAMPLE=len(coefficients) > 1,
            BLOCK=_VALUES,
            enable_fp_fusion=False,
        )
    if target is not out:
        out.copy_(target)
    if x0_out is not None and start is not x0_out:
        x0_out.copy_(start)
