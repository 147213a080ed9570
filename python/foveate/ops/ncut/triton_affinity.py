"""Triton kernels that make bit-packed or dense affinities from features, and their launches.

Bits are `[b, ceil(n / 32), n]` int32: bit t of word (q, i) is B[32 q + t, i]; B is symmetric.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl

_TILE = 64  # tokens of a tile's side
_CHUNK = 32  # channels of a product's step
_WORD = 32  # bits of a word


class Bits(NamedTuple):
    """Packed affinities of b images, padded to n tokens."""

    words: torch.Tensor  # [b, ceil(n / 32), n] int32
    live: torch.Tensor  # [b, n] bool: a token whose features are not zero and not masked
    tokens: torch.Tensor  # [b] int64


@triton.jit
def _unit_kernel(
    features,  # [b, n, c], any strides
    masked,  # [b, n] uint8
    tokens,  # [b]
    unit,  # [b, n, c], contiguous
    live,  # [b, n] uint8
    n,
    c,
    stride_b,
    stride_n,
    stride_c,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    image = tl.program_id(1).to(tl.int64)
    features += image * stride_b + token * stride_n
    unit += (image * n + token) * c
    keep = token < tl.load(tokens + image)
    if HAS_MASK:
        keep = keep & (tl.load(masked + image * n + token) == 0)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float64)
    for start in range(0, c, BLOCK):
        at = start + lane
        value = tl.load(features + at * stride_c, mask=(at < c) & keep, other=0.0)
        largest = tl.maximum(largest, tl.abs(value.to(tl.float64)))
    # Scaled by a power of two before it is squared, a norm of 1e-300 or 1e300 is exact too.
    scale = tl.max(largest, 0)
    exponent = tl.cast(scale, tl.int64, bitcast=True) & 0x7FF0000000000000
    safe = tl.maximum(tl.cast(exponent, tl.float64, bitcast=True), 1e-300)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in range(0, c, BLOCK):
        at = start + lane
        value = tl.load(features + at * stride_c, mask=(at < c) & keep, other=0.0)
        ratio = value.to(tl.float64) / safe
        squares += ratio * ratio
    length = tl.maximum(tl.sqrt(tl.sum(squares, 0)), 1e-12 / safe)
    for start in range(0, c, BLOCK):
        at = start + lane
        value = tl.load(features + at * stride_c, mask=(at < c) & keep, other=0.0)
        direction = value.to(tl.float64) / safe / length
        tl.store(unit + at, direction.to(unit.dtype.element_ty), mask=at < c)
    tl.store(live + image * n + token, (scale > 0).to(tl.uint8))


@triton.jit
def _affinity_pack_kernel(
    unit,  # [b, n, c] float32, contiguous
    live,  # [b, n] uint8
    tokens,  # [b]
    words,  # [b, ceil(n / 32), n]
    doubt,  # [b, ceil(n / 32), n], upper triangle only
    n,
    c,
    tau,
    error,  # bound on the error of a product
    ZERO_BIT: tl.constexpr,  # bit of a pair with a zero token
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0)
    second = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    if second >= first:
        row = first.to(tl.int64) * TILE + tl.arange(0, TILE)
        column = second.to(tl.int64) * TILE + tl.arange(0, TILE)
        unit += image * n * c
        product = tl.zeros([TILE, TILE], tl.float32)
        for start in range(0, c, CHUNK):
            at = start + tl.arange(0, CHUNK).to(tl.int64)
            a = tl.load(
                unit + row[:, None] * c + at[None, :],
                mask=(row < n)[:, None] & (at < c)[None, :],
                other=0.0,
            )
            b = tl.load(
                unit + column[None, :] * c + at[:, None],
                mask=(column < n)[None, :] & (at < c)[:, None],
                other=0.0,
            )
            product = tl.dot(a, b, product, input_precision=PRECISION)
        count = tl.load(tokens + image)
        row_live = tl.load(live + image * n + row, mask=row < n, other=0) != 0
        column_live = tl.load(live + image * n + column, mask=column < n, other=0) != 0
        both = row_live[:, None] & column_live[None, :]
        inside = (row < count)[:, None] & (column < count)[None, :]
        diagonal = row[:, None] == column[None, :]
        unsure = both & ~diagonal & (tl.abs(product - tau) <= error)
        bit = tl.where(both, (product > tau) & ~unsure | diagonal, ZERO_BIT) & inside
        groups: tl.constexpr = TILE // 32
        n_words = tl.cdiv(n, 32)
        words += image * n_words * n
        doubt += image * n_words * n
        shift = tl.arange(0, 32)
        group = first * groups + tl.arange(0, groups).to(tl.int64)
        target = group[:, None] * n + column[None, :]
        stored = (group < n_words)[:, None] & (column < n)[None, :]
        split = tl.reshape(bit.to(tl.int32), [groups, 32, TILE]) << shift[None, :, None]
        tl.store(words + target, tl.sum(split, 1), mask=stored)
        split = tl.reshape(unsure.to(tl.int32), [groups, 32, TILE]) << shift[None, :, None]
        tl.store(doubt + target, tl.sum(split, 1), mask=stored)
        if second > first:
            turned_group = second * groups + tl.arange(0, groups).to(tl.int64)
            turned = tl.reshape(bit.to(tl.int32), [TILE, groups, 32]) << shift[None, None, :]
            tl.store(
                words + turned_group[None, :] * n + row[:, None],
                tl.sum(turned, 2),
                mask=(turned_group < n_words)[None, :] & (row < n)[:, None],
            )


@triton.jit
def _exact_products(
    unit,  # of the image
    row,  # a token
    column,  # [32] tokens
    wanted,  # [32]
    c,
    BLOCK: tl.constexpr,
):
    """Products of one token with 32 others in float64, in one fixed order."""
    total = tl.zeros([32], tl.float64)
    for start in range(0, c, BLOCK):
        at = start + tl.arange(0, BLOCK).to(tl.int64)
        a = tl.load(unit + row * c + at, mask=at < c, other=0.0).to(tl.float64)
        b = tl.load(
            unit + column[:, None] * c + at[None, :],
            mask=wanted[:, None] & (at < c)[None, :],
            other=0.0,
        ).to(tl.float64)
        total += tl.sum(a[None, :] * b, 1)
    return total


@triton.jit
def _affinity_recheck_kernel(
    unit,  # [b, n, c] float32 or float64, contiguous
    live,  # [b, n] uint8
    tokens,  # [b]
    doubt,  # [b, ceil(n / 32), n]
    words,  # [b, ceil(n / 32), n]
    n,
    c,
    tau_bits,  # float64 pattern: a float argument would be rounded to float32
    ZERO_BIT: tl.constexpr,
    EVERY: tl.constexpr,  # whether all pairs are in doubt and words hold nothing yet
    BLOCK: tl.constexpr,
):
    second = tl.program_id(0).to(tl.int64)  # of the columns
    first = tl.program_id(1).to(tl.int64)  # of the rows
    image = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, 32)
    column = second * 32 + lane
    n_words = tl.cdiv(n, 32)
    plane = image * n_words * n
    here = plane + first * n + column
    mask = column < n
    unsure = tl.zeros([32], tl.int32)
    if second >= first:
        unsure = tl.full([32], -1, tl.int32)
        if not EVERY:
            unsure = tl.load(doubt + here, mask=mask, other=0)
    if tl.max((unsure != 0).to(tl.int32), 0) > 0:
        tau = tl.cast(tl.cast(tau_bits, tl.int64), tl.float64, bitcast=True).to(
            unit.dtype.element_ty
        )
        count = tl.load(tokens + image)
        column_live = tl.load(live + image * n + column, mask=mask, other=0) != 0
        word = tl.zeros([32], tl.int32)
        mirror = tl.zeros([32], tl.int32)
        for t in range(32):
            row = first * 32 + t
            asked = (((unsure >> t) & 1) != 0) & (column < count) & (row < count)
            if tl.max(asked.to(tl.int32), 0) > 0:
                row_live = tl.load(live + image * n + row) != 0
                both = column_live & row_live
                product = _exact_products(unit + image * n * c, row, column, asked & both, c, BLOCK)
                above = product.to(unit.dtype.element_ty) > tau
                bit = tl.where(both, above | (row == column), ZERO_BIT) & asked
                word |= bit.to(tl.int32) << t
                packed = tl.sum(bit.to(tl.int32) << lane, 0)
                mirror = tl.where(lane == t, packed, mirror)
        there = plane + second * n + first * 32 + lane
        there_mask = first * 32 + lane < n
        if not EVERY:
            word |= tl.load(words + here, mask=mask, other=0)
        tl.store(words + here, word, mask=mask)
        if second > first:
            if not EVERY:
                mirror |= tl.load(words + there, mask=there_mask, other=0)
            tl.store(words + there, mirror, mask=there_mask)


@triton.jit
def _affinity_weights_kernel(
    unit,  # [b, n, c] float32 or float64, contiguous
    tokens,  # [b]
    weights,  # [b, n, n], of unit's dtype
    n,
    c,
    tau_bits,
    eps_bits,
    BLOCK: tl.constexpr,
):
    second = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64)
    image = tl.program_id(2).to(tl.int64)
    if second >= first:
        tau = tl.cast(tl.cast(tau_bits, tl.int64), tl.float64, bitcast=True).to(
            unit.dtype.element_ty
        )
        eps = tl.cast(tl.cast(eps_bits, tl.int64), tl.float64, bitcast=True).to(
            unit.dtype.element_ty
        )
        column = second * 32 + tl.arange(0, 32)
        count = tl.load(tokens + image)
        plane = image * n * n
        for t in range(32):
            row = first * 32 + t
            stored = (column < n) & (row < n)
            inside = (column < count) & (row < count)
            product = _exact_products(
                unit + image * n * c, tl.minimum(row, n - 1), column, inside, c, BLOCK
            ).to(unit.dtype.element_ty)
            weight = tl.where(inside, tl.where(product < tau, eps, product), 0.0)
            tl.store(weights + plane + row * n + column, weight, mask=stored)
            if second > first:
                tl.store(weights + plane + column * n + row, weight, mask=stored)


def _pattern(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _channel_block(c: int) -> int:
    """Channels that a warp reads at once: with 64 of them the recheck spills on sm_90."""
    return max(16, min(32, triton.next_power_of_2(c)))


def unit_rows(
    features: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of length 1, `[b, n, c]` float32 (float64 for float64), and which are not zero."""
    b, n, c = features.shape
    wide = features.dtype == torch.float64
    unit = features.new_empty((b, n, c), dtype=torch.float64 if wide else torch.float32)
    live = features.new_empty((b, n), dtype=torch.uint8)
    _unit_kernel[(n, b)](
        features,
        live if mask is None else mask.contiguous().view(torch.uint8),
        tokens,
        unit,
        live,
        n,
        c,
        *features.stride(),
        HAS_MASK=mask is not None,
        BLOCK=max(16, min(1024, triton.next_power_of_2(c))),
        enable_fp_fusion=False,
    )
    return unit, live


