"""The sigmoid loss of a tile of products: one elementwise pass that sums rows and leaves G."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.ops.pairwise_loss.pairs import Pairs
from foveate.ops.pairwise_loss.triton_math import (
    GENERAL,
    PLAIN,
    SQUARE,
    float64_pattern,
    logistic,
    number,
)
from foveate.ops.pairwise_loss.triton_pairs import TARGETS, DevicePairs, lanes

_ROWS = 4  # rows of a program


@triton.jit
def _hard_terms(z, match, positive, negative, gamma, FOCAL: tl.constexpr):
    """Loss and slope of pairs that are either positive or negative."""
    value, slope = logistic(tl.where(match, -z, z), gamma, FOCAL)
    weight = tl.where(match, positive, negative)
    loss = tl.where(weight != 0.0, weight * value, 0.0)
    return loss, tl.where(match, -weight, weight) * slope


@triton.jit
def _soft_terms(z, positive, negative, gamma, FOCAL: tl.constexpr):
    """Loss and slope of pairs with a weight as a positive and one as a negative."""
    up, up_slope = logistic(-z, gamma, FOCAL)
    down, down_slope = logistic(z, gamma, FOCAL)
    loss = tl.where(positive != 0.0, positive * up, 0.0)
    loss += tl.where(negative != 0.0, negative * down, 0.0)
    return loss, negative * down_slope - positive * up_slope


@triton.jit
def _sigmoid_loss_tile_kernel(
    dot,  # [rows, columns] products
    g,  # [rows, columns] dl/dz times lift; may be dot
    scale,  # []
    bias,  # []
    lift,  # []
    a,  # [rows] column of the positive or id; or targets [rows, columns]
    b,  # [columns] ids
    ignore_x,  # [rows]
    ignore_y,  # [columns]
    row_share,  # [rows]
    col_share,  # [columns]
    row_weight,  # [rows]
    col_weight,  # [columns]
    row_loss,  # [rows] float64
    row_g,  # [rows] float64
    row_gdot,  # [rows] float64
    rows,
    columns,
    col0,
    target_row_stride,
    target_column_stride,
    pos_bits,  # float64 patterns
    neg_bits,
    gamma_bits,
    FORM: tl.constexpr,
    GENERAL_PAIRS: tl.constexpr,
    FOCAL: tl.constexpr,
    GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    s = tl.load(scale)
    shift = tl.load(bias)
    positive_weight = number(pos_bits, s)
    negative_weight = number(neg_bits, s)
    gamma = number(gamma_bits, s)
    if FORM != 2:
        own = tl.load(a + row, mask=in_rows, other=-1)
    if GENERAL_PAIRS:
        own_share = tl.load(row_share + row, mask=in_rows, other=0.0)
        own_weight = tl.load(row_weight + row, mask=in_rows, other=0.0)
        own_ignored = tl.load(ignore_x + row, mask=in_rows, other=-1)
    losses = tl.zeros([ROWS, COLUMNS], s.dtype)
    slopes = tl.zeros([ROWS, COLUMNS], s.dtype)
    moments = tl.zeros([ROWS, COLUMNS], s.dtype)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS).to(tl.int64)
        in_columns = column < columns
        inside = in_rows[:, None] & in_columns[None, :]
        at = row[:, None] * columns + column[None, :]
        d = tl.load(dot + at, mask=inside, other=0.0)
        z = tl.fma(d, s, shift)
        positive = tl.where(inside, positive_weight, 0.0)
        negative = tl.where(inside, negative_weight, 0.0)
        if GENERAL_PAIRS:
            weight = (
                own_weight[:, None]
                * tl.load(col_weight + column, mask=in_columns, other=0.0)[None, :]
            )
            share = tl.load(col_share + column, mask=in_columns, other=0.0)
            positive = positive * (own_share[:, None] + share[None, :]) * weight
            negative = negative * weight
            ids = tl.load(ignore_y + column, mask=in_columns, other=-1)
            ignored = (ids[None, :] == own_ignored[:, None]) & (own_ignored != -1)[:, None]
        if FORM == 2:
            target = tl.load(
                a + row[:, None] * target_row_stride + column[None, :] * target_column_stride,
                mask=inside,
                other=0.0,
            ).to(s.dtype)
            if GENERAL_PAIRS:
                negative = tl.where(ignored & (target == 0.0), 0.0, negative)
            loss, slope = _soft_terms(z, positive * target, negative * (1.0 - target), gamma, FOCAL)
        else:
            if FORM == 1:
                id_y = tl.load(b + column, mask=in_columns, other=-1)
                match = (id_y[None, :] == own[:, None]) & (own != -1)[:, None]
            else:
                match = (column + col0)[None, :] == own[:, None]
            if GENERAL_PAIRS:
                negative = tl.where(ignored, 0.0, negative)
            loss, slope = _hard_terms(z, match, positive, negative, gamma, FOCAL)
        losses += loss
        if GRAD:
            slopes += slope
            moments = tl.fma(slope, d, moments)
            if g.dtype.element_ty == tl.float16:
                slope = slope * tl.load(lift)
            tl.store(g + at, slope.to(g.dtype.element_ty), mask=inside)
    total = tl.load(row_loss + row, mask=in_rows, other=0.0) + tl.sum(losses, 1).to(tl.float64)
    tl.store(row_loss + row, total, mask=in_rows)
    if GRAD:
        total = tl.load(row_g + row, mask=in_rows, other=0.0) + tl.sum(slopes, 1).to(tl.float64)
        tl.store(row_g + row, total, mask=in_rows)
        total = tl.load(row_gdot + row, mask=in_rows, other=0.0) + tl.sum(moments, 1).to(tl.float64)
        tl.store(row_gdot + row, total, mask=in_rows)


def lift_for(dtype: torch.dtype, bound: torch.Tensor) -> torch.Tensor:
    """The power of two that G of at most `bound` takes in float16, whose numbers end at 6e-8."""
    if dtype != torch.float16:
        return torch.ones_like(bound)
    power = torch.exp2(torch.floor(15 - torch.log2(bound)).clamp(-60, 60))
    return torch.where(power.isfinite(), power, torch.ones_like(power))


def slope_bound(pairs: Pairs, like: torch.Tensor) -> torch.Tensor:
    """What no |g| exceeds, [] on the device."""
    bound = like.new_full((), max(pairs.pos_weight, pairs.neg_weight) * (1 + pairs.focal_gamma))
    for weight in (pairs.row_weight, pairs.col_weight):
        if weight is not None:
            bound = bound * weight.abs().amax()
    return bound


def sigmoid_loss_tile(
    tile: torch.Tensor,
    slope: torch.Tensor,
    r: int,
    k: int,
    scalars: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    wire: DevicePairs,
    pairs: Pairs,
    grad: bool,
    sums: torch.Tensor,
) -> None:
    """Adds the tile's sums to `sums` [3, n] and, with `grad`, leaves g times lift in `slope`."""
    rows, columns = tile.shape
    a, strides = wire.a, (0, 0)
    if wire.form == TARGETS:
        a = wire.targets(tile, r, k)
        strides = a.stride()
    else:
        a = a[r:]

    def part(vector: torch.Tensor | None, first: int) -> torch.Tensor | None:
        return None if vector is None else vector[first:]

    gamma = pairs.focal_gamma
    _sigmoid_loss_tile_kernel[(triton.cdiv(rows, _ROWS),)](
        tile,
        slope,
        *scalars,
        a,
        None if wire.form == TARGETS else part(wire.b, k),
        part(wire.ignore_x, r),
        part(wire.ignore_y, k),
        part(wire.row_share, r),
        part(wire.col_share, k),
        part(wire.row_weight, r),
        part(wire.col_weight, k),
        sums[0, r:],
        sums[1, r:],
        sums[2, r:],
        rows,
        columns,
        k,
        *strides,
        float64_pattern(pairs.pos_weight),
        float64_pattern(pairs.neg_weight),
        float64_pattern(gamma),
        FORM=wire.form,
        GENERAL_PAIRS=wire.general,
        FOCAL=PLAIN if gamma == 0 else SQUARE if gamma == 2 else GENERAL,
        GRAD=grad,
        ROWS=_ROWS,
        COLUMNS=lanes(columns),
        num_warps=4,
        enable_fp_fusion=False,
    )
