"""Cross entropy and expectation of a linear layer's logits, chunk by chunk."""

from __future__ import annotations

import math
from typing import Any

import torch

from foveate.ops.analog_bits.chunks import as_rows, chunk_pixels, chunks
from foveate.ops.analog_bits.cpu.softmax import (
    bits_softmax_expectation_bwd,
    bits_softmax_expectation_fwd,
    softmax_loss,
)
from foveate.ops.analog_bits.groups import SoftmaxTarget
from foveate.ops.analog_bits.layout import (
    mean_divisor,
    pixel_shape,
    pixels_per_weight,
    require_in_range,
    split_at,
    work_dtype,
)


class _Layer:
    """A linear layer in the dtype of the arithmetic, and the sums of its gradients."""

    def __init__(
        self, h: torch.Tensor, proj: torch.Tensor, bias: torch.Tensor | None, wanted: bool
    ) -> None:
        self.work = work_dtype(h.dtype)
        self.proj = proj.to(self.work)
        self.bias = None if bias is None else bias.to(self.work)
        self.proj_slope = torch.zeros_like(self.proj) if wanted else None
        self.bias_slope = proj.new_zeros(len(proj), dtype=self.work) if wanted else None

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """`[pixels, logits]` of rows `[pixels, d]`."""
        if self.bias is None:
            return rows @ self.proj.T
        return torch.addmm(self.bias, rows, self.proj.T)

    def backward(self, rows: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """The slope in the rows; adds those in the weights."""
        assert self.proj_slope is not None
        assert self.bias_slope is not None
        self.proj_slope.addmm_(slope.T, rows)
        self.bias_slope += slope.sum(0)
        return slope @ self.proj

    def slopes(
        self, proj: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sums in the parameters' dtypes; empty for no bias."""
        assert self.proj_slope is not None
        assert self.bias_slope is not None
        no_bias = proj.new_empty(0)
        return (
            self.proj_slope.to(proj.dtype),
            no_bias if bias is None else self.bias_slope.to(bias.dtype),
        )


def _loss(
    h: torch.Tensor,
    layer: _Layer,
    t: SoftmaxTarget,
    chunk: int | None,
    upstream: torch.Tensor | None,
    pixel_loss: torch.Tensor | None,
    h_slope: torch.Tensor | None,
) -> float:
    """The weighted sum of all losses; fills `pixel_loss` [P] and `h_slope` (like h) if given."""
    outer, inner = split_at(h.shape, t.dim)
    divisor = mean_divisor(t.reduction, outer * inner, t.groups)
    tokens, ids = as_rows(h, t.dim), as_rows(t.x, t.dim)
    slopes = None if h_slope is None else as_rows(h_slope, t.dim)
    repeat = 1 if t.weight is None else pixels_per_weight(t.weight, outer * inner)
    total = 0.0
    for part in chunks(outer, inner, chunk_pixels(chunk, len(layer.proj))):
        rows = part.rows(tokens).to(layer.work)
        logits = layer.logits(rows)
        weight = None
        if t.weight is not None:
            at = torch.arange(part.begin, part.end) // repeat
            weight = t.weight.flatten()[at]
        given = t._replace(x=part.rows(ids), dim=1, weight=weight)
        if upstream is not None and upstream.ndim > 0:
            factor: torch.Tensor | None = upstream.flatten()[part.begin : part.end]
        else:
            factor = upstream
        losses = None if pixel_loss is None else pixel_loss[part.begin : part.end]
        total += softmax_loss(
            logits,
            given,
            check=False,
            upstream=factor,
            slope_scale=0.0 if math.isnan(divisor) else 1.0 / divisor,
            pixel_loss=losses,
            slope=None if slopes is None else logits,
        )
        if slopes is not None:
            part.put(slopes, layer.backward(rows, logits))
    return total


def bits_linear_softmax_loss_fwd(
    h: torch.Tensor, proj: torch.Tensor, bias: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    t = SoftmaxTarget(*args[:-3])
    chunk, with_slope, check = args[-3:]
    if check:
        require_in_range(t.x, t.n_bits, t.dim)
    layer = _Layer(h, proj, bias, with_slope)
    outer, inner = split_at(h.shape, t.dim)
    divisor = mean_divisor(t.reduction, outer * inner, t.groups)
    losses = None
    if t.reduction == "none":
        losses = h.new_empty(pixel_shape(h.shape, t.dim), dtype=layer.work)
    h_slope = h.new_empty(h.shape if with_slope else (0,))
    flat = None if losses is None else losses.view(-1)
    total = _loss(h, layer, t, chunk, None, flat, h_slope if with_slope else None)
    loss = h.new_full((), total / divisor, dtype=layer.work) if losses is None else losses / divisor
    if not with_slope:
        return loss, h_slope, proj.new_empty(0), proj.new_empty(0)
    return loss, h_slope, *layer.slopes(proj, bias)


def bits_linear_softmax_loss_bwd(
    h: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    upstream: torch.Tensor,
    *args: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = _Layer(h, proj, bias, True)
    h_slope = h.new_empty(h.shape)
    factor = upstream.to(layer.work).contiguous()
    _loss(h, layer, SoftmaxTarget(*args[:-1]), args[-1], factor, None, h_slope)
    return h_slope, *layer.slopes(proj, bias)


def bits_linear_softmax_expectation_fwd(
    h: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
    chunk: int | None,
) -> torch.Tensor:
    layer = _Layer(h, proj, bias, False)
    out = h.new_empty((*h.shape[:dim], groups * bits, *h.shape[dim + 1 :]))
    outer, inner = split_at(h.shape, dim)
    tokens, expected = as_rows(h, dim), as_rows(out, dim)
    for part in chunks(outer, inner, chunk_pixels(chunk, len(proj))):
        logits = layer.logits(part.rows(tokens).to(layer.work))
        values = bits_softmax_expectation_fwd(logits, groups, bits, msb, 1, scale, layer.work)
        part.put(expected, values)
    return out


def bits_linear_softmax_expectation_bwd(
    h: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    upstream: torch.Tensor,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
    chunk: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = _Layer(h, proj, bias, True)
    h_slope = h.new_empty(h.shape)
    outer, inner = split_at(h.shape, dim)
    tokens, given, slopes = as_rows(h, dim), as_rows(upstream, dim), as_rows(h_slope, dim)
    for part in chunks(outer, inner, chunk_pixels(chunk, len(proj))):
        rows = part.rows(tokens).to(layer.work)
        slope = bits_softmax_expectation_bwd(
            layer.logits(rows), part.rows(given), groups, bits, msb, 1, scale
        )
        part.put(slopes, layer.backward(rows, slope))
    return h_slope, *layer.slopes(proj, bias)
