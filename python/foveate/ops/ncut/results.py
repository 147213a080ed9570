"""What the functions of the family return."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch


class MaskStatus(IntEnum):
    """What became of one MaskCut stage."""

    OK = 0
    OVERLAP = 1  # its candidate overlaps the one before it too much
    SMALL = 2  # its candidate is too small
    COVERED = 3  # accepted, but every token of its candidate is in an earlier mask
    DEGENERATE = 4  # its second eigenvalue is multiple: no vector to split
    STOPPED = 5  # not tried, a stage before it was rejected


class NCutResult(NamedTuple):
    """Eigenpairs of (D - W) x = lam D x without the trivial one, with their certificate.

    Attributes:
        eigenvalues: `[b, k]` float64, ascending, counted with multiplicity.
        eigenvectors: `[b, k, n]` float64, x^T D x = 1, the entry largest in magnitude positive.
        residual: `[b, k]` float64, |M y - mu y|_2 of the unit vector y = D^1/2 x.
        gap: `[b]` float64, smallest difference of neighbours among lam_2 .. lam_{k+2}.
        iterations: `[b]` int64, block passes over the affinity.
        converged: `[b]` bool, every residual is at most tol.
        degenerate: `[b]` bool, gap <= 1e-9: some returned vector is one of many.
        uncertain: `[b]` int64, tokens whose side of the first vector's mean is not certified.
    """

    eigenvalues: torch.Tensor
    eigenvectors: torch.Tensor
    residual: torch.Tensor
    gap: torch.Tensor
    iterations: torch.Tensor
    converged: torch.Tensor
    degenerate: torch.Tensor
    uncertain: torch.Tensor


class MaskCutResult(NamedTuple):
    """The masks of MaskCut and what each stage saw.

    Attributes:
        masks: `[b, n_masks, H, W]` bool, disjoint.
        status: `[b, n_masks]` int64, a `MaskStatus`.
        candidates: `[b, n_masks, h, w]` bool, before earlier masks are taken away.
        seeds: `[b, n_masks]` int64, the token a candidate grew from; -1 where there is none.
        eigenvalues: `[b, n_masks]` float64, lam_2 of each stage.
        gap: `[b, n_masks]` float64, lam_3 - lam_2.
        residual: `[b, n_masks]` float64.
        uncertain: `[b, n_masks]` int64, tokens whose side is not certified.
        degenerate: `[b, n_masks]` bool.
        converged: `[b, n_masks]` bool.
        eigenvectors: `[b, n_masks, n]` float64, sign rule, not reversed.
    """

    masks: torch.Tensor
    status: torch.Tensor
    candidates: torch.Tensor
    seeds: torch.Tensor
    eigenvalues: torch.Tensor
    gap: torch.Tensor
    residual: torch.Tensor
    uncertain: torch.Tensor
    degenerate: torch.Tensor
    converged: torch.Tensor
    eigenvectors: torch.Tensor


class TokenCutResult(NamedTuple):
    """The object TokenCut finds.

    Attributes:
        mask: `[b, H, W]` bool, the component of the foreground that holds the seed.
        box: `[b, 4]` int64, its (x0, y0, x1, y1) in tokens, half-open.
        seed: `[b]` int64, the token with the largest entry; -1 if degenerate.
        eigenvector: `[b, n]` float64, sign rule.
        foreground: `[b, h, w]` bool, the seed's whole side of the mean.
        eigenvalue: `[b]` float64.
        gap: `[b]` float64, lam_3 - lam_2.
        residual: `[b]` float64.
        uncertain: `[b]` int64, tokens whose side is not certified.
        degenerate: `[b]` bool: mask, foreground and box are empty.
        converged: `[b]` bool.
    """

    mask: torch.Tensor
    box: torch.Tensor
    seed: torch.Tensor
    eigenvector: torch.Tensor
    foreground: torch.Tensor
    eigenvalue: torch.Tensor
    gap: torch.Tensor
    residual: torch.Tensor
    uncertain: torch.Tensor
    degenerate: torch.Tensor
    converged: torch.Tensor
