"""Triton kernels over bit-packed and dense affinities: packing, degrees, products with vectors.

Bits are `[b, ceil(n / 32), n]` int32: bit t of word (q, i) is B[32 q + t, i]; B is symmetric.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORD = 32  # bits of a word
_ROWS = 128  # rows of a program in the mat-vecs
_COLUMNS = 4  # vectors of a program in the mat-vecs


@triton.jit
def _dense_pack_kernel(
    affinity,  # [b, n, n], any strides; the upper triangle is read
    high,  # [b] float64, the larger of the two values
    words,  # [b, ceil(n / 32), n]
    n,
    stride_b,
    stride_row,
    stride_column,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    high_value = tl.load(high + image)
    word = tl.zeros([BLOCK], tl.int32)
    for t in range(32):
        row = group * 32 + t
        low_index = tl.minimum(row, column)
        high_index = tl.maximum(row, column)
        value = tl.load(
            affinity + image * stride_b + low_index * stride_row + high_index * stride_column,
            mask=(row < n) & (column < n),
            other=0.0,
        )
        bit = (value.to(tl.float64) == high_value) & (row < n)
        word |= bit.to(tl.int32) << t
    at = (image * tl.cdiv(n, 32) + group) * n + column
    tl.store(words + at, word, mask=column < n)


@triton.jit
def _degree_kernel(
    words,  # [b, ceil(n / 32), n]
    counts,  # [b, n] int64, set bits of each row
    n,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)
    n_words = tl.cdiv(n, 32)
    total = tl.zeros([BLOCK], tl.int64)
    for q in range(n_words):
        v = tl.load(words + (image * n_words + q) * n + token, mask=token < n, other=0)
        v = v - ((v >> 1) & 0x55555555)
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        v = (v + (v >> 4)) & 0x0F0F0F0F
        total += ((v * 0x01010101) >> 24) & 0xFF
    tl.store(counts + image * n + token, total, mask=token < n)


@triton.jit
def _bits_matvec_kernel(
    words,  # [b, ceil(n / 32), n]
    x,  # [b, width, n] float64
    out,  # [b, width, n] float64, B x
    n,
    width,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * 4
    image = tl.program_id(2).to(tl.int64)
    n_words = tl.cdiv(n, 32)
    words += image * n_words * n
    x += (image * width + column) * n
    out += (image * width + column) * n
    lane = tl.arange(0, 32)
    sum0 = tl.zeros([ROWS, 32], tl.float64)
    sum1 = tl.zeros([ROWS, 32], tl.float64)
    sum2 = tl.zeros([ROWS, 32], tl.float64)
    sum3 = tl.zeros([ROWS, 32], tl.float64)
    for q in range(n_words):
        word = tl.load(words + q * n + row, mask=row < n, other=0)
        bit = ((word[:, None] >> lane[None, :]) & 1) != 0
        at = q * 32 + lane
        inside = at < n
        x0 = tl.load(x + at, mask=inside, other=0.0)
        x1 = tl.load(x + n + at, mask=inside & (column + 1 < width), other=0.0)
        x2 = tl.load(x + 2 * n + at, mask=inside & (column + 2 < width), other=0.0)
        x3 = tl.load(x + 3 * n + at, mask=inside & (column + 3 < width), other=0.0)
        sum0 += tl.where(bit, x0[None, :], 0.0)
        sum1 += tl.where(bit, x1[None, :], 0.0)
        sum2 += tl.where(bit, x2[None, :], 0.0)
        sum3 += tl.where(bit, x3[None, :], 0.0)
    tl.store(out + row, tl.sum(sum0, 1), mask=row < n)
    tl.store(out + n + row, tl.sum(sum1, 1), mask=(row < n) & (column + 1 < width))
    tl.store(out + 2 * n + row, tl.sum(sum2, 1), mask=(row < n) & (column + 2 < width))
    tl.store(out + 3 * n + row, tl.sum(sum3, 1), mask=(row < n) & (column + 3 < width))


@triton.jit
def _dense_matvec_kernel(
    affinity,  # [b, n, n], any strides; the upper triangle is read
    x,  # [b, width, n] float64
    out,  # [b, width, n] float64, A x
    n,
    width,
    stride_b,
    stride_row,
    stride_column,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * 4
    image = tl.program_id(2).to(tl.int64)
    affinity += image * stride_b
    x += (image * width + column) * n
    out += (image * width + column) * n
    sum0 = tl.zeros([ROWS, CHUNK], tl.float64)
    sum1 = tl.zeros([ROWS, CHUNK], tl.float64)
    sum2 = tl.zeros([ROWS, CHUNK], tl.float64)
    sum3 = tl.zeros([ROWS, CHUNK], tl.float64)
    for start in range(0, n, CHUNK):
        at = start + tl.arange(0, CHUNK).to(tl.int64)
        inside = at < n
        low_index = tl.minimum(row[:, None], at[None, :])
        high_index = tl.maximum(row[:, None], at[None, :])
        weight = tl.load(
            affinity + low_index * stride_row + high_index * stride_column,
            mask=(row < n)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float64)
        x0 = tl.load(x + at, mask=inside, other=0.0)
        x1 = tl.load(x + n + at, mask=inside & (column + 1 < width), other=0.0)
        x2 = tl.load(x + 2 * n + at, mask=inside & (column + 2 < width), other=0.0)
        x3 = tl.load(x + 3 * n + at, mask=inside & (column + 3 < width), other=0.0)
        sum0 += weight * x0[None, :]
        sum1 += weight * x1[None, :]
        sum2 += weight * x2[None, :]
        sum3 += weight * x3[None, :]
    tl.store(out + row, tl.sum(sum0, 1), mask=row < n)
    tl.store(out + n + row, tl.sum(sum1, 1), mask=(row < n) & (column + 1 < width))
    tl.store(out + 2 * n + row, tl.sum(sum2, 1), mask=(row < n) & (column + 2 < width))
    tl.store(out + 3 * n + row, tl.sum(sum3, 1), mask=(row < n) & (column + 3 < width))


def dense_pack(affinity: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """`[b, ceil(n / 32), n]` bits set where affinity `[b, n, n]` is `high` `[b]`."""
    b, n, _ = affinity.shape
    n_words = triton.cdiv(n, _WORD)
    words = affinity.new_empty((b, n_words, n), dtype=torch.int32)
    _dense_pack_kernel[(triton.cdiv(n, _ROWS), n_words, b)](
        affinity, high, words, n, *affinity.stride(), BLOCK=_ROWS, enable_fp_fusion=False
    )
    return words


def popcount(words: torch.Tensor) -> torch.Tensor:
    """Set bits of each row, `[b, n]` int64."""
    b, _, n = words.shape
    counts = words.new_empty((b, n), dtype=torch.int64)
    _degree_kernel[(triton.cdiv(n, _ROWS), b)](
        words, counts, n, BLOCK=_ROWS, enable_fp_fusion=False
    )
    return counts


def bits_matvec(words: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """B x for x `[b, width, n]` float64, contiguous."""
    b, width, n = x.shape
    out = torch.empty_like(x)
    _bits_matvec_kernel[(triton.cdiv(n, _ROWS), triton.cdiv(width, _COLUMNS), b)](
        words, x, out, n, width, ROWS=_ROWS, num_warps=8, enable_fp_fusion=False
    )
    return out


def dense_matvec(affinity: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A x for x `[b, width, n]` float64, contiguous, sums in float64."""
    b, width, n = x.shape
    out = torch.empty_like(x)
    _dense_matvec_kernel[(triton.cdiv(n, _ROWS), triton.cdiv(width, _COLUMNS), b)](
        affinity,
        x,
        out,
        n,
        width,
        *affinity.stride(),
        ROWS=_ROWS,
        CHUNK=32,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out
