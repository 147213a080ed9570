"""What a correlation matrix looks like: histogram, extreme pairs, moments of rows and columns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class PearsonSummary(NamedTuple):
    """Statistics over the finite values of r [c1, c2]."""

    histogram: torch.Tensor  # [bins] int64 over [-1, 1], the last bin closed
    edges: torch.Tensor  # [bins + 1] float64
    nan: int
    mean_a: torch.Tensor  # [c1] float64
    var_a: torch.Tensor  # population
    skew_a: torch.Tensor
    kurt_a: torch.Tensor  # m4 / m2^2
    min_a: torch.Tensor
    max_a: torch.Tensor
    mean_b: torch.Tensor  # [c2]
    var_b: torch.Tensor
    skew_b: torch.Tensor
    kurt_b: torch.Tensor
    min_b: torch.Tensor
    max_b: torch.Tensor
    top_pairs: torch.Tensor  # [t, 2] int64
    top_scores: torch.Tensor  # [t]
    bottom_pairs: torch.Tensor
    bottom_scores: torch.Tensor


def _moments(
    r: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance, skewness, kurtosis, least and largest of each row's finite values."""
    ok = r.isfinite()
    n = ok.sum(1)
    x = torch.where(ok, r, 0.0)
    mean = x.sum(1) / n
    d = torch.where(ok, r - mean[:, None], 0.0)
    second, third, fourth = ((d**p).sum(1) / n for p in (2, 3, 4))
    if r.shape[1] == 0:
        nothing = torch.full_like(mean, float("nan"))
        return mean, second, nothing, nothing, nothing, nothing
    empty = n == 0
    low = torch.where(ok, r, float("inf")).amin(1)
    high = torch.where(ok, r, float("-inf")).amax(1)
    low = torch.where(empty, float("nan"), low)
    high = torch.where(empty, float("nan"), high)
    return mean, second, third / second**1.5, fourth / second**2, low, high


def summarise(r: torch.Tensor, bins: int, tails: int) -> PearsonSummary:
    """The summary of r [c1, c2]; ties of extreme pairs by the lower (i, j)."""
    finite = r.isfinite()
    values = r[finite].double()
    index = ((values + 1) * (bins / 2)).long().clamp(0, bins - 1)
    histogram = torch.bincount(index, minlength=bins)
    edges = torch.linspace(-1, 1, bins + 1, dtype=torch.float64, device=r.device)
    pairs = finite.nonzero()
    count = min(tails, len(pairs))
    scores = r[finite]
    by_row, by_column = _moments(r.double()), _moments(r.double().T)
    top = scores.sort(descending=True, stable=True)[1][:count]
    bottom = scores.sort(stable=True)[1][:count]
    return PearsonSummary(
        histogram,
        edges,
        int((~finite).sum()),
        *by_row,
        *by_column,
        pairs[top],
        scores[top],
        pairs[bottom],
        scores[bottom],
    )
