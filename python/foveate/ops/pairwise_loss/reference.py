"""The definition of the losses in plain PyTorch: dense, differentiable to any order."""

from __future__ import annotations

import torch
from torch.nn.functional import log_softmax, logsigmoid

from foveate.ops.pairwise_loss.pairs import (
    Pairs,
    PairStats,
    dense_ignored,
    dense_targets,
    shares,
)

_INF = float("inf")


def logits(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """z = s x y^T + b in the dtype of `scale` (float32; float64 for float64 features)."""
    z = scale * (x.to(scale.dtype) @ y.to(scale.dtype).T)  # [n, N]
    return z if bias is None else z + bias


def _softplus(u: torch.Tensor, gamma: float) -> torch.Tensor:
    """sigma(u)^gamma sp(u); torch's softplus is the identity beyond 20, this one is exact."""
    value = -logsigmoid(-u)
    return value if gamma == 0 else torch.exp(gamma * logsigmoid(u)) * value


def sigmoid_terms(z: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    """l = w (p t sp(-z) + q (1 - t) sp(z)); a term of weight 0 is 0 whatever its logit."""
    n, columns = z.shape
    t = dense_targets(pairs, n, columns, z)  # [n, N]
    positive, negative = pairs.pos_weight * t, pairs.neg_weight * (1 - t)
    row, column = shares(pairs, z.dtype)
    if row is not None:
        positive = positive * (row[:, None] if column is None else row[:, None] + column)
    ignored = dense_ignored(pairs, t)
    if ignored is not None:
        negative = negative.masked_fill(ignored, 0)
    for weight, axis in ((pairs.row_weight, 1), (pairs.col_weight, 0)):
        if weight is not None:
            factor = weight.to(z.dtype).unsqueeze(axis)
            positive, negative = positive * factor, negative * factor
    gamma = pairs.focal_gamma
    zero = z.new_zeros(())
    return torch.where(positive != 0, positive * _softplus(-z, gamma), zero) + torch.where(
        negative != 0, negative * _softplus(z, gamma), zero
    )


def sigmoid_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: Pairs,
    reduction: str,
    stats: bool,
) -> tuple[torch.Tensor, PairStats | None]:
    """Sum of the terms over all pairs, reduced: SigLIP (2303.15343), Algorithm 1."""
    z = logits(x, y, scale, bias)  # [n, N]
    terms = sigmoid_terms(z, pairs)  # [n, N]
    found = pair_stats(z.detach(), pairs) if stats else None
    if reduction == "none":
        return terms.sum(1), found
    divisor = {"row_mean": z.shape[0], "pair_mean": z.numel(), "sum": 1}[reduction]
    return terms.sum() / divisor, found


def positive_columns(pairs: Pairs, n: int, device: torch.device) -> torch.Tensor:
    """The column of each row's positive, `[n]` int64."""
    if pairs.a is None:
        return torch.arange(n, device=device) + pairs.diagonal
    return pairs.a.long()


def info_nce_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    pairs: Pairs,
    symmetric: bool,
    reduction: str,
    stats: bool,
) -> tuple[torch.Tensor, PairStats | None]:
    """-log softmax at the positive, over the row and, if symmetric, the column: CLIP, InfoNCE.

    A bias cancels in the softmax; it takes part so that its gradient is 0, not absent.
    """
    z = logits(x, y, scale, None)  # [n, N]
    n, columns = z.shape
    found = None
    if stats:
        found = pair_stats(z.detach() if bias is None else (z + bias).detach(), pairs)
    ignored = dense_ignored(pairs, dense_targets(pairs, n, columns, z))
    if ignored is not None:
        z = z.masked_fill(ignored, -_INF)
    at = positive_columns(pairs, n, z.device)[:, None]  # [n, 1]
    loss = -log_softmax(z, 1).gather(1, at).squeeze(1)  # [n]
    if symmetric:
        loss = (loss - log_softmax(z, 0).gather(1, at).squeeze(1)) / 2
    if bias is not None:
        loss = loss + (bias - bias)
    if reduction == "none":
        return loss, found
    return loss.sum() / (n if reduction == "mean" else 1), found


def pair_stats(z: torch.Tensor, pairs: Pairs) -> PairStats:
    """The statistics of the logits, of all pairs at once."""
    t = dense_targets(pairs, z.shape[0], z.shape[1], z)
    ignored = dense_ignored(pairs, t)
    positive, negative = t >= 0.5, t < 0.5
    if ignored is not None:
        negative = negative & ~ignored
    wanted = positive | negative

    def moments(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inside = z[mask]
        infinity = z.new_tensor([_INF])
        mean = inside.double().mean()
        low, high = torch.cat([inside, infinity]).min(), torch.cat([inside, -infinity]).max()
        return mean.float(), low.float(), high.float()

    def top1(axis: int) -> torch.Tensor:
        best = z.masked_fill(~wanted, -_INF).amax(axis)
        best_positive = z.masked_fill(~positive, -_INF).amax(axis)
        has = positive.any(axis)
        return ((best_positive >= best) & has).sum().double().div(has.sum()).float()

    counts = (positive.sum(), negative.sum())
    return PairStats(*counts, *moments(positive), *moments(negative), top1(1), top1(0))
