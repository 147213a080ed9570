"""InfoNCE on a tile of products: log sums of rows and columns, then G."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from foveate.ops.pairwise_loss.log_sums import LogSums
from foveate.ops.pairwise_loss.triton_math import expm1, exponential
from foveate.ops.pairwise_loss.triton_pairs import DevicePairs, lanes

_ROWS = 4  # rows of a program
_POSITIVES = 128  # rows of a program that looks at their positives alone
_COLUMNS = (64, 16)  # columns of a program, rows it has in its registers


@triton.jit
def _info_nce_lse_kernel(
    dot,  # [own, others] products, any strides
    scale,  # []
    positive,  # [own] where among all others the positive is
    own_ids,  # [own] int64
    other_ids,  # [others]
    maximum,  # [own] float64
    total,  # [own] float64, sum of e^(z - maximum)
    at_positive,  # [own] float64, z of the positive
    n_own,
    n_others,
    first_other,
    own_stride,
    other_stride,
    IGNORE: tl.constexpr,
    ROWWISE: tl.constexpr,  # at_positive is written
    OWN: tl.constexpr,
    OTHERS: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * OWN + tl.arange(0, OWN)
    in_own = own < n_own
    s = tl.load(scale)
    place = tl.load(positive + own, mask=in_own, other=-1) - first_other
    has = in_own & (place >= 0) & (place < n_others)
    z_positive = s * tl.load(dot + own * own_stride + place * other_stride, mask=has, other=0.0)
    best = tl.full([OWN, OTHERS], float("-inf"), s.dtype)
    if IGNORE:
        own_id = tl.load(own_ids + own, mask=in_own, other=-1)
    for first in range(0, n_others, OTHERS):
        other = first + tl.arange(0, OTHERS).to(tl.int64)
        keep = in_own[:, None] & (other < n_others)[None, :]
        at = dot + own[:, None] * own_stride + other[None, :] * other_stride
        d = tl.load(at, mask=keep, other=0.0)
        keep = keep & (other[None, :] != place[:, None])
        if IGNORE:
            ids = tl.load(other_ids + other, mask=other < n_others, other=-1)
            keep = keep & ((ids[None, :] != own_id[:, None]) | (own_id == -1)[:, None])
        best = tl.maximum(best, tl.where(keep, s * d, float("-inf")))
    high = tl.maximum(tl.max(best, 1), tl.where(has, z_positive, float("-inf")))
    origin = tl.where(high == float("-inf"), 0.0, high)
    sums = tl.zeros([OWN, OTHERS], s.dtype)
    for first in range(0, n_others, OTHERS):
        other = first + tl.arange(0, OTHERS).to(tl.int64)
        keep = in_own[:, None] & (other < n_others)[None, :]
        at = dot + own[:, None] * own_stride + other[None, :] * other_stride
        d = tl.load(at, mask=keep, other=0.0)
        keep = keep & (other[None, :] != place[:, None])
        if IGNORE:
            ids = tl.load(other_ids + other, mask=other < n_others, other=-1)
            keep = keep & ((ids[None, :] != own_id[:, None]) | (own_id == -1)[:, None])
        e = exponential(tl.fma(d, s, -origin[:, None]))
        sums += tl.where(keep, e, 0.0)
    # The positive apart: beside it a small rest keeps its digits.
    own_sum = tl.sum(sums, 1).to(tl.float64)
    own_high = high.to(tl.float64)
    own_sum += tl.where(has, tl.exp(z_positive.to(tl.float64) - origin.to(tl.float64)), 0.0)
    before = tl.load(maximum + own, mask=in_own, other=float("-inf"))
    sum_before = tl.load(total + own, mask=in_own, other=0.0)
    top = tl.maximum(before, own_high)
    apart = before - own_high
    smaller = tl.exp(-tl.abs(apart))
    merged = tl.where(sum_before == 0.0, 0.0, sum_before * tl.where(apart < 0.0, smaller, 1.0))
    merged += tl.where(own_sum == 0.0, 0.0, own_sum * tl.where(apart < 0.0, 1.0, smaller))
    tl.store(maximum + own, top, mask=in_own)
    tl.store(total + own, merged, mask=in_own)
    if ROWWISE:
        tl.store(at_positive + own, z_positive.to(tl.float64), mask=has)


@triton.jit
def _info_nce_positive_kernel(
    dot,  # [rows, columns] products
    scale,  # []
    positive,  # [rows] column of the positive among all
    row_state,  # [rows, 2] log of the sum of e^z, as a number and what it lost
    row_factor,  # [rows]
    col_state,  # [columns, 2]
    col_factor,  # [columns]
    out,  # [rows] g at the positive
    rows,
    columns,
    col0,
    BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = tl.load(positive + row, mask=row < rows, other=-1) - col0
    has = (row < rows) & (place >= 0) & (place < columns)
    s = tl.load(scale)
    z = (s * tl.load(dot + row * columns + place, mask=has, other=0.0)).to(tl.float64)
    high = tl.load(row_state + 2 * row, mask=has, other=0.0).to(tl.float64)
    low = tl.load(row_state + 2 * row + 1, mask=has, other=0.0).to(tl.float64)
    factor = tl.load(row_factor + row, mask=has, other=0.0).to(tl.float64)
    g = factor * expm1((z - high) - low)
    if BY_COLUMN:
        high = tl.load(col_state + 2 * place, mask=has, other=0.0).to(tl.float64)
        low = tl.load(col_state + 2 * place + 1, mask=has, other=0.0).to(tl.float64)
        factor = tl.load(col_factor + place, mask=has, other=0.0).to(tl.float64)
        g += factor * expm1((z - high) - low)
    tl.store(out + row, g.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _info_nce_grad_kernel(
    dot,  # [rows, columns] products
    g,  # [rows, columns] dl/dz times lift; may be dot
    scale,  # []
    lift,  # []
    positive,  # [rows] column of the positive among all
    g_positive,  # [rows]
    row_ids,  # [rows] int64
    col_ids,  # [columns]
    row_state,  # [rows, 2]
    row_factor,  # [rows]
    col_state,  # [columns, 2]
    col_factor,  # [columns]
    row_gdot,  # [rows] float64
    rows,
    columns,
    col0,
    IGNORE: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    s = tl.load(scale)
    place = tl.load(positive + row, mask=in_rows, other=-1) - col0
    g_place = tl.load(g_positive + row, mask=in_rows, other=0.0)
    row_high = tl.load(row_state + 2 * row, mask=in_rows, other=0.0)
    row_low = tl.load(row_state + 2 * row + 1, mask=in_rows, other=0.0)
    by_row = tl.load(row_factor + row, mask=in_rows, other=0.0)
    if IGNORE:
        row_id = tl.load(row_ids + row, mask=in_rows, other=-1)
    moments = tl.zeros([ROWS, COLUMNS], s.dtype)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS).to(tl.int64)
        in_columns = column < columns
        inside = in_rows[:, None] & in_columns[None, :]
        at = row[:, None] * columns + column[None, :]
        d = tl.load(dot + at, mask=inside, other=0.0)
        u = tl.fma(d, s, -row_high[:, None]) - row_low[:, None]
        slope = by_row[:, None] * exponential(u)
        if BY_COLUMN:
            high = tl.load(col_state + 2 * column, mask=in_columns, other=0.0)
            low = tl.load(col_state + 2 * column + 1, mask=in_columns, other=0.0)
            factor = tl.load(col_factor + column, mask=in_columns, other=0.0)
            u = tl.fma(d, s, -high[None, :]) - low[None, :]
            slope += factor[None, :] * exponential(u)
        if IGNORE:
            ids = tl.load(col_ids + column, mask=in_columns, other=-1)
            slope = tl.where(
                (ids[None, :] == row_id[:, None]) & (row_id != -1)[:, None], 0.0, slope
            )
        slope = tl.where(column[None, :] == place[:, None], g_place[:, None], slope)
        moments += tl.where(inside, slope * d, 0.0)
        if g.dtype.element_ty == tl.float16:
            slope = slope * tl.load(lift)
        tl.store(g + at, slope.to(g.dtype.element_ty), mask=inside)
    total = tl.load(row_gdot + row, mask=in_rows, other=0.0) + tl.sum(moments, 1).to(tl.float64)
    tl.store(row_gdot + row, total, mask=in_rows)


class DeviceLogSums(LogSums):
    """Log sums that the Triton kernel collects."""

    def add(
        self, tile: torch.Tensor, r: int, k: int, scale: torch.Tensor, pairs: DevicePairs
    ) -> None:
        """Merges one tile of products."""
        rows, columns = tile.shape
        x_ids, y_ids = pairs.ignore_x, pairs.ignore_y
        ids = [None, None] if x_ids is None or y_ids is None else [x_ids[r:], y_ids[k:]]
        _info_nce_lse_kernel[(triton.cdiv(rows, _ROWS),)](
            tile,
            scale,
            pairs.a[r:],
            *ids,
            self.row_max[r:],
            self.row_sum[r:],
            self.positive[r:],
            rows,
            columns,
            k,
            *tile.stride(),
            IGNORE=x_ids is not None,
            ROWWISE=True,
            OWN=_ROWS,
            OTHERS=lanes(columns),
            num_warps=4,
            enable_fp_fusion=False,
        )
        if not self.symmetric:
            return
        assert pairs.b is not None
        _info_nce_lse_kernel[(triton.cdiv(columns, _COLUMNS[0]),)](
            tile,
            scale,
            pairs.b[k:],
            *reversed(ids),
            self.col_max[k:],
            self.col_sum[k:],
            None,
            columns,
            rows,
            r,
            *reversed(tile.stride()),
            IGNORE=x_ids is not None,
            ROWWISE=False,
            OWN=_COLUMNS[0],
            OTHERS=_COLUMNS[1],
            num_warps=4,
            enable_fp_fusion=False,
        )


def info_nce_gradient(
    tile: torch.Tensor,
    slope: torch.Tensor,
    r: int,
    k: int,
    scale: torch.Tensor,
    lift: torch.Tensor,
    pairs: DevicePairs,
    states: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[torch.Tensor, torch.Tensor | None],
    row_gdot: torch.Tensor,
) -> None:
    """Leaves g times lift in `slope`, and adds the rows' sums of g dot."""
    rows, columns = tile.shape
    by_column = factors[1] is not None
    sides = (
        states[0][r:],
        factors[0][r:],
        states[1][k:] if by_column else None,
        factors[1][k:] if factors[1] is not None else None,
    )
    g_positive = tile.new_empty(rows)
    _info_nce_positive_kernel[(triton.cdiv(rows, _POSITIVES),)](
        tile,
        scale,
        pairs.a[r:],
        *sides,
        g_positive,
        rows,
        columns,
        k,
        BY_COLUMN=by_column,
        ROWS=_POSITIVES,
        enable_fp_fusion=False,
    )
    x_ids, y_ids = pairs.ignore_x, pairs.ignore_y
    ids = (None, None) if x_ids is None or y_ids is None else (x_ids[r:], y_ids[k:])
    _info_nce_grad_kernel[(triton.cdiv(rows, _ROWS),)](
        tile,
        slope,
        scale,
        lift,
        pairs.a[r:],
        g_positive,
        *ids,
        *sides,
        row_gdot[r:],
        rows,
        columns,
        k,
        IGNORE=x_ids is not None,
        BY_COLUMN=by_column,
        ROWS=_ROWS,
        COLUMNS=lanes(columns),
        num_warps=4,
        enable_fp_fusion=False,
    )
