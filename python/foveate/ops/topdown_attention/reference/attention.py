"""Attention whose values carry a top-down signal, by its formula."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores, softmax and sums of half inputs are float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def masked(scores: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """Scores of allowed pairs plus the mask; -inf where the mask forbids, whatever the score."""
    if causal:
        n = scores.shape[-1]
        later = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(later, -math.inf)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -math.inf)
    mask = mask.to(scores.dtype)
    return torch.where(mask == -math.inf, -math.inf, scores + mask)


def probabilities(scores: torch.Tensor) -> torch.Tensor:
    """softmax over keys; zeros in a row without an allowed key."""
    closed = (scores == -math.inf).all(-1, keepdim=True)  # [b, h, n, 1]
    return scores.masked_fill(closed, 0).softmax(-1).masked_fill(closed, 0)


def topdown_sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    v_td: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """softmax(scale q k^T + mask) (v + v_td)."""
    work = working_dtype(q.dtype)
    values = v.to(work) if v_td is None else v.to(work) + v_td.to(work)  # [b, h, m, d]
    scores = (q.to(work) * scale) @ k.to(work).transpose(-1, -2)  # [b, h, n, m]
    out: torch.Tensor = probabilities(masked(scores, mask, causal)) @ values  # [b, h, n, d]
    return out.to(q.dtype)


def topdown_attention(
    x: torch.Tensor,
    td: torch.Tensor | None,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor | None,
    num_heads: int,
    twice: bool,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    num_queries: int | None,
) -> torch.Tensor:
    """Q, K from x; V = (x + td) W_v^T + beta b_v, beta = 2 if td is given and `twice`, else 1."""
    w_q, w_k, w_v = qkv_weight.chunk(3)  # [a, c] each
    b_q, b_k, b_v = (None, None, None) if qkv_bias is None else qkv_bias.chunk(3)
    if b_v is not None and td is not None and twice:
        b_v = 2 * b_v
    asking = x if num_queries is None else x[:, :num_queries]

    def heads(y: torch.Tensor) -> torch.Tensor:
        split: torch.Tensor = y.unflatten(-1, (num_heads, y.shape[-1] // num_heads))
        return split.transpose(1, 2)

    o = topdown_sdpa(
        heads(F.linear(asking, w_q, b_q)),
        heads(F.linear(x, w_k, b_k)),
        heads(F.linear(x if td is None else x + td, w_v, b_v)),
        None,
        mask,
        causal,
        scale,
    )
    return o.transpose(1, 2).flatten(2)  # [b, n, a]
