"""Losses on predicted bits: csrc/cpu/analog_bits_loss.cpp."""

from __future__ import annotations

import math
from typing import Any

import torch

from foveate._native import DTYPE_CODES, native
from foveate.ops.analog_bits.cpu.codec import int32_table, threads_for
from foveate.ops.analog_bits.layout import (
    LossTarget,
    mean_divisor,
    pixel_shape,
    pixels_per_weight,
    require_in_range,
    split_at,
    work_dtype,
)
from foveate.ops.analog_bits.seeds import pixels_per_sample, seed_value

_cpu = native("_cpu")


def _run(
    pred: torch.Tensor,
    t: LossTarget,
    *,
    check: bool,
    upstream: torch.Tensor | None,
    slope_scale: float,
    pixel_loss: torch.Tensor | None,
    slope: torch.Tensor | None,
) -> float:
    """The weighted sum of all losses; `pixel_loss` and `slope` are written."""
    outer, inner = split_at(pred.shape, t.dim)
    channels = pred.shape[t.dim]
    pred = pred.contiguous()
    ids = t.x.reshape(outer, len(t.n_bits), inner)
    gamma = None if t.gamma is None else t.gamma.contiguous()
    partial = pred.new_empty(_cpu.bits_loss_tiles(outer, channels, inner), dtype=torch.float64)
    total = pred.new_empty(1, dtype=torch.float64)
    excess = _cpu.bits_loss(
        pred.data_ptr(),
        DTYPE_CODES[pred.dtype],
        ids.data_ptr(),
        DTYPE_CODES[ids.dtype],
        *ids.stride(),
        int32_table(tuple(t.n_bits)).buffer_info()[0],
        len(t.n_bits),
        outer,
        inner,
        t.msb,
        t.kind,
        t.scale,
        -t.scale,
        0 if gamma is None else gamma.data_ptr(),
        1 if gamma is None else pixels_per_sample(gamma, pred.shape, t.dim),
        0 if t.noise is None else t.noise.data_ptr(),
        seed_value(t.seed_tensor, t.seed),
        t.offset,
        0 if t.weight is None else t.weight.data_ptr(),
        1 if t.weight is None else pixels_per_weight(t.weight, outer * inner),
        t.eps,
        0 if upstream is None else upstream.data_ptr(),
        upstream is not None and upstream.ndim > 0,
        slope_scale,
        threads_for(pred.numel()),
        partial.data_ptr(),
        total.data_ptr(),
        0 if pixel_loss is None else pixel_loss.data_ptr(),
        0 if slope is None else slope.data_ptr(),
    )
    if check and excess:
        require_in_range(t.x, t.n_bits, t.dim)
    return float(total)


def _divisor(pred: torch.Tensor, t: LossTarget) -> float:
    outer, inner = split_at(pred.shape, t.dim)
    return mean_divisor(t.reduction, outer * inner, pred.shape[t.dim])


def bits_loss_fwd(pred: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    t = LossTarget(*args[:-2])
    with_slope, check = args[-2:]
    work = work_dtype(pred.dtype)
    divisor = _divisor(pred, t)
    slope = pred.new_empty(pred.shape if with_slope else (0,))
    pixel_loss = None
    if t.reduction == "none":
        pixel_loss = pred.new_empty(pixel_shape(pred.shape, t.dim), dtype=work)
    total = _run(
        pred,
        t,
        check=check,
        upstream=None,
        slope_scale=0.0 if math.isnan(divisor) else 1.0 / divisor,
        pixel_loss=pixel_loss,
        slope=slope if with_slope else None,
    )
    if pixel_loss is not None:
        return pixel_loss.div_(divisor), slope
    return pred.new_full((), total / divisor, dtype=work), slope


def bits_loss_bwd(pred: torch.Tensor, upstream: torch.Tensor, *args: Any) -> torch.Tensor:
    t = LossTarget(*args)
    divisor = _divisor(pred, t)
    slope = pred.new_empty(pred.shape)
    _run(
        pred,
        t,
        check=False,
        upstream=upstream.to(work_dtype(pred.dtype)).contiguous(),
        slope_scale=0.0 if math.isnan(divisor) else 1.0 / divisor,
        pixel_loss=None,
        slope=slope,
    )
    return slope
