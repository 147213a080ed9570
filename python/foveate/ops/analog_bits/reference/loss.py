"""Losses on predicted bits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foveate.ops.analog_bits.layout import (
    LOSS_KINDS,
    LossTarget,
    mean_divisor,
    pixels_per_weight,
    work_dtype,
)
from foveate.ops.analog_bits.reference.codec import bits_encode
from foveate.ops.analog_bits.reference.noise import noise_stream, spread_over_pixels


def _target(pred: torch.Tensor, t: LossTarget, bits: torch.Tensor) -> torch.Tensor:
    work = work_dtype(pred.dtype)
    if t.kind == LOSS_KINDS["x"]:
        return torch.where(bits, *_levels(pred, t.scale, work))
    noise = t.noise
    if noise is None:
        noise = noise_stream(pred.shape, t.dim, t.seed_tensor, t.seed, t.offset, pred.device)
    noise = noise.to(work)
    if t.kind == LOSS_KINDS["eps"]:
        return noise
    assert t.gamma is not None
    level = spread_over_pixels(t.gamma, pred.shape, t.dim)  # [*outer, 1, *inner]
    signal = (1.0 - level).sqrt() * t.scale
    return level.sqrt().to(work) * noise - torch.where(bits, signal.to(work), -signal.to(work))


def _levels(
    pred: torch.Tensor, scale: float, work: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    high = torch.full((), scale, dtype=work, device=pred.device)
    return high, -high


def bits_loss(pred: torch.Tensor, t: LossTarget, check: bool) -> torch.Tensor:
    """mean of w L(pred, target) over pixels and bits; see the table of kinds in api/loss.py."""
    work = work_dtype(pred.dtype)
    bits = (
        bits_encode(t.x, t.n_bits, 1.0, 0.0, t.msb, t.dim, work, check) > 0
    )  # [*outer, N, *inner]
    f = pred.to(work)
    if t.kind == LOSS_KINDS["sigmoid"]:
        z = torch.where(bits, f, -f)
        loss = F.softplus(-z) if t.eps == 0 else -torch.log(torch.sigmoid(z) + t.eps)
    else:
        loss = (f - _target(pred, t, bits)).square()
    per_pixel = loss.sum(t.dim)  # [*outer, *inner]
    if t.weight is not None:
        pixels = per_pixel.numel()
        repeat = pixels_per_weight(t.weight, pixels)
        weight = t.weight.reshape(-1).repeat_interleave(repeat)[:pixels]
        per_pixel = per_pixel * weight.view(per_pixel.shape)
    divisor = mean_divisor(t.reduction, per_pixel.numel(), pred.shape[t.dim])
    return (per_pixel if t.reduction == "none" else per_pixel.sum()) / divisor
