"""What the launchers of every backend say about values: refusals and warnings of the raw ops."""

from __future__ import annotations

import warnings

import torch

DEGENERATE_GAP = 1e-9
SYMMETRY = 1e-6  # largest |A - A^T| allowed, relative to the largest entry


def require_finite(features: list[torch.Tensor]) -> None:
    """ValueError naming the batch entry and the token of the first value that is not finite."""
    first = 0
    for group in features:
        if not bool(torch.isfinite(group).all()):
            entry, token, channel = (~torch.isfinite(group)).nonzero()[0].tolist()
            value = float(group[entry, token, channel])
            raise ValueError(
                f"features must be finite, got {value} at batch {first + entry}, token {token}"
            )
        first += group.shape[0]


def require_affinity(affinity: torch.Tensor) -> None:
    """ValueError unless `[b, n, n]` is finite, symmetric, non-negative, with positive row sums."""
    for entry, matrix in enumerate(affinity):
        if not bool(torch.isfinite(matrix).all()):
            row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
            refuse_affinity_value(entry, row, float(matrix[row, column]))
        matrix = matrix.double()
        refuse_asymmetry(entry, float((matrix - matrix.mT).abs().max()), float(matrix.max()))
        if bool((matrix < 0).any()):
            row, column = (matrix < 0).nonzero()[0].tolist()
            refuse_negative(entry, row, float(matrix[row, column]))
        require_degrees(matrix.sum(1), entry, "affinity")


def refuse_affinity_value(entry: int, row: int, value: float) -> None:
    raise ValueError(f"affinity must be finite, got {value} at batch {entry}, row {row}")


def refuse_asymmetry(entry: int, difference: float, largest: float) -> None:
    """ValueError if `difference` = max |A - A^T| is more than 1e-6 of the largest entry."""
    if difference > SYMMETRY * max(largest, 0.0):
        raise ValueError(
            f"affinity must be symmetric, max |A - A^T| <= {SYMMETRY} max A = "
            f"{SYMMETRY * largest:.3g}, got a largest difference of {difference:.3g} "
            f"at batch {entry}"
        )


def refuse_negative(entry: int, row: int, value: float) -> None:
    raise ValueError(f"affinity must be non-negative, got {value} at batch {entry}, row {row}")


def require_degrees(degrees: torch.Tensor, entry: int, name: str) -> None:
    """ValueError naming the first row whose sum of weights is not positive."""
    wrong = ~(degrees > 0)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name} must give every token a positive degree (row sum of weights), "
            f"got degree {float(degrees[row])} at batch {entry}, row {row}"
        )


def warn_not_converged(
    converged: torch.Tensor, passes: torch.Tensor, residual: torch.Tensor, tol: float
) -> None:
    """RuntimeWarning that lists the batch entries whose residual stayed above `tol`.

    Args:
        converged: `[b]` or `[b, n_masks]` bool.
        passes: int64 of the same shape, passes over the affinity.
        residual: `[b, ..]`, the residuals reached.
        tol: the residual wanted.
    """
    if converged.numel() == 0 or bool(converged.all()):
        return
    missed = ~converged.reshape(converged.shape[0], -1).all(1)
    entries = missed.nonzero().flatten().tolist()
    warnings.warn(
        f"ncut did not reach a residual of {tol:g} for batch entries {entries} within "
        f"{int(passes[missed].max())} passes; the worst residual is "
        f"{float(residual[missed].max()):.3g}. The best vectors are returned; raise max_iter",
        RuntimeWarning,
        stacklevel=6,
    )
