"""Kernels with a planted fault each, for test_planted.py."""

import triton
import triton.language as tl


@triton.jit
def without_a_mask_kernel(
    x,  # [n]
    y,  # [n]
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0))


@triton.jit
def racing_kernel(
    x,  # [n]
    y,  # [1]
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + at, mask=at < n, other=0.0)))


@triton.jit
def stopping_short_kernel(
    x,  # [n]
    y,  # [n]
    n,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n, other=0.0), mask=at < n - 1)
