"""What a sampler step is made of: kinds of prediction, and the coefficients of both samplers."""

from __future__ import annotations

from typing import NamedTuple

import torch

# csrc/cpu/analog_bits_step.cpp, enum Prediction.
PREDICTIONS = {"x": 0, "eps": 1, "v": 2, "sigmoid": 3}
VARIANCES = ("large", "small", "zero")


class Step(NamedTuple):
    """A step apart from its tensors; the order is that of the raw op's arguments."""

    kind: int  # PREDICTIONS
    guidance: float
    clip: float  # inf: not clipped
    scale: float
    dim: int  # axis of the channels: the noise stream's layout
    seed_tensor: torch.Tensor | None
    seed: int
    offset: int
    draws: bool  # noise from the stream


def ddim_coefficients(gamma: torch.Tensor, gamma_prev: torch.Tensor) -> torch.Tensor:
    """sqrt(g), sqrt(1 - g), A, B, S of each sample, float64 `[b or 1, 5]` (DDIM, eq. 12)."""
    g, g_prev = torch.broadcast_tensors(gamma, gamma_prev)
    keep = ((1 - g_prev) / (1 - g)).sqrt()
    pull = g_prev.sqrt() - keep * g.sqrt()
    return torch.stack([g.sqrt(), (1 - g).sqrt(), keep, pull, torch.zeros_like(g)], -1)


def ddpm_coefficients(gamma: torch.Tensor, gamma_prev: torch.Tensor, variance: str) -> torch.Tensor:
    """The same of the ancestral step (DDPM, eq. 7) with a variance of `VARIANCES`."""
    g, g_prev = torch.broadcast_tensors(gamma, gamma_prev)
    ratio = torch.where(g >= g_prev, torch.ones_like(g), g / g_prev)
    small = (1 - g_prev) / (1 - g)
    keep = ratio.sqrt() * small
    pull = g_prev.sqrt() * (1 - ratio) / (1 - g)
    squared = {"large": 1 - ratio, "small": small * (1 - ratio), "zero": torch.zeros_like(g)}
    return torch.stack([g.sqrt(), (1 - g).sqrt(), keep, pull, squared[variance].sqrt()], -1)


def learned_sigma(
    v: torch.Tensor, gamma: torch.Tensor, gamma_prev: torch.Tensor, work: torch.dtype
) -> torch.Tensor:
    """S between the two variances by v: log S^2 = f log beta + (1 - f) log w, f = (v + 1) / 2.

    Source: Nichol & Dhariwal, "Improved DDPM" (2021), eq. 15; in float64, rounded once.
    """
    g, g_prev = torch.broadcast_tensors(gamma, gamma_prev)
    beta = 1 - torch.where(g >= g_prev, torch.ones_like(g), g / g_prev)  # [b or 1]
    least = beta * (1 - g_prev) / (1 - g)
    per_value = (-1, *(1,) * (v.ndim - 1))
    share = (v.double() + 1) / 2
    log_squared = share * beta.log().view(per_value) + (1 - share) * least.log().view(per_value)
    sigma = torch.where(least.view(per_value) > 0, (log_squared / 2).exp(), 0.0)
    return sigma.to(work)
