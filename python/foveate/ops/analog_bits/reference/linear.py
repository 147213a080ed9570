"""A linear layer, then the softmax ops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from foveate.ops.analog_bits.groups import SoftmaxTarget
from foveate.ops.analog_bits.reference.softmax import (
    bits_softmax_cross_entropy,
    bits_softmax_expectation,
)


def _logits(
    h: torch.Tensor, proj: torch.Tensor, bias: torch.Tensor | None, dim: int
) -> torch.Tensor:
    """h proj^T + bias: [*outer, G 2^m, *inner]."""
    return F.linear(h.movedim(dim, -1), proj, bias).movedim(-1, dim)


def bits_linear_softmax_cross_entropy(
    h: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    t: SoftmaxTarget,
    check: bool,
) -> torch.Tensor:
    return bits_softmax_cross_entropy(_logits(h, proj, bias, t.dim), t, check)


def bits_linear_softmax_expectation(
    h: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
    *_chunk: Any,
) -> torch.Tensor:
    logits = _logits(h, proj, bias, dim)
    return bits_softmax_expectation(logits, groups, bits, msb, dim, scale, h.dtype)
