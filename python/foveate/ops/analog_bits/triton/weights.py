"""Weights of instances: integer counts, a table of weights for each sample, a look-up."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from foveate.ops.analog_bits.layout import require_known
from foveate.ops.analog_bits.triton.words import float64_of, float64_pattern

_PIXELS = 2048
_IDS = 512
_MOST_BINS = 1024  # that a program counts on its own before it adds to memory


@triton.jit
def _load_ids(ids, sample_stride, pixel_stride, blocks, n_pixels, PIXELS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64) // blocks
    pixel = (tl.program_id(0).to(tl.int64) % blocks) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < n_pixels
    found = tl.load(ids + sample * sample_stride + pixel * pixel_stride, mask=inside, other=0)
    return found.to(tl.int64), sample, pixel, inside


@triton.jit
def _count_ids_kernel(
    ids,  # [samples, P]
    counts,  # [samples, n_ids] int32, zeros at first
    sample_stride,
    pixel_stride,
    blocks,  # programs of a sample
    n_pixels,
    n_ids,
    BINS: tl.constexpr,  # a power of two >= n_ids, or 0: every pixel adds to memory
    PIXELS: tl.constexpr,
):
    found, sample, _pixel, inside = _load_ids(
        ids, sample_stride, pixel_stride, blocks, n_pixels, PIXELS
    )
    known = inside & (found >= 0) & (found < n_ids)
    counts += sample * n_ids
    if BINS > 0:
        mine = tl.histogram(tl.where(known, found, 0).to(tl.int32), BINS, mask=known)
        k = tl.arange(0, BINS)
        tl.atomic_add(counts + k, mine, mask=(k < n_ids) & (mine > 0), sem="relaxed")
    else:
        tl.atomic_add(counts + found, 1, mask=known, sem="relaxed")


@triton.jit
def _power(count, power, WHOLE: tl.constexpr):
    u = 1.0 / (count + 1).to(tl.float64)
    if WHOLE == 0:
        u = u * 0.0 + 1.0
    if WHOLE < 0:
        u = tl.exp(power * tl.log(u))
    return u


@triton.jit(do_not_specialize=["power_bits"])
def _tabulate_weights_kernel(
    counts,  # [samples, n_ids] int32
    table,  # [samples, n_ids + 1]: the last entry is for ids outside
    n_pixels,
    n_ids,
    power_bits,  # float64 pattern
    WHOLE: tl.constexpr,  # the power if it is 0 or 1, else -1
    IDS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    counts += sample * n_ids
    table += sample * (n_ids + 1)
    power = float64_of(power_bits)
    sums = tl.zeros([IDS], tl.float64)
    outside = tl.zeros([IDS], tl.int64)
    for begin in range(0, n_ids, IDS):
        k = begin + tl.arange(0, IDS)
        count = tl.load(counts + k, mask=k < n_ids, other=0)
        sums += tl.where(count > 0, count.to(tl.float64) * _power(count, power, WHOLE), 0.0)
        outside += count
    unknown = 1.0 if WHOLE == 0 else 0.0  # 0^power
    pixels = tl.zeros([], tl.float64) + n_pixels
    rest = (pixels - tl.sum(outside, 0)) * unknown
    mean = pixels / (tl.sum(sums, 0) + rest)
    for begin in range(0, n_ids, IDS):
        k = begin + tl.arange(0, IDS)
        count = tl.load(counts + k, mask=k < n_ids, other=0)
        weight = _power(count, power, WHOLE) * mean
        tl.store(table + k, weight.to(tl.float32), mask=k < n_ids)
    tl.store(table + n_ids, (unknown * mean).to(tl.float32))


@triton.jit
def _weigh_ids_kernel(
    ids,  # [samples, P]
    table,  # [samples, n_ids + 1]
    out,  # [samples, P]
    sample_stride,
    pixel_stride,
    blocks,
    n_pixels,
    n_ids,
    PIXELS: tl.constexpr,
):
    found, sample, pixel, inside = _load_ids(
        ids, sample_stride, pixel_stride, blocks, n_pixels, PIXELS
    )
    known = (found >= 0) & (found < n_ids)
    weight = tl.load(
        table + sample * (n_ids + 1) + tl.where(known, found, n_ids), mask=inside, other=0.0
    )
    tl.store(out + sample * n_pixels + pixel, weight, mask=inside)


def instance_weights(ids: torch.Tensor, n_ids: int, power: float, check: bool) -> torch.Tensor:
    samples, pixels = len(ids), math.prod(ids.shape[1:])
    out = ids.new_empty(ids.shape, dtype=torch.float32)
    if out.numel() == 0:
        return out
    flat = ids.reshape(samples, pixels)
    flat = flat.view(torch.uint8) if flat.dtype == torch.bool else flat
    if check and bool(((flat < 0) | (flat >= n_ids)).any()):
        require_known(ids, n_ids)
    counts = ids.new_zeros((samples, n_ids), dtype=torch.int32)
    table = out.new_empty((samples, n_ids + 1))
    blocks = triton.cdiv(pixels, _PIXELS)
    bins = triton.next_power_of_2(n_ids)
    _count_ids_kernel[(samples * blocks,)](
        flat,
        counts,
        *flat.stride(),
        blocks,
        pixels,
        n_ids,
        BINS=bins if bins <= _MOST_BINS else 0,
        PIXELS=_PIXELS,
        enable_fp_fusion=False,
    )
    _tabulate_weights_kernel[(samples,)](
        counts,
        table,
        pixels,
        n_ids,
        float64_pattern(power),
        WHOLE=int(power) if power in (0.0, 1.0) else -1,
        IDS=_IDS,
        enable_fp_fusion=False,
    )
    _weigh_ids_kernel[(samples * blocks,)](
        flat,
        table,
        out,
        *flat.stride(),
        blocks,
        pixels,
        n_ids,
        PIXELS=_PIXELS,
        enable_fp_fusion=False,
    )
    return out
