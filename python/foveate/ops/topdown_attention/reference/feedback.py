"""Selection of tokens by a prompt, and the linear decoders that send them back to the blocks."""

from __future__ import annotations

import torch

from foveate.ops.topdown_attention.reference.attention import working_dtype


def _unit(x: torch.Tensor, eps: float) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.clamp_min(eps)


def prompt_select(
    x: torch.Tensor, prompt: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """m = clamp(cos(x, p), 0, 1) and m x; the gradient of m is that of the cosine in (0, 1)."""
    work = working_dtype(x.dtype)
    rows, p = x.to(work), prompt.to(work)  # [b, n, c]; [c] or [b, c]
    p = p if p.ndim == 1 else p.unsqueeze(1)
    cosine = (_unit(rows, eps) * _unit(p, eps)).sum(-1, keepdim=True)  # [b, n, 1]
    mask = torch.where(cosine <= 0, 0, torch.where(cosine >= 1, 1, cosine))
    return (mask * rows).to(x.dtype), mask.to(x.dtype)


def feedback(
    z: torch.Tensor, linear: list[torch.Tensor], linear2: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """For i = L-1 .. 0: z <- z L_i^T, td_i = z R_i^T."""
    signals = []
    for left, right in zip(reversed(linear), reversed(linear2), strict=True):
        z = z @ left.mT  # [b, n, c]
        signals.append(z @ right.mT)
    return tuple(reversed(signals))


def fold_feedback(
    v_weight: list[torch.Tensor],
    linear: list[torch.Tensor],
    linear2: list[torch.Tensor],
    transform: torch.Tensor | None,
) -> torch.Tensor:
    """M_i = W_v,i R_i L_i L_{i+1} .. L_{L-1} T^T, so that td_i W_v,i^T = (m F) M_i^T."""
    dtype = v_weight[0].dtype
    work = working_dtype(dtype)
    chain = None if transform is None else transform.to(work).mT  # [c, c]
    folded = []
    for w, left, right in zip(reversed(v_weight), reversed(linear), reversed(linear2), strict=True):
        chain = left.to(work) if chain is None else left.to(work) @ chain
        folded.append((w.to(work) @ right.to(work)) @ chain)  # [a, c]
    return torch.stack(folded[::-1]).to(dtype)  # [L, a, c]
