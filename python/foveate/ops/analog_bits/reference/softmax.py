"""Cross entropy over groups of bits, and the bits expected under a softmax."""

from __future__ import annotations

import torch

from foveate.ops.analog_bits.groups import SoftmaxTarget
from foveate.ops.analog_bits.layout import mean_divisor, pixels_per_weight, work_dtype
from foveate.ops.analog_bits.reference.codec import bits_encode


def _weights(bits: int, msb: bool, device: torch.device) -> torch.Tensor:
    shift = torch.arange(bits, device=device)
    return 1 << (shift.flip(0) if msb else shift)


def group_targets(t: SoftmaxTarget, check: bool) -> torch.Tensor:
    """Each group's bits as an integer, in the tensor's own bit order: [*outer, *inner, G]."""
    bits = bits_encode(t.x, t.n_bits, 1.0, 0.0, t.msb, t.dim, torch.float32, check)
    grouped = bits.movedim(t.dim, -1).unflatten(-1, (t.groups, t.bits)).long()
    targets: torch.Tensor = (grouped * _weights(t.bits, t.msb, bits.device)).sum(-1)
    return targets


def bits_softmax_cross_entropy(logits: torch.Tensor, t: SoftmaxTarget, check: bool) -> torch.Tensor:
    """mean of w (logsumexp(l_g) - l_g[t_g]) over pixels and groups."""
    grouped = logits.to(work_dtype(logits.dtype)).movedim(t.dim, -1)  # [*outer, *inner, G 2^m]
    grouped = grouped.unflatten(-1, (t.groups, 1 << t.bits))  # [*outer, *inner, G, 2^m]
    targets = group_targets(t, check)  # [*outer, *inner, G]
    at_target = grouped.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    per_pixel: torch.Tensor = -at_target.sum(-1)  # [*outer, *inner]
    if t.weight is not None:
        pixels = per_pixel.numel()
        repeat = pixels_per_weight(t.weight, pixels)
        weight = t.weight.reshape(-1).repeat_interleave(repeat)[:pixels]
        per_pixel = per_pixel * weight.view(per_pixel.shape)
    divisor = mean_divisor(t.reduction, per_pixel.numel(), t.groups)
    return (per_pixel if t.reduction == "none" else per_pixel.sum()) / divisor


def bits_softmax_expectation(
    logits: torch.Tensor,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """scale (2 E_j - 1), E_j = sum_k softmax(l_g)_k bit_j(k)."""
    grouped = logits.to(work_dtype(logits.dtype)).movedim(dim, -1)
    p = grouped.unflatten(-1, (groups, 1 << bits)).softmax(-1)  # [*outer, *inner, G, 2^m]
    k = torch.arange(1 << bits, device=logits.device).unsqueeze(-1)
    table = (k & _weights(bits, msb, logits.device)).bool().to(p.dtype)  # [2^m, m]
    expected: torch.Tensor = scale * (2 * (p @ table) - 1)  # [*outer, *inner, G, m]
    return expected.flatten(-2).movedim(-1, dim).to(dtype)
