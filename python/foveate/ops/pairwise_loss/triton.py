"""The pairwise losses on CUDA tensors: cuBLAS products around elementwise Triton passes.

A tile of 4096 x 2048 float32 products stays in the L2 of a data-centre GPU between the passes.
Scale and bias are read on the device: nothing waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch

from foveate.ops.pairwise_loss.checks import accumulator, without_autocast
from foveate.ops.pairwise_loss.engine import TILE, operand, sweep
from foveate.ops.pairwise_loss.log_sums import factors as factors_of
from foveate.ops.pairwise_loss.pairs import N_PAIRS, Pairs, check_values
from foveate.ops.pairwise_loss.statistics import Statistics
from foveate.ops.pairwise_loss.triton_pairs import DevicePairs, DeviceStatistics, device_pairs
from foveate.ops.pairwise_loss.triton_sigmoid import lift_for, sigmoid_loss_tile, slope_bound
from foveate.ops.pairwise_loss.triton_softmax import DeviceLogSums, info_nce_gradient

_HALF = (torch.float16, torch.bfloat16)


def unsupported(_op: str, dtype: torch.dtype) -> str | None:
    if dtype in _HALF and "dtype_out" not in torch.ops.aten.mm.overloads():
        return f"torch {torch.__version__} has no float32 product of half-precision matrices"
    return None


def _lowered(gradient: torch.Tensor, lift: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return gradient.div_(lift) if dtype == torch.float16 else gradient


def _sigmoid_pass(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: Pairs,
    needs: list[bool],
    statistics: DeviceStatistics | None = None,
) -> tuple[torch.Tensor, ...]:
    """Row sums of the loss, and raw gradients of x, y, scale and bias."""
    n, m, grad = x.shape[0], y.shape[0], True in needs
    wire = device_pairs(pairs, x, m, scale.dtype)
    sums = x.new_zeros(3, n, dtype=torch.float64)
    shift = torch.zeros_like(scale) if bias is None else bias
    lift = lift_for(x.dtype, slope_bound(pairs, scale))

    def epilogue(tile: torch.Tensor, slope: torch.Tensor, r: int, k: int) -> None:
        if statistics is not None:
            statistics.add(tile, r, k, scale, shift, wire)
        sigmoid_loss_tile(tile, slope, r, k, (scale, shift, lift), wire, pairs, grad, sums)

    left, right = operand(x, x.dtype), operand(y, y.dtype)
    dx, dy = sweep(left, right, TILE["triton"], needs, epilogue)
    dx, dy = (_lowered(gradient, lift, x.dtype) for gradient in (dx, dy))
    ds = sums[2].sum() if needs[2] else sums.new_empty(0)
    db = sums[1].sum() if needs[3] else sums.new_empty(0)
    return sums[0], dx, dy, ds, db


def _statistics(x: torch.Tensor, y: torch.Tensor, wanted: bool) -> DeviceStatistics | None:
    if not wanted:
        return None
    return DeviceStatistics(x.shape[0], y.shape[0], x.new_empty(0, dtype=accumulator(x.dtype)))


def sigmoid_loss_fwd(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    pairs = Pairs(*rest[:N_PAIRS])
    reduction, needs, stats, check = rest[N_PAIRS:]
    if check:
        check_values(pairs, y.shape[0])
    n, m = x.shape[0], y.shape[0]
    statistics = _statistics(x, y, stats)
    with without_autocast("cuda"):
        rows, *gradients = _sigmoid_pass(x, y, scale, bias, pairs, needs, statistics)
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
    with without_autocast("cuda"):
        return _sigmoid_pass(x, y, scale, bias, pairs, needs)[1:]


def _softmax_pairs(
    x: torch.Tensor, y: torch.Tensor, pairs: Pairs, dtype: torch.dtype
) -> DevicePairs:
    """The pairs, with the row of each column's positive in `b`."""
    found = device_pairs(pairs, x, y.shape[0], dtype)
    return found._replace(b=torch.arange(y.shape[0], device=x.device) - pairs.diagonal)


def info_nce_loss_fwd(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    pairs = Pairs(*rest[:N_PAIRS])
    symmetric, reduction, needs, stats, check = rest[N_PAIRS:]
    if check:
        check_values(pairs, y.shape[0], need_positive=True)
    n, m, grad = x.shape[0], y.shape[0], True in needs
    wire = _softmax_pairs(x, y, pairs, scale.dtype)
    sums = DeviceLogSums(n, m, x, symmetric)
    statistics = _statistics(x, y, stats)
    shift = torch.zeros_like(scale) if bias is None else bias
    row_gdot = x.new_zeros(n, dtype=torch.float64)
    lift = lift_for(x.dtype, torch.ones_like(scale))

    def epilogue(tile: torch.Tensor, slope: torch.Tensor, r: int, k: int) -> None:
        if statistics is not None:
            statistics.add(tile, r, k, scale, shift, wire)
        sums.add(tile, r, k, scale, wire)
        if grad:  # the tile is the whole matrix
            factors = factors_of(x, y, symmetric, None, None)
            info_nce_gradient(
                tile, slope, r, k, scale, lift, wire, sums.states(), factors, row_gdot
            )

    with without_autocast("cuda"):
        tile = (n, m) if grad else TILE["triton"]
        left, right = operand(x, x.dtype), operand(y, y.dtype)
        dx, dy = sweep(left, right, tile, needs[:2], epilogue)
    dx, dy = (_lowered(gradient, lift, x.dtype) for gradient in (dx, dy))
    ds = row_gdot.sum() if needs[2] else row_gdot.new_empty(0)
    loss = sums.loss(pairs)
    if reduction != "none":
        loss = loss.sum() / (n if reduction == "mean" else 1)
    found = Statistics.nothing(x) if statistics is None else statistics.result()
    return loss.to(sums.dtype), dx, dy, ds, *sums.states(), *found


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
    wire = _softmax_pairs(x, y, pairs, scale.dtype)
    factors = factors_of(x, y, symmetric, row_factor, col_factor)
    states = row_state.contiguous(), col_state.contiguous()
    row_gdot = x.new_zeros(x.shape[0], dtype=torch.float64)
    bound = sum(f.abs().amax() for f in factors if f is not None) * torch.ones_like(scale)
    lift = lift_for(x.dtype, bound)

    def epilogue(tile: torch.Tensor, slope: torch.Tensor, r: int, k: int) -> None:
        info_nce_gradient(tile, slope, r, k, scale, lift, wire, states, factors, row_gdot)

    with without_autocast("cuda"):
        left, right = operand(x, x.dtype), operand(y, y.dtype)
        dx, dy = sweep(left, right, TILE["triton"], needs[:2], epilogue)
    dx, dy = (_lowered(gradient, lift, x.dtype) for gradient in (dx, dy))
    return dx, dy, row_gdot.sum() if needs[2] else row_gdot.new_empty(0)
