"""What each pair of rows is: positive, negative or ignored, with which weight."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PairStats(NamedTuple):
    """Statistics of the logits z of a loss, detached scalars.

    A pair with target t >= 0.5 is positive, with t < 0.5 negative; an ignored pair is neither. Of
    no pairs the mean is nan, the minimum inf, the maximum -inf.

    Attributes:
        pos_count: positive pairs, int64.
        neg_count: negative pairs, int64.
        pos_mean: mean logit of the positives, unweighted, float32 as all that follow.
        pos_min: smallest logit of a positive.
        pos_max: largest logit of a positive.
        neg_mean: mean logit of the negatives.
        neg_min: smallest logit of a negative.
        neg_max: largest logit of a negative.
        row_top1: among rows that have a positive, the share whose largest logit (ignored pairs
            excluded) a positive attains; a tie is a hit.
        col_top1: the same for columns.
    """

    pos_count: torch.Tensor
    neg_count: torch.Tensor
    pos_mean: torch.Tensor
    pos_min: torch.Tensor
    pos_max: torch.Tensor
    neg_mean: torch.Tensor
    neg_min: torch.Tensor
    neg_max: torch.Tensor
    row_top1: torch.Tensor
    col_top1: torch.Tensor


class Pairs(NamedTuple):
    """The pairs of `n` rows and `N` columns, in the order in which they cross to the raw ops.

    Attributes:
        form: "none" (all negative), "diagonal", "index", "ids", "dense" or "sparse".
        diagonal: column of row 0's positive, for "diagonal".
        a: index `[n]`, ids of the rows `[n]`, targets `[n, N]`, or CSR row starts `[n + 1]`.
        b: ids of the columns `[N]`, or CSR columns `[nnz]`.
        c: CSR targets `[nnz]`.
        all_rows: ids of the rows of every process, where they decide a share; else None.
        ignore_x: ids `[n]` of the rows, pairs of equal id that are not positives are ignored.
        ignore_y: ids `[N]` of the columns.
        share: "each", "row" or "both", what a positive weighs.
        row_weight: `[n]`.
        col_weight: `[N]`.
        pos_weight: weight of every positive.
        neg_weight: weight of every negative.
        focal_gamma: focal exponent; 0 is the plain loss.
    """

    form: str
    diagonal: int
    a: torch.Tensor | None
    b: torch.Tensor | None
    c: torch.Tensor | None
    all_rows: torch.Tensor | None
    ignore_x: torch.Tensor | None
    ignore_y: torch.Tensor | None
    share: str
    row_weight: torch.Tensor | None
    col_weight: torch.Tensor | None
    pos_weight: float
    neg_weight: float
    focal_gamma: float


PAIRS_SCHEMA = (
    "str form, int diagonal, Tensor? a, Tensor? b, Tensor? c, Tensor? all_rows, "
    "Tensor? ignore_x, Tensor? ignore_y, str share, Tensor? row_weight, Tensor? col_weight, "
    "float pos_weight, float neg_weight, float focal_gamma"
)
N_PAIRS = len(Pairs._fields)


def matches(ids_x: torch.Tensor, ids_y: torch.Tensor) -> torch.Tensor:
    """`[n, N]` bool: equal ids, where -1 matches nothing."""
    return (ids_x[:, None] == ids_y[None, :]) & (ids_x[:, None] != -1)


def dense_targets(pairs: Pairs, n: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """The targets t `[n, columns]` in `like`'s dtype and on its device."""
    targets = like.new_zeros(n, columns)
    if pairs.form == "diagonal":
        targets.diagonal(pairs.diagonal).fill_(1)
    elif pairs.form == "index" and pairs.a is not None:
        index = pairs.a.long()
        targets.scatter_(1, index.clamp(min=0)[:, None], (index >= 0).to(like.dtype)[:, None])
    elif pairs.form == "ids" and pairs.a is not None and pairs.b is not None:
        targets = matches(pairs.a, pairs.b).to(like.dtype)
    elif pairs.form == "dense" and pairs.a is not None:
        targets = pairs.a.to(like.dtype)
    elif pairs.form == "sparse":
        assert pairs.a is not None
        assert pairs.b is not None
        assert pairs.c is not None
        rows = torch.repeat_interleave(pairs.a.diff())
        targets[rows, pairs.b.long()] = pairs.c.to(like.dtype)
    return targets


def dense_ignored(pairs: Pairs, targets: torch.Tensor) -> torch.Tensor | None:
    """`[n, N]` bool: equal ignore ids and no positive; None if nothing is ignored."""
    if pairs.ignore_x is None or pairs.ignore_y is None:
        return None
    return matches(pairs.ignore_x, pairs.ignore_y) & ~(targets > 0)


def occurrences(values: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """How often each id occurs among others, `values`' shape; -1 occurs nowhere. No host sync."""
    ordered = among.sort().values
    values = values.to(among.dtype).contiguous()
    count = torch.searchsorted(ordered, values, right=True) - torch.searchsorted(ordered, values)
    return torch.where(values == -1, torch.zeros_like(count), count)


def shares(pairs: Pairs, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weights of a positive by its row `[n]` and by its column `[N]`; the positive's is their sum.

    A row's or column's weight is finite also where it has no positive.
    """
    if pairs.share == "each" or pairs.a is None or pairs.b is None:
        return None, None
    row = occurrences(pairs.a, pairs.b).clamp(min=1).to(dtype).reciprocal()
    if pairs.share == "row":
        return row, None
    rows = pairs.a if pairs.all_rows is None else pairs.all_rows
    column = occurrences(pairs.b, rows).clamp(min=1).to(dtype).reciprocal()
    return row / 2, column / 2


def _first_bad(name: str, values: torch.Tensor, bad: torch.Tensor, contract: str) -> None:
    if bool(bad.any()):
        position = bad.nonzero()[0].tolist()
        where = position[0] if len(position) == 1 else tuple(position)
        value = values[tuple(position)].item()
        raise ValueError(f"{name} must {contract}, got {value} at position {where}")


def check_values(pairs: Pairs, columns: int, *, need_positive: bool = False) -> None:
    """ValueError at the first index, target or weight outside its range.

    Args:
        pairs: what to check.
        columns: N, the columns of all processes.
        need_positive: whether -1, no positive, is an error too.
    """
    if pairs.form == "index" and pairs.a is not None:
        low = 0 if need_positive else -1
        bad = (pairs.a < low) | (pairs.a >= columns)
        contract = f"be columns in [0, {columns})"
        if not need_positive:
            contract += " or -1 (none)"
        _first_bad("positives", pairs.a, bad, contract)
    if pairs.form == "dense" and pairs.a is not None and pairs.a.dtype != torch.bool:
        inside = (pairs.a >= 0) & (pairs.a <= 1)
        _first_bad("positives", pairs.a, ~inside, "be targets in [0, 1]")
    if pairs.form == "sparse" and pairs.a is not None and pairs.b is not None:
        assert pairs.c is not None
        outside = ~((pairs.c >= 0) & (pairs.c <= 1))
        if bool(outside.any()):
            first = int(outside.nonzero()[0])
            row = int(torch.searchsorted(pairs.a, first, right=True)) - 1
            where = (row, int(pairs.b[first]))
            raise ValueError(
                "positives must be targets in [0, 1] (duplicates summed), "
                f"got {pairs.c[first].item()} at position {where}"
            )
    for name, weight in (("row_weight", pairs.row_weight), ("col_weight", pairs.col_weight)):
        if weight is not None:
            bad = ~((weight >= 0) & weight.isfinite())
            _first_bad(name, weight, bad, "be finite and at least 0")
