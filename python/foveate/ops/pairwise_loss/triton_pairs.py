"""Pairs as the Triton kernels take them, and the statistics of their logits, on a CUDA device."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from foveate.ops.pairwise_loss.pairs import Pairs, matches, shares
from foveate.ops.pairwise_loss.statistics import Statistics

INDEX, IDS, TARGETS = 0, 1, 2  # how a kernel knows its positives
_ENTRIES = 128


def lanes(columns: int) -> int:
    """Columns that a program has in its registers; of narrow tiles no wider than they need."""
    return 256 if columns > 128 else 64


@triton.jit
def _sparse_targets_kernel(
    starts,  # [rows + 1] of the tile's rows
    at,  # [nnz] columns
    values,  # [nnz]
    out,  # [rows, columns], zeros
    columns,
    col0,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    for first in range(begin, end, ENTRIES):
        entry = first + tl.arange(0, ENTRIES)
        column = tl.load(at + entry, mask=entry < end, other=-1) - col0
        inside = (entry < end) & (column >= 0) & (column < columns)
        value = tl.load(values + entry, mask=inside, other=0.0)
        tl.store(out + row * columns + column, value, mask=inside)


class DevicePairs(NamedTuple):
    """`Pairs` in the dtypes of the kernels.

    Attributes:
        form: `INDEX`, `IDS` or `TARGETS`.
        a: column of each row's positive or ids `[n]` int64, -1 for none; targets; row starts.
        b: ids `[N]`, or columns `[nnz]`, int64.
        c: targets `[nnz]` of sparse pairs.
        ignore_x: `[n]` int64, or None.
        ignore_y: `[N]`.
        general: whether rows and columns have weights, shares or ignored pairs.
        row_share: `[n]`, likewise the next three; None unless `general`.
    """

    form: int
    a: torch.Tensor
    b: torch.Tensor | None
    c: torch.Tensor | None
    ignore_x: torch.Tensor | None
    ignore_y: torch.Tensor | None
    general: bool
    row_share: torch.Tensor | None
    col_share: torch.Tensor | None
    row_weight: torch.Tensor | None
    col_weight: torch.Tensor | None

    def targets(self, like: torch.Tensor, r: int, k: int) -> torch.Tensor:
        """The targets of a tile, any strides."""
        rows, columns = like.shape
        if self.c is None:
            part = self.a[r : r + rows, k : k + columns]
            return part.view(torch.uint8) if part.dtype == torch.bool else part
        out = torch.zeros_like(like)
        _sparse_targets_kernel[(rows,)](
            self.a[r:], self.b, self.c, out, columns, k, ENTRIES=_ENTRIES, enable_fp_fusion=False
        )
        return out


def _positive_index(pairs: Pairs, x: torch.Tensor) -> torch.Tensor:
    n = x.shape[0]
    if pairs.form == "diagonal":
        return torch.arange(n, device=x.device) + pairs.diagonal
    if pairs.form == "index" and pairs.a is not None:
        return pairs.a.long().contiguous()
    return x.new_full((n,), -1, dtype=torch.int64)


def device_pairs(pairs: Pairs, x: torch.Tensor, columns: int, dtype: torch.dtype) -> DevicePairs:
    n = x.shape[0]
    form, b, c = INDEX, None, None
    if pairs.form == "ids" and pairs.a is not None and pairs.b is not None:
        form, a, b = IDS, pairs.a.long().contiguous(), pairs.b.long().contiguous()
    elif pairs.form == "dense" and pairs.a is not None:
        form, a = TARGETS, pairs.a
    elif pairs.form == "sparse" and pairs.a is not None and pairs.b is not None:
        assert pairs.c is not None
        form, a, b = TARGETS, pairs.a.contiguous(), pairs.b.long().contiguous()
        c = pairs.c.to(dtype).contiguous()
    else:
        a = _positive_index(pairs, x)
    row_share, col_share = shares(pairs, dtype)
    ignore = None if pairs.ignore_x is None else pairs.ignore_x.long().contiguous()
    ignore_y = None if pairs.ignore_y is None else pairs.ignore_y.long().contiguous()
    vectors = row_share, col_share, pairs.row_weight, pairs.col_weight
    general = ignore is not None or any(vector is not None for vector in vectors)

    def given(vector: torch.Tensor | None, size: int, default: float) -> torch.Tensor | None:
        if not general:
            return None
        if vector is None:
            return x.new_full((size,), default, dtype=dtype)
        return vector.to(dtype).contiguous()

    return DevicePairs(
        form,
        a,
        b,
        c,
        ignore if ignore is not None or not general else x.new_full((n,), -1, dtype=torch.int64),
        ignore_y
        if ignore_y is not None or not general
        else x.new_full((columns,), -1, dtype=torch.int64),
        general,
        given(row_share, n, 1.0),
        given(col_share, columns, 0.0),
        given(pairs.row_weight, n, 1.0),
        given(pairs.col_weight, columns, 1.0),
    )


class DeviceStatistics(Statistics):
    """Statistics by torch's own passes over a tile: they are asked for now and then."""

    def add(
        self,
        tile: torch.Tensor,
        r: int,
        k: int,
        scale: torch.Tensor,
        bias: torch.Tensor,
        pairs: DevicePairs,
    ) -> None:
        """One tile of products, before anything else is done to it."""
        rows, columns = tile.shape
        by_row, by_col = slice(r, r + rows), slice(k, k + columns)
        z = torch.addcmul(bias, tile, scale)
        if pairs.form == INDEX:
            column = torch.arange(k, k + columns, device=tile.device)
            target = (pairs.a[by_row, None] == column).to(tile.dtype)
        elif pairs.form == IDS:
            assert pairs.b is not None
            target = matches(pairs.a[by_row], pairs.b[by_col]).to(tile.dtype)
        else:
            target = pairs.targets(tile, r, k).to(tile.dtype)
        positive, negative = target >= 0.5, target < 0.5
        if pairs.ignore_x is not None and pairs.ignore_y is not None:
            ignored = matches(pairs.ignore_x[by_row], pairs.ignore_y[by_col]) & ~(target > 0)
            negative = negative & ~ignored
        infinity = float("inf")
        for kind, mask in enumerate((negative, positive)):
            self.count[kind, by_row] += mask.sum(1)
            self.sum[kind, by_row] += z.double().masked_fill(~mask, 0).sum(1)
            low = z.masked_fill(~mask, infinity)
            high = z.masked_fill(~mask, -infinity)
            self.low[kind, by_row] = torch.minimum(self.low[kind, by_row], low.amin(1))
            self.high[kind, by_row] = torch.maximum(self.high[kind, by_row], high.amax(1))
            self.col_high[kind, by_col] = torch.maximum(self.col_high[kind, by_col], high.amax(0))
        self.col_count[by_col] += positive.sum(0)
