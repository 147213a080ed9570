"""Mutual nearest neighbours of two sets of units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from foveate._arrays import as_tensors
from foveate._checks import floating, integer, one_of
from foveate._dispatch import load_backend, select
from foveate.ops.pearson import plain

RANKINGS = ("signed", "abs")


class TopK(NamedTuple):
    """The best partners of every unit; NaN and -1 where nothing ranks, None for an absent side."""

    values_a: torch.Tensor | None  # [c1, k_a]
    indices_a: torch.Tensor | None  # [c1, k_a] int64, units of b
    values_b: torch.Tensor | None  # [c2, k_b]
    indices_b: torch.Tensor | None  # [c2, k_b] int64, units of a


class PartialTopK(TopK):
    """TopK of ranges of units, which cannot tell whether a pair is mutual among all."""


@dataclass(frozen=True, eq=False)
class Matches:
    """Pairs of units of which each is among the other's best."""

    pairs: torch.Tensor  # [p, 2] int64, sorted by (i, j)
    scores: torch.Tensor  # [p], signed
    rank_a: torch.Tensor  # [p] int64, 0-based rank of j in i's list
    rank_b: torch.Tensor  # [p] int64, of i in j's list

    def __len__(self) -> int:
        return self.pairs.shape[0]


def pair_of_k(k: Any) -> tuple[int, int]:
    """(k_a, k_b) of an int or a pair of ints, each at least 1."""
    if isinstance(k, (tuple, list)):
        if len(k) != 2:
            raise ValueError(f"k must be an int or (k_a, k_b), got {k!r}")
        return integer("k[0]", k[0], 1), integer("k[1]", k[1], 1)
    return integer("k", k, 1), integer("k", k, 1)


def check_k(k: int, size: int, side: str) -> None:
    """ValueError if there are fewer than k units on the side that is ranked."""
    if k > size:
        raise ValueError(f"k must be at most the number of units of {side}, got k={k}, size {size}")


def backend_module(backend: str, device: str) -> Any:
    """The primitives that run a stream."""
    name = select("pearson", "stage", backend, device)
    return plain if name == "reference" else load_backend("pearson", name)


def dense_topk(corr: torch.Tensor, k: tuple[int, int], by: str, backend: str) -> TopK:
    """The best partners by a correlation matrix [c1, c2]."""
    module = backend_module(backend, corr.device.type)
    corr = corr.detach()
    if corr.dtype not in (torch.float32, torch.float64):
        corr = corr.float()
    corr = corr if corr.stride(1) == 1 or corr.shape[1] <= 1 else corr.contiguous()
    if corr.shape[1] <= 1:
        corr = corr.contiguous()
    start = torch.tensor([0, corr.shape[1]])
    rows = torch.zeros(corr.shape[0], dtype=torch.int32)
    return TopK(*module.topk(corr, None, start, rows, by == "abs", corr.dtype, (0, 0), k))


def mutual_nearest_neighbors(
    corr: Any,
    k: int | tuple[int, int] = 1,
    *,
    min_corr: float | None = None,
    by: str = "signed",
    backend: str = "auto",
) -> Matches:
    """Pairs (i, j) with j among the k_a best of row i and i among the k_b best of column j.

    Rank order: score descending, ties by the lower index; NaN is never ranked.
    Source: Dravid, Gandelsman, Efros, Shocher, "Rosetta Neurons" (ICCV 2023), section 3, with
    k = (1, 5).

    Args:
        corr: `[c1, c2]` floating tensor or NumPy array, PearsonAccumulator, or TopK of all units.
        k: int, or (k_a, k_b).
        min_corr: least score of a match, |score| for by="abs".
        by: "signed", or "abs" to rank by |r|; scores stay signed.
        backend: "auto", "reference" or "cpu".

    Returns:
        Matches, sorted by (i, j).

    Raises:
        TypeError: `corr` is none of these, or k no int.
        ValueError: `corr` is not 2-D, or a TopK read with rows= or cols=; k is below 1 or above
            the number of units it ranks.
    """
    one_of("by", by, RANKINGS)
    k_a, k_b = pair_of_k(k)
    if isinstance(corr, TopK):
        top = corr
        if isinstance(corr, PartialTopK):
            raise ValueError("corr must be the TopK of all units, got one read with rows= or cols=")
        if any(part is None for part in top):
            raise ValueError('corr must hold both sides: TopK of side="both"')
    elif hasattr(corr, "topk") and not isinstance(corr, torch.Tensor):
        top = corr.topk((k_a, k_b), by=by)
    else:
        (matrix,), _ = as_tensors(corr=corr)
        if not isinstance(matrix, torch.Tensor):
            raise TypeError(
                "corr must be a tensor, a NumPy array, a PearsonAccumulator or a TopK, "
                f"got {type(corr).__name__}"
            )
        floating(corr=matrix)
        if matrix.ndim != 2:
            raise ValueError(f"corr must be [c1, c2], got {tuple(matrix.shape)}")
        check_k(k_a, matrix.shape[1], "b")
        check_k(k_b, matrix.shape[0], "a")
        top = dense_topk(matrix, (k_a, k_b), by, backend)
    values, indices_a, _, indices_b = top
    assert values is not None
    assert indices_a is not None
    assert indices_b is not None
    check_k(k_a, indices_a.shape[1], "the TopK's lists of a")
    check_k(k_b, indices_b.shape[1], "the TopK's lists of b")
    values, indices_a, indices_b = values[:, :k_a], indices_a[:, :k_a], indices_b[:, :k_b]
    rows = torch.arange(indices_a.shape[0], device=values.device).view(-1, 1, 1)
    listed = indices_b[indices_a.clamp(min=0)] == rows  # [c1, k_a, k_b]
    found = listed.any(2) & (indices_a >= 0)
    if min_corr is not None:
        found &= (values.abs() if by == "abs" else values) >= min_corr
    i, slot = found.nonzero(as_tuple=True)
    j = indices_a[i, slot]
    order = (i * max(indices_b.shape[0], 1) + j).argsort()
    i, slot, j = i[order], slot[order], j[order]
    rank_b = listed[i, slot].int().argmax(1)
    return Matches(torch.stack([i, j], 1), values[i, slot], slot, rank_b)
