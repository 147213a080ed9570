"""One step of a sampler, and weights of instances."""

from __future__ import annotations

import torch

from foveate.ops.analog_bits.layout import require_known
from foveate.ops.analog_bits.reference.noise import noise_stream
from foveate.ops.analog_bits.steps import PREDICTIONS, Step


def bits_step(
    x_t: torch.Tensor,
    pred: torch.Tensor,
    uncond: torch.Tensor | None,
    noise: torch.Tensor | None,
    sigma: torch.Tensor | None,
    coefficients: torch.Tensor,
    *step: object,
    out: torch.Tensor,
    x0_out: torch.Tensor | None,
) -> None:
    """x_prev = A x_t + B x0 + S z, x0 from the guided prediction f, clipped."""
    s = Step(*step)  # type: ignore[arg-type]
    per_value = (-1, *(1,) * (x_t.ndim - 1))
    root, spread, keep, pull, fixed = (
        column.to(x_t.dtype).view(per_value) for column in coefficients.unbind(-1)
    )  # [b or 1, 1, ..]
    f = pred.to(x_t.dtype)
    if uncond is not None:
        f = (1 + s.guidance) * f - s.guidance * uncond.to(x_t.dtype)
    if s.kind == PREDICTIONS["eps"]:
        x0 = (x_t - spread * f) / root
    elif s.kind == PREDICTIONS["v"]:
        x0 = root * x_t - spread * f
    elif s.kind == PREDICTIONS["sigmoid"]:
        x0 = s.scale * (2 * torch.sigmoid(f) - 1)
    else:
        x0 = f
    x0 = x0.clamp(-s.clip, s.clip)
    x_prev = keep * x_t + pull * x0
    if s.draws:
        noise = noise_stream(x_t.shape, s.dim, s.seed_tensor, s.seed, s.offset, x_t.device)
    if noise is not None:
        x_prev = x_prev + (fixed if sigma is None else sigma) * noise.to(x_t.dtype)
    out.copy_(x_prev)
    if x0_out is not None:
        x0_out.copy_(x0)


def instance_weights(ids: torch.Tensor, n_ids: int, power: float, check: bool) -> torch.Tensor:
    """u_id pixels / sum of u over the pixels of a sample, u = (1 / (count + 1))^power."""
    flat = ids.flatten(1).long()  # [b, P]
    inside = (flat >= 0) & (flat < n_ids)
    if check and not bool(inside.all()):
        require_known(ids, n_ids)
    bins = torch.where(inside, flat, n_ids)  # ids outside have a bin of their own
    counts = torch.zeros(len(flat), n_ids + 1, dtype=torch.float64, device=ids.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))  # [b, n_ids + 1]
    u = (1 / (counts + 1)) ** power
    u[:, n_ids] = 0.0**power
    weight = u.gather(1, bins)  # [b, P]
    weight = weight * (flat.shape[1] / weight.sum(1, keepdim=True))
    return weight.float().view(ids.shape)
