"""Sums and extremes of the logits by kind, and `PairStats` from them."""

from __future__ import annotations

import torch


class Statistics:
    """What the tiles have given so far, by kind: 0 negative, 1 positive."""

    def __init__(self, n: int, m: int, like: torch.Tensor) -> None:
        infinity = float("inf")
        self.count = like.new_zeros(2, n, dtype=torch.int64)
        self.sum = like.new_zeros(2, n, dtype=torch.float64)
        self.low = like.new_full((2, n), infinity)
        self.high = like.new_full((2, n), -infinity)
        self.col_count = like.new_zeros(m, dtype=torch.int64)
        self.col_high = like.new_full((2, m), -infinity)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts [2] and moments [8], in the order of `PairStats`."""
        negative, positive = self.count.sum(1)
        mean = self.sum.sum(1) / self.count.sum(1)
        low, high = self.low.amin(1).double(), self.high.amax(1).double()

        def top1(best: torch.Tensor, has: torch.Tensor) -> torch.Tensor:
            return ((best[1] >= best[0]) & has).sum().double() / has.sum()

        moments = [mean[1], low[1], high[1], mean[0], low[0], high[0]]
        moments += [top1(self.high, self.count[1] > 0), top1(self.col_high, self.col_count > 0)]
        return torch.stack([positive, negative]), torch.stack(moments).float()

    @staticmethod
    def nothing(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(0, dtype=torch.int64), x.new_empty(0, dtype=torch.float32)
