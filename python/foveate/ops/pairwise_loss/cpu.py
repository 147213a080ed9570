"""The pairwise losses on CPU tensors: torch.mm around csrc/cpu/pairwise_loss*.cpp."""

from __future__ import annotations

from typing import Any

import torch

from foveate._native import native
from foveate.ops.pairwise_loss.checks import accumulator, without_autocast
from foveate.ops.pairwise_loss.cpu_pairs import (
    Statistics,
    WirePairs,
    operand,
    pointer,
    threads_for,
    type_code,
    wire_pairs,
)
from foveate.ops.pairwise_loss.engine import TILE, sweep
from foveate.ops.pairwise_loss.pairs import N_PAIRS, Pairs, check_values

_cpu = native("_cpu")


def unsupported(_op: str, *_args: Any) -> str | None:
    return None


def _sigmoid_pass(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: Pairs,
    needs: list[bool],
    *,
    loss: bool,
    statistics: Statistics | None = None,
) -> tuple[torch.Tensor, ...]:
    """Row sums of the loss, and raw gradients of x, y, scale and bias."""
    dtype = accumulator(x.dtype)
    wire: WirePairs = wire_pairs(pairs, dtype)
    sums = torch.zeros(3, x.shape[0], dtype=torch.float64)
    s, b = float(scale), 0.0 if bias is None else float(bias)
    grad = True in needs

    def epilogue(tile: torch.Tensor, r: int, k: int) -> None:
        held, head = wire.on_tile(tile, r, k)
        if statistics is not None:
            statistics.add(tile, r, k, s, b, head)
        _cpu.sigmoid_loss_fwd(
            tile.data_ptr(),
            type_code(dtype),
            tile.shape[1],
            *tile.shape,
            r,
            k,
            s,
            b,
            *head,
            pointer(wire.row_share),
            pointer(wire.col_share),
            pointer(wire.row_weight),
            pointer(wire.col_weight),
            pairs.pos_weight,
            pairs.neg_weight,
            pairs.focal_gamma,
            loss,
            grad,
            threads_for(tile),
            sums[0].data_ptr(),
            sums[1].data_ptr(),
            sums[2].data_ptr(),
        )
        del held

    dx, dy = sweep(operand(x, dtype), operand(y, dtype), TILE["cpu"], needs, epilogue)
    ds = sums[2].sum() if needs[2] else sums.new_empty(0)
    db = sums[1].sum() if needs[3] else sums.new_empty(0)
    return sums[0], dx, dy, ds, db


def sigmoid_loss_fwd(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    pairs = Pairs(*rest[:N_PAIRS])
    reduction, needs, stats, check = rest[N_PAIRS:]
    if check:
        check_values(pairs, y.shape[0])
    n, m = x.shape[0], y.shape[0]
    statistics = Statistics(n, m, accumulator(x.dtype)) if stats else None
    with without_autocast("cpu"):
        rows, *gradients = _sigmoid_pass(
            x, y, scale, bias, pairs, needs, loss=True, statistics=statistics
        )
    if reduction != "none":
        rows = rows.sum() / {"row_mean": n, "pair_mean": n * m, "sum": 1}[reduction]
    found = Statistics.nothing(x) if statistics is None else statistics.result()
    return rows.to(accumulator(x.dtype), copy=True), *gradients, *found


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
        return _sigmoid_pass(x, y, scale, bias, pairs, needs, loss=False)[1:]
