"""The pairwise losses on CPU tensors: torch.mm around csrc/cpu/pairwise_loss*.cpp."""

from __future__ import annotations

from typing import Any

import torch

from foveate._native import native
from foveate.ops.pairwise_loss.checks import accumulator, without_autocast
from foveate.ops.pairwise_loss.cpu_pairs import (
    CpuStatistics,
    WirePairs,
    pointer,
    threads_for,
    type_code,
    wire_pairs,
)
from foveate.ops.pairwise_loss.engine import TILE, operand, sweep
from foveate.ops.pairwise_loss.log_sums import LogSums
from foveate.ops.pairwise_loss.log_sums import factors as factors_of
from foveate.ops.pairwise_loss.pairs import N_PAIRS, Pairs, check_values
from foveate.ops.pairwise_loss.statistics import Statistics

_cpu = native("_cpu")
_BAND = 64  # rows whose column sums the kernel keeps apart


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
    statistics: CpuStatistics | None = None,
) -> tuple[torch.Tensor, ...]:
    """Row sums of the loss, and raw gradients of x, y, scale and bias."""
    dtype = accumulator(x.dtype)
    wire: WirePairs = wire_pairs(pairs, dtype)
    sums = torch.zeros(3, x.shape[0], dtype=torch.float64)
    s, b = float(scale), 0.0 if bias is None else float(bias)
    grad = True in needs

    def epilogue(tile: torch.Tensor, _slope: torch.Tensor, r: int, k: int) -> None:
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
    statistics = CpuStatistics(n, m, x.new_empty(0, dtype=accumulator(x.dtype))) if stats else None
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


class _CpuLogSums(LogSums):
    """Log sums that the C++ kernel collects."""

    def add(self, tile: torch.Tensor, r: int, k: int, scale: float, head: tuple[int, ...]) -> None:
        """Merges one tile of products."""
        rows, columns = tile.shape
        work = tile.new_empty(-(-rows // _BAND) * columns + rows + columns)
        _cpu.info_nce_lse(
            tile.data_ptr(),
            type_code(self.dtype),
            columns,
            rows,
            columns,
            r,
            k,
            scale,
            *head[:3],
            *head[5:],
            self.symmetric,
            threads_for(tile),
            work.data_ptr(),
            self.row_max.data_ptr(),
            self.row_sum.data_ptr(),
            self.positive.data_ptr(),
            self.col_max.data_ptr(),
            self.col_sum.data_ptr(),
        )


def _softmax_gradient(
    tile: torch.Tensor,
    r: int,
    k: int,
    scale: float,
    head: tuple[int, ...],
    states: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[torch.Tensor | None, torch.Tensor | None],
    row_gdot: torch.Tensor,
) -> None:
    """Turns a tile of products into that of g, in place."""
    work = tile.new_empty(2 * tile.shape[1])
    _cpu.info_nce_grad(
        tile.data_ptr(),
        type_code(tile.dtype),
        tile.shape[1],
        *tile.shape,
        r,
        k,
        scale,
        *head[:3],
        *head[5:],
        states[0].data_ptr(),
        pointer(factors[0]),
        states[1].data_ptr(),
        pointer(factors[1]),
        threads_for(tile),
        work.data_ptr(),
        row_gdot.data_ptr(),
    )


def info_nce_loss_fwd(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    pairs = Pairs(*rest[:N_PAIRS])
    symmetric, reduction, needs, stats, check = rest[N_PAIRS:]
    if check:
        check_values(pairs, y.shape[0], need_positive=True)
    n, m = x.shape[0], y.shape[0]
    dtype = accumulator(x.dtype)
    wire = wire_pairs(pairs, dtype)
    sums = _CpuLogSums(n, m, x, symmetric)
    statistics = CpuStatistics(n, m, x.new_empty(0, dtype=dtype)) if stats else None
    s, b = float(scale), 0.0 if bias is None else float(bias)
    row_gdot = torch.zeros(n, dtype=torch.float64)
    grad = True in needs

    def epilogue(tile: torch.Tensor, _slope: torch.Tensor, r: int, k: int) -> None:
        _, head = wire.on_tile(tile, r, k)
        if statistics is not None:
            statistics.add(tile, r, k, s, b, head)
        sums.add(tile, r, k, s, head)
        if grad:  # the tile is the whole matrix
            factors = factors_of(x, y, symmetric, None, None)
            _softmax_gradient(tile, r, k, s, head, sums.states(), factors, row_gdot)

    with without_autocast("cpu"):
        tile = (n, m) if grad else TILE["cpu"]
        dx, dy = sweep(operand(x, dtype), operand(y, dtype), tile, needs[:2], epilogue)
    ds = row_gdot.sum() if needs[2] else row_gdot.new_empty(0)
    loss = sums.loss(pairs)
    if reduction != "none":
        loss = loss.sum() / (n if reduction == "mean" else 1)
    found = Statistics.nothing(x) if statistics is None else statistics.result()
    return loss.to(dtype), dx, dy, ds, *sums.states(), *found


def info_nce_loss_bwd(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    row_state: torch.Tensor,
    col_state: torch.Tensor,
    row_factor: torch.Tensor | None,
    col_factor: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    pairs = Pairs(*rest[:N_PAIRS])
    symmetric, needs = rest[N_PAIRS:]
    dtype = accumulator(x.dtype)
    wire = wire_pairs(pairs, dtype)
    factors = factors_of(x, y, symmetric, row_factor, col_factor)
    states = row_state.contiguous(), col_state.contiguous()
    row_gdot = torch.zeros(x.shape[0], dtype=torch.float64)
    s = float(scale)

    def epilogue(tile: torch.Tensor, _slope: torch.Tensor, r: int, k: int) -> None:
        _, head = wire.on_tile(tile, r, k)
        _softmax_gradient(tile, r, k, s, head, states, factors, row_gdot)

    with without_autocast("cpu"):
        left, right = operand(x, dtype), operand(y, dtype)
        dx, dy = sweep(left, right, TILE["cpu"], needs[:2], epilogue)
    return dx, dy, row_gdot.sum() if needs[2] else row_gdot.new_empty(0)
