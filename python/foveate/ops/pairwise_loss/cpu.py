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


def _columns_of_rows(n: int, pairs: Pairs, values: torch.Tensor) -> torch.Tensor:
    """What belongs to the column of each row's positive, `[n, ...]`."""
    if pairs.a is not None:
        return values[pairs.a.long()]
    return values[pairs.diagonal : pairs.diagonal + n]


class _LogSums:
    """Running maxima and sums of rows and columns, and the kernels that move them."""

    def __init__(self, n: int, m: int, dtype: torch.dtype, symmetric: bool) -> None:
        wide = torch.float64
        self.dtype, self.symmetric = dtype, symmetric
        self.row_max = torch.full((n,), float("-inf"), dtype=wide)
        self.row_sum = torch.zeros(n, dtype=wide)
        self.positive = torch.zeros(n, dtype=wide)
        self.col_max = torch.full((m if symmetric else 0,), float("-inf"), dtype=wide)
        self.col_sum = torch.zeros(m if symmetric else 0, dtype=wide)

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

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The log of the sum e^z of each row and column, `[., 2]`: as a number and what it lost."""
        return self._split(self.row_max, self.row_sum), self._split(self.col_max, self.col_sum)

    def _split(self, maximum: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        log = total.log()
        high = (maximum + log).to(self.dtype)
        low = (maximum - high.double()) + log
        return torch.stack([high, low.where(high.isfinite(), 0).to(self.dtype)], 1)

    def loss(self, pairs: Pairs) -> torch.Tensor:
        """-log softmax at the positives, `[n]` float64."""
        loss = (self.row_max - self.positive) + self.row_sum.log()
        if not self.symmetric:
            return loss
        state = torch.stack([self.col_max, self.col_sum.log()], 1)
        maximum, log = _columns_of_rows(len(loss), pairs, state).unbind(1)
        return (loss + (maximum - self.positive) + log) / 2


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
    sums = _LogSums(n, m, dtype, symmetric)
    statistics = Statistics(n, m, dtype) if stats else None
    s, b = float(scale), 0.0 if bias is None else float(bias)
    row_gdot = torch.zeros(n, dtype=torch.float64)
    grad = True in needs

    def epilogue(tile: torch.Tensor, r: int, k: int) -> None:
        _, head = wire.on_tile(tile, r, k)
        if statistics is not None:
            statistics.add(tile, r, k, s, b, head)
        sums.add(tile, r, k, s, head)
        if grad:  # the tile is the whole matrix
            factors = _default_factors(x, y, symmetric, None, None)
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


def _default_factors(
    x: torch.Tensor,
    y: torch.Tensor,
    symmetric: bool,
    row_factor: torch.Tensor | None,
    col_factor: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Weights of the rows' and the columns' cross-entropies in the sum."""
    dtype = accumulator(x.dtype)
    share = 0.5 if symmetric else 1.0

    def given(factor: torch.Tensor | None, size: int) -> torch.Tensor:
        if factor is None:
            return torch.full((size,), share, dtype=dtype)
        return (share * factor).to(dtype).contiguous()

    rows = given(row_factor, x.shape[0])
    return rows, given(col_factor, y.shape[0]) if symmetric else None


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
    factors = _default_factors(x, y, symmetric, row_factor, col_factor)
    states = row_state.contiguous(), col_state.contiguous()
    row_gdot = torch.zeros(x.shape[0], dtype=torch.float64)
    s = float(scale)

    def epilogue(tile: torch.Tensor, r: int, k: int) -> None:
        _, head = wire.on_tile(tile, r, k)
        _softmax_gradient(tile, r, k, s, head, states, factors, row_gdot)

    with without_autocast("cpu"):
        left, right = operand(x, dtype), operand(y, dtype)
        dx, dy = sweep(left, right, TILE["cpu"], needs[:2], epilogue)
    return dx, dy, row_gdot.sum() if needs[2] else row_gdot.new_empty(0)
