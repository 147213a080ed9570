"""Cross entropy and expectation over groups of bits: csrc/cpu/analog_bits_softmax.cpp."""

from __future__ import annotations

import math
from typing import Any

import torch

from foveate._native import DTYPE_CODES, native
from foveate.ops.analog_bits.cpu.codec import int32_table, threads_for
from foveate.ops.analog_bits.groups import SoftmaxTarget
from foveate.ops.analog_bits.layout import (
    mean_divisor,
    pixel_shape,
    pixels_per_weight,
    require_in_range,
    split_at,
    work_dtype,
)

_cpu = native("_cpu")
_BLOCK = 16  # pixels of a kernel's task


def softmax_loss(
    logits: torch.Tensor,
    t: SoftmaxTarget,
    *,
    check: bool,
    upstream: torch.Tensor | None,
    slope_scale: float,
    pixel_loss: torch.Tensor | None,
    slope: torch.Tensor | None,
) -> float:
    """The weighted sum of all losses; writes `pixel_loss` and `slope`, which may be logits."""
    outer, inner = split_at(logits.shape, t.dim)
    ids = t.x.reshape(outer, len(t.n_bits), inner)
    work = work_dtype(logits.dtype)
    threads = threads_for(logits.numel())
    scratch = logits.new_empty((threads, _BLOCK, 1 << t.bits), dtype=work)
    partial = logits.new_empty(_cpu.bits_softmax_blocks(outer, inner), dtype=torch.float64)
    total = logits.new_empty(1, dtype=torch.float64)
    excess = _cpu.bits_softmax_loss(
        logits.data_ptr(),
        DTYPE_CODES[logits.dtype],
        ids.data_ptr(),
        DTYPE_CODES[ids.dtype],
        *ids.stride(),
        int32_table(tuple(t.n_bits)).buffer_info()[0],
        len(t.n_bits),
        outer,
        inner,
        t.msb,
        t.groups,
        t.bits,
        0 if t.weight is None else t.weight.data_ptr(),
        1 if t.weight is None else pixels_per_weight(t.weight, outer * inner),
        0 if upstream is None else upstream.data_ptr(),
        upstream is not None and upstream.ndim > 0,
        slope_scale,
        threads,
        scratch.data_ptr(),
        partial.data_ptr(),
        total.data_ptr(),
        0 if pixel_loss is None else pixel_loss.data_ptr(),
        0 if slope is None else slope.data_ptr(),
    )
    if check and excess:
        require_in_range(t.x, t.n_bits, t.dim)
    return float(total)


def _divisor(logits: torch.Tensor, t: SoftmaxTarget) -> float:
    outer, inner = split_at(logits.shape, t.dim)
    return mean_divisor(t.reduction, outer * inner, t.groups)


def bits_softmax_loss_fwd(logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    t = SoftmaxTarget(*args[:-2])
    with_slope, check = args[-2:]
    work = work_dtype(logits.dtype)
    divisor = _divisor(logits, t)
    slope = logits.new_empty(logits.shape if with_slope else (0,))
    pixel_loss = None
    if t.reduction == "none":
        pixel_loss = logits.new_empty(pixel_shape(logits.shape, t.dim), dtype=work)
    total = softmax_loss(
        logits.contiguous(),
        t,
        check=check,
        upstream=None,
        slope_scale=0.0 if math.isnan(divisor) else 1.0 / divisor,
        pixel_loss=pixel_loss,
        slope=slope if with_slope else None,
    )
    if pixel_loss is not None:
        return pixel_loss.div_(divisor), slope
    return logits.new_full((), total / divisor, dtype=work), slope


def bits_softmax_loss_bwd(logits: torch.Tensor, upstream: torch.Tensor, *args: Any) -> torch.Tensor:
    t = SoftmaxTarget(*args)
    divisor = _divisor(logits, t)
    slope = logits.new_empty(logits.shape)
    softmax_loss(
        logits.contiguous(),
        t,
        check=False,
        upstream=upstream.to(work_dtype(logits.dtype)).contiguous(),
        slope_scale=0.0 if math.isnan(divisor) else 1.0 / divisor,
        pixel_loss=None,
        slope=slope,
    )
    return slope


def bits_softmax_expectation_fwd(
    logits: torch.Tensor,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    outer, inner = split_at(logits.shape, dim)
    shape = (*logits.shape[:dim], groups * bits, *logits.shape[dim + 1 :])
    out = logits.new_empty(shape, dtype=dtype)
    threads = threads_for(logits.numel())
    scratch = logits.new_empty((threads, _BLOCK, 1 << bits), dtype=work_dtype(logits.dtype))
    source = logits.contiguous()
    _cpu.bits_softmax_expectation(
        source.data_ptr(),
        DTYPE_CODES[source.dtype],
        outer,
        inner,
        msb,
        groups,
        bits,
        scale,
        DTYPE_CODES[dtype],
        threads,
        scratch.data_ptr(),
        out.data_ptr(),
    )
    return out


def bits_softmax_expectation_bwd(
    logits: torch.Tensor,
    upstream: torch.Tensor,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
) -> torch.Tensor:
    outer, inner = split_at(logits.shape, dim)
    work = work_dtype(logits.dtype)
    slope = logits.new_empty(logits.shape)
    threads = threads_for(logits.numel())
    scratch = logits.new_empty((threads, _BLOCK + 1, 1 << bits), dtype=work)
    source, given = logits.contiguous(), upstream.to(work).contiguous()
    _cpu.bits_softmax_expectation_slope(
        source.data_ptr(),
        DTYPE_CODES[source.dtype],
        outer,
        inner,
        msb,
        groups,
        bits,
        scale,
        given.data_ptr(),
        threads,
        scratch.data_ptr(),
        slope.data_ptr(),
    )
    return slope
