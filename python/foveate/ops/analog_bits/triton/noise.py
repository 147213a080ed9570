"""The noise stream in the fixed sequence of csrc/cpu/philox.h, and noisy bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.ops.analog_bits.layout import require_in_range, split_at
from foveate.ops.analog_bits.seeds import pixels_per_sample
from foveate.ops.analog_bits.triton.words import code_word, float64_of, float64_pattern

_VALUES = 1024  # of a tile: at 2048 the generator spills on sm_80


@triton.jit
def _unit(w):
    # fl32(fl32(w) 2^-32 + 2^-33); the conversion is exact halves and one rounding.
    high = (w >> 16).to(tl.int32).to(tl.float32)
    low = (w & 0xFFFF).to(tl.int32).to(tl.float32)
    return tl.fma(high, high * 0 + 65536.0, low) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def _fma(a, b, c):
    return tl.fma(a, b, a * 0 + c)


@triton.jit
def _radius(u):
    bits = tl.cast(u, tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    k = ((bits >> 23) - 127).to(tl.float32)
    f = tl.cast((bits & 0x7FFFFF) + 0x3F3504F3, tl.float32, bitcast=True) - 1.0
    p = f * 0 - 0.0785961374
    p = _fma(p, f, 0.128816471)
    p = _fma(p, f, -0.131287545)
    p = _fma(p, f, 0.141811922)
    p = _fma(p, f, -0.166245535)
    p = _fma(p, f, 0.200022861)
    p = _fma(p, f, -0.250008106)
    p = _fma(p, f, 0.333333164)
    t = tl.fma(f * f, _fma(f, p, -0.5), f)
    ln = tl.fma(k, k * 0 + 0.693145752, tl.fma(k, k * 0 + 1.42860677e-06, t))
    return tl.sqrt_rn(-2.0 * ln)


@triton.jit
def _turn(u):
    t = 4.0 * u
    q = (t + 12582912.0) - 12582912.0
    d = t - q
    d2 = d * d
    s = d2 * 0 - 0.00460217707
    s = _fma(s, d2, 0.0796802267)
    s = _fma(s, d2, -0.64596349)
    s = _fma(s, d2, 1.57079637) * d
    c = d2 * 0 + 0.000906743517
    c = _fma(c, d2, -0.0208615288)
    c = _fma(c, d2, 0.253669411)
    c = _fma(c, d2, -1.23370051)
    c = _fma(c, d2, 1.0)
    quadrant = q.to(tl.int32) & 3
    swap = (quadrant & 1) == 1
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    cosine = tl.where((quadrant == 1) | (quadrant == 2), -cosine, cosine)
    sine = tl.where(quadrant >= 2, -sine, sine)
    return cosine, sine


@triton.jit
def four_normals(pixel, group, seed, offset):
    """Normals of channels 4 group .. 4 group + 3 of each pixel; pixel int64, group int32."""
    low = (pixel & 0xFFFFFFFF).to(tl.uint32)
    high = (pixel >> 32).to(tl.uint32)
    zero = low ^ low
    w0, w1, w2, w3 = tl.philox(
        seed, low, high, zero + group.to(tl.uint32), zero + offset.to(tl.uint32)
    )
    r0 = _radius(_unit(w0))
    r2 = _radius(_unit(w2))
    c0, s0 = _turn(_unit(w1))
    c2, s2 = _turn(_unit(w3))
    return r0 * c0, r0 * s0, r2 * c2, r2 * s2


@triton.jit
def normals_by_channel(pixel, seed, offset, group, GROUPS: tl.constexpr):
    """[pixels, 4 GROUPS] normals of channels 4 group, ...: a thread owns four channels."""
    group += tl.arange(0, GROUPS)
    shape_pixel = pixel[:, None] + (group * 0)[None, :]
    z0, z1, z2, z3 = four_normals(shape_pixel, (shape_pixel * 0 + group[None, :]), seed, offset)
    z = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [pixels, GROUPS, 2, 2]: z0 z1, z2 z3
    return tl.reshape(z, (pixel.shape[0], 4 * GROUPS))


@triton.jit(do_not_specialize=["seed", "offset"])
def _bits_noise_kernel(
    out,  # [outer, N, inner]
    seed_tensor,  # [1] int64, or unused
    seed,
    offset,
    n_pixels,  # outer * inner
    inner,
    outer_stride,
    channel_stride,
    inner_stride,
    HAS_SEED_TENSOR: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,  # groups of four channels in a tile, a power of two
):
    if HAS_SEED_TENSOR:
        seed = tl.load(seed_tensor)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    out += (pixel // inner) * outer_stride + (pixel % inner) * inner_stride
    for tile in range(triton.cdiv(CHANNELS, 4 * GROUPS)):
        z = normals_by_channel(pixel, seed, offset, tile * GROUPS, GROUPS)
        channel = tile * 4 * GROUPS + tl.arange(0, 4 * GROUPS)
        tl.store(
            out[:, None] + channel[None, :] * channel_stride,
            z.to(out.dtype.element_ty),
            mask=inside[:, None] & (channel < CHANNELS)[None, :],
        )


@triton.jit(do_not_specialize=["seed", "offset", "high_bits", "low_bits"])
def _bits_q_sample_kernel(
    x,  # ids [outer, K, inner]
    gamma,  # [samples] float64
    noise,  # [outer, N, inner] contiguous, or unused
    seed_tensor,  # [1] int64, or unused
    out,  # [outer, N, inner] contiguous
    noise_out,  # the same, or unused
    seed,
    offset,
    high_bits,  # float64 pattern
    low_bits,
    n_pixels,
    inner,
    pixels_per_sample,
    x_outer_stride,
    x_map_stride,
    x_inner_stride,
    outer_stride,
    channel_stride,
    inner_stride,
    HAS_NOISE: tl.constexpr,
    HAS_SEED_TENSOR: tl.constexpr,
    WRITES_NOISE: tl.constexpr,
    DOUBLE: tl.constexpr,
    N_BITS: tl.constexpr,
    MSB: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    GROUPS: tl.constexpr,  # groups of four channels in a tile, a power of two <= 16
):
    if HAS_SEED_TENSOR:
        seed = tl.load(seed_tensor)
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    row = pixel // inner
    column = pixel % inner
    x += row * x_outer_stride + column * x_inner_stride
    at = row * outer_stride + column * inner_stride
    level = tl.load(gamma + pixel // pixels_per_sample, mask=inside, other=0.0)
    root = tl.sqrt(level)  # float64: correctly rounded
    high = root * float64_of(high_bits)
    low = root * float64_of(low_bits)
    spread = tl.sqrt(1.0 - level)
    if not DOUBLE:
        high = high.to(tl.float32)
        low = low.to(tl.float32)
        spread = spread.to(tl.float32)
    for tile in tl.static_range(triton.cdiv(CHANNELS, 4 * GROUPS)):
        _q_sample_tile(
            x,
            noise,
            out,
            noise_out,
            pixel,
            inside,
            at,
            high,
            low,
            spread,
            seed,
            offset,
            x_map_stride,
            channel_stride,
            HAS_NOISE,
            WRITES_NOISE,
            DOUBLE,
            N_BITS,
            MSB,
            CHANNELS,
            tile * 4 * GROUPS,
            GROUPS,
        )


@triton.jit
def _q_sample_tile(
    x,
    noise,
    out,
    noise_out,
    pixel,
    inside,
    at,
    high,
    low,
    spread,
    seed,
    offset,
    x_map_stride,
    channel_stride,
    HAS_NOISE: tl.constexpr,
    WRITES_NOISE: tl.constexpr,
    DOUBLE: tl.constexpr,
    N_BITS: tl.constexpr,
    MSB: tl.constexpr,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    GROUPS: tl.constexpr,
):
    channel = FIRST + tl.arange(0, 4 * GROUPS)
    where = at[:, None] + channel[None, :] * channel_stride
    mask = inside[:, None] & (channel < CHANNELS)[None, :]
    if HAS_NOISE:
        e = tl.load(noise + where, mask=mask, other=0.0)
    else:
        e = normals_by_channel(pixel, seed, offset, FIRST // 4, GROUPS)
    if DOUBLE:
        e = e.to(tl.float64)
    word = code_word(x, x_map_stride, inside, N_BITS, MSB, FIRST // 64)
    bit = (word[:, None] >> (channel % 64)[None, :]) & 1
    s = tl.where(bit != 0, high[:, None], low[:, None])
    value = tl.fma(spread[:, None] + tl.zeros_like(e), e, s)
    tl.store(out + where, value.to(out.dtype.element_ty), mask=mask)
    if WRITES_NOISE:
        tl.store(noise_out + where, e, mask=mask)


def tile_sizes(channels: int) -> tuple[int, int]:
    """(pixels, groups of four channels) of a tile; groups of a tile never straddle a code word."""
    groups = min(16, triton.next_power_of_2(triton.cdiv(channels, 4)))
    return max(16, _VALUES // (4 * groups)), groups


def bits_noise(
    out: torch.Tensor, dim: int, seed_tensor: torch.Tensor | None, seed: int, offset: int
) -> None:
    outer, inner = split_at(out.shape, dim)
    if out.numel() == 0:
        return
    target = out if out.is_contiguous() else torch.empty_like(out).contiguous()
    rows = target.view(outer, out.shape[dim], inner)
    pixels, groups = tile_sizes(out.shape[dim])
    _bits_noise_kernel[(triton.cdiv(outer * inner, pixels),)](
        rows,
        out if seed_tensor is None else seed_tensor,
        seed,
        offset,
        outer * inner,
        inner,
        *rows.stride(),
        HAS_SEED_TENSOR=seed_tensor is not None,
        CHANNELS=out.shape[dim],
        PIXELS=pixels,
        GROUPS=groups,
        enable_fp_fusion=False,
    )
    if target is not out:
        out.copy_(target)


def bits_q_sample(
    x: torch.Tensor,
    n_bits: list[int],
    high: float,
    low: float,
    msb: bool,
    dim: int,
    gamma: torch.Tensor,
    noise: torch.Tensor | None,
    seed_tensor: torch.Tensor | None,
    seed: int,
    offset: int,
    check: bool,
    *,
    out: torch.Tensor,
    noise_out: torch.Tensor | None,
) -> None:
    if check:
        require_in_range(x, n_bits, dim)
    outer, inner = split_at(out.shape, dim)
    if out.numel() == 0:
        return
    channels = sum(n_bits)
    target = out if out.is_contiguous() else torch.empty_like(out).contiguous()
    rows = target.view(outer, channels, inner)
    ids = x.reshape(outer, len(n_bits), inner)
    pixels, groups = tile_sizes(channels)
    _bits_q_sample_kernel[(triton.cdiv(outer * inner, pixels),)](
        ids.view(torch.uint8) if ids.dtype == torch.bool else ids,
        gamma.contiguous(),
        rows if noise is None else noise,
        gamma if seed_tensor is None else seed_tensor,
        rows,
        rows if noise_out is None else noise_out,
        seed,
        offset,
        float64_pattern(high),
        float64_pattern(low),
        outer * inner,
        inner,
        pixels_per_sample(gamma, out.shape, dim),
        *ids.stride(),
        *rows.stride(),
        HAS_NOISE=noise is not None,
        HAS_SEED_TENSOR=seed_tensor is not None,
        WRITES_NOISE=noise_out is not None,
        DOUBLE=out.dtype == torch.float64,
        N_BITS=tuple(n_bits),
        MSB=msb,
        CHANNELS=channels,
        PIXELS=pixels,
        GROUPS=groups,
        enable_fp_fusion=False,
    )
    if target is not out:
        out.copy_(target)
