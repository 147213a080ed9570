"""The log sums of InfoNCE's rows and columns, and the loss they give."""

from __future__ import annotations

import torch

from foveate.ops.pairwise_loss.checks import accumulator
from foveate.ops.pairwise_loss.pairs import Pairs


class LogSums:
    """Running maxima of the logits and sums of e^(z - maximum), float64."""

    def __init__(self, n: int, m: int, like: torch.Tensor, symmetric: bool) -> None:
        wide = torch.float64
        columns = m if symmetric else 0
        self.dtype, self.symmetric = accumulator(like.dtype), symmetric
        self.row_max = like.new_full((n,), float("-inf"), dtype=wide)
        self.row_sum = like.new_zeros(n, dtype=wide)
        self.positive = like.new_zeros(n, dtype=wide)
        self.col_max = like.new_full((columns,), float("-inf"), dtype=wide)
        self.col_sum = like.new_zeros(columns, dtype=wide)

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The log of the sum e^z of each row and column, `[., 2]`: as a number and what it lost."""
        return self._split(self.row_max, self.row_sum), self._split(self.col_max, self.col_sum)

    def _split(self, maximum: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        log = total.log()
        high = (maximum + log).to(self.dtype)
        low = (maximum - high.double()) + log
        return torch.stack([high, low.where(high.isfinite(), 0).to(self.dtype)], 1)

    def loss(self, pairs: Pairs) -> torch.Tensor:
        """-log softmax at the positives, `[n]` float64."""
        loss = (self.row_max - self.positive) + self.row_sum.log()
        if not self.symmetric:
            return loss
        n = len(loss)
        maximum = _of_positives(n, pairs, self.col_max)
        log = _of_positives(n, pairs, self.col_sum).log()
        return (loss + (maximum - self.positive) + log) / 2


def _of_positives(n: int, pairs: Pairs, values: torch.Tensor) -> torch.Tensor:
    """What belongs to the column of each row's positive, `[n]`."""
    if pairs.a is not None:
        return values[pairs.a.long()]
    return values[pairs.diagonal : pairs.diagonal + n]


def factors(
    x: torch.Tensor,
    y: torch.Tensor,
    symmetric: bool,
    row_factor: torch.Tensor | None,
    col_factor: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights of the rows' and the columns' cross-entropies in the sum."""
    dtype = accumulator(x.dtype)
    share = 0.5 if symmetric else 1.0

    def given(factor: torch.Tensor | None, size: int) -> torch.Tensor:
        if factor is None:
            return x.new_full((size,), share, dtype=dtype)
        return (share * factor).to(dtype).contiguous()

    return given(row_factor, x.shape[0]), given(col_factor, y.shape[0]) if symmetric else None
