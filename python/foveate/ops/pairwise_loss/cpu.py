"""The sigmoid loss on CPU tensors: torch.mm around csrc/cpu/pairwise_loss.cpp."""

from __future__ import annotations

from typing import Any

import torch

from foveate._native import native
from foveate.ops.pairwise_loss.checks import accumulator, without_autocast
from foveate.ops.pairwise_loss.engine import TILE
from foveate.ops.pairwise_loss.pairs import N_PAIRS, Pairs, check_values, shares

_cpu = native("_cpu")
_FORMS = ("none", "diagonal", "index", "ids", "dense", "sparse")
_ALIGNMENT = 64  # BLAS picks its kernels by the operands' alignment
_SERIAL = 1 << 15  # logits of a tile below which a second thread costs more than it brings


def unsupported(_op: str, stats: bool = False, *_args: Any) -> str | None:
    return "it has no statistics" if stats else None


def _operand(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, aligned, in the logits' dtype."""
    operand = tensor.to(dtype).contiguous()
    return operand if operand.data_ptr() % _ALIGNMENT == 0 else operand.clone()


def _int32_ids(ids_x: torch.Tensor, ids_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids in 32 bits, equal where they were; -1 becomes -1 in x and -2 in y."""
    both = torch.cat([ids_x.long(), ids_y.long()])
    coded = torch.unique(both, return_inverse=True)[1].to(torch.int32)
    coded_x, coded_y = coded.split([len(ids_x), len(ids_y)])
    return coded_x.masked_fill(ids_x == -1, -1), coded_y.masked_fill(ids_y == -1, -2)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pass(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: Pairs,
    needs: list[bool],
    *,
    loss: bool,
) -> tuple[torch.Tensor, ...]:
    """Row sums of the loss, and raw gradients of x, y, scale and bias."""
    dtype = accumulator(x.dtype)
    n, m = x.shape[0], y.shape[0]
    row_share, col_share = shares(pairs, dtype)
    a, b, c = pairs.a, pairs.b, pairs.c
    if pairs.form == "index" and a is not None:
        a = a.to(torch.int32).contiguous()
    elif pairs.form == "ids" and a is not None and b is not None:
        a, b = _int32_ids(a, b)
    elif pairs.form == "sparse" and c is not None:
        c = c.to(dtype).contiguous()
    ignore_x, ignore_y = pairs.ignore_x, pairs.ignore_y
    if ignore_x is not None and ignore_y is not None:
        ignore_x, ignore_y = _int32_ids(ignore_x, ignore_y)
    row_weight, col_weight = (
        None if w is None else w.to(dtype).contiguous()
        for w in (pairs.row_weight, pairs.col_weight)
    )
    left, right = _operand(x, dtype), _operand(y, dtype)
    tile_rows, tile_columns = TILE["cpu"]
    room = left.new_empty(min(n, tile_rows) * min(m, tile_columns))
    dx = left.new_empty(n if needs[0] else 0, x.shape[1])
    dy = left.new_empty(m if needs[1] else 0, x.shape[1])
    sums = torch.zeros(3, n, dtype=torch.float64)
    grad = True in needs
    for r in range(0, n, tile_rows):
        rows = left[r : r + tile_rows]
        for k in range(0, m, tile_columns):
            columns = right[k : k + tile_columns]
            shape = (len(rows), len(columns))
            tile = room[: shape[0] * shape[1]].view(shape)
            torch.mm(rows, columns.T, out=tile)
            part = a
            if pairs.form == "dense" and a is not None:
                part = a[r : r + tile_rows, k : k + tile_columns].to(dtype).contiguous()
            _cpu.sigmoid_loss_fwd(
                tile.data_ptr(),
                1 if dtype == torch.float64 else 0,
                shape[1],
                *shape,
                r,
                k,
                float(scale),
                0.0 if bias is None else float(bias),
                _FORMS.index(pairs.form),
                pairs.diagonal,
                _pointer(part),
                _pointer(b),
                _pointer(c),
                _pointer(ignore_x),
                _pointer(ignore_y),
                _pointer(row_share),
                _pointer(col_share),
                _pointer(row_weight),
                _pointer(col_weight),
                pairs.pos_weight,
                pairs.neg_weight,
                pairs.focal_gamma,
                loss,
                grad,
                1 if tile.numel() < _SERIAL else torch.get_num_threads(),
                sums[0].data_ptr(),
                sums[1].data_ptr(),
                sums[2].data_ptr(),
            )
            if needs[0]:
                dx[r : r + tile_rows].addmm_(tile, columns, beta=0 if k == 0 else 1)
            if needs[1]:
                dy[k : k + tile_columns].addmm_(tile.T, rows, beta=0 if r == 0 else 1)
    ds = sums[2].sum() if needs[2] else sums.new_empty(0)
    db = sums[1].sum() if needs[3] else sums.new_empty(0)
    return sums[0], dx, dy, ds, db


def sigmoid_loss_fwd(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    pairs = Pairs(*rest[:N_PAIRS])
    reduction, needs, _stats, check = rest[N_PAIRS:]
    if check:
        check_values(pairs, y.shape[0])
    with without_autocast("cpu"):
        rows, *gradients = _pass(x, y, scale, bias, pairs, needs, loss=True)
    n, m = x.shape[0], y.shape[0]
    if reduction != "none":
        rows = rows.sum() / {"row_mean": n, "pair_mean": n * m, "sum": 1}[reduction]
    empty = x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
    return rows.to(accumulator(x.dtype), copy=True), *gradients, *empty


def sigmoid_loss_bwd(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    row_factor: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    pairs, needs = Pairs(*rest[:N_PAIRS]), rest[N_PAIRS]
    if row_factor is not None:
        weight = row_factor if pairs.row_weight is None else row_factor * pairs.row_weight
        pairs = pairs._replace(row_weight=weight)
    with without_autocast("cpu"):
        return _pass(x, y, scale, bias, pairs, needs, loss=False)[1:]
