"""Sums of the programs' partial sums in a fixed order, and the gradient's incoming factor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.ops.analog_bits.triton.words import float64_of, float64_pattern

_BLOCK = 4096
_SCALED = 2048


@triton.jit(do_not_specialize=["divisor_bits"])
def _sum_partials_kernel(
    partial,  # [n] float64
    out,  # [programs]
    n,
    divisor_bits,  # float64 pattern
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(partial + at, mask=at < n, other=0.0), 0)
    divisor = float64_of(divisor_bits)
    tl.store(out + tl.program_id(0), (total / divisor).to(out.dtype.element_ty))


@triton.jit
def _scale_slope_kernel(
    slope,  # [n], scaled in place
    upstream,  # [1]
    n,
    BLOCK: tl.constexpr,
):
    factor = tl.load(upstream)
    if factor != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(slope + at, mask=at < n, other=0.0)
        value = value.to(factor.dtype) * factor
        tl.store(slope + at, value.to(slope.dtype.element_ty), mask=at < n)


def mean_of_partials(partial: torch.Tensor, divisor: float, dtype: torch.dtype) -> torch.Tensor:
    """Sum of float64 `[n]` over `divisor`, `[]` of `dtype`; the order depends on n alone."""
    while len(partial) > _BLOCK:
        sums = partial.new_empty(triton.cdiv(len(partial), _BLOCK))
        _sum(partial, sums, 1.0)
        partial = sums
    out = partial.new_empty((), dtype=dtype)
    _sum(partial, out, divisor)
    return out


def _sum(partial: torch.Tensor, out: torch.Tensor, divisor: float) -> None:
    n = len(partial)
    block = min(_BLOCK, max(128, triton.next_power_of_2(n)))
    _sum_partials_kernel[(triton.cdiv(n, block),)](
        partial, out, n, float64_pattern(divisor), BLOCK=block, num_warps=8, enable_fp_fusion=False
    )


def bits_scale_slope(slope: torch.Tensor, upstream: torch.Tensor) -> None:
    if slope.numel() == 0:
        return
    _scale_slope_kernel[(triton.cdiv(slope.numel(), _SCALED),)](
        slope, upstream, slope.numel(), BLOCK=_SCALED, enable_fp_fusion=False
    )