def affinity_pack(
    features: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None, tau: float
) -> Bits:
    """The bits [cosine > tau] of every pair of tokens.

    A fast product with a proven error bound decides a pair unless it lies within the bound of tau;
    then a float64 product of the same unit rows does. float64 features take that product always.
    """
    b, n, c = features.shape
    unit, live = unit_rows(features, tokens, mask)
    n_words = triton.cdiv(n, _WORD)
    words = features.new_empty((b, n_words, n), dtype=torch.int32)
    every = unit.dtype == torch.float64
    doubt = words if every else torch.empty_like(words)
    if not every:
        side = triton.cdiv(n, _TILE)
        # Splitting into two tf32 parts loses 2^-21 of |a||b| <= 1; each of the c / 8 * 3 sums in
        # the tensor core at most 2^-23 of it.
        error = 2.0**-20 + 3 * triton.cdiv(c, 8) * 2.0**-23
        _affinity_pack_kernel[(side, side, b)](
            unit,
            live,
            tokens,
            words,
            doubt,
            n,
            c,
            tau,
            error,
            ZERO_BIT=tau < 0,
            PRECISION="tf32x3",
            TILE=_TILE,
            CHUNK=_CHUNK,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=False,
        )
    _affinity_recheck_kernel[(n_words, n_words, b)](
        unit,
        live,
        tokens,
        doubt,
        words,
        n,
        c,
        _pattern(tau),
        ZERO_BIT=tau < 0,
        EVERY=every,
        BLOCK=_channel_block(c),
        num_warps=1,
        enable_fp_fusion=False,
    )
    return Bits(words, live.view(torch.bool), tokens)


def affinity_weights(
    features: torch.Tensor, tokens: torch.Tensor, tau: float, eps: float
) -> torch.Tensor:
    """`[b, n, n]` cosines, eps where one is below tau, 0 at padding; in the unit rows' dtype."""
    b, n, c = features.shape
    unit, _ = unit_rows(features, tokens, None)
    weights = unit.new_empty((b, n, n))
    blocks = triton.cdiv(n, _WORD)
    _affinity_weights_kernel[(blocks, blocks, b)](
        unit,
        tokens,
        weights,
        n,
        c,
        _pattern(tau),
        _pattern(eps),
        BLOCK=_channel_block(c),
        enable_fp_fusion=False,
    )
    return weights
