"""Derivative of the eigenpairs of (D - W) x = lam D x with respect to W, in plain PyTorch."""

from __future__ import annotations

import warnings

import torch

_DENSE = 64  # tokens up to which a direct solve is cheaper than an iteration
_RESIDUAL = 1e-12


def ncut_affinity_bwd(
    affinity: torch.Tensor,
    eigenvalues: torch.Tensor,
    eigenvectors: torch.Tensor,
    degenerate: torch.Tensor,
    d_eigenvalues: torch.Tensor | None,
    d_eigenvectors: torch.Tensor | None,
) -> torch.Tensor:
    """dL/dA, symmetric, in the dtype of the affinity; NaN for degenerate entries.

    With g = dL/dx, h = dL/dlam and z the solution of (W - mu D) z = g - (g . x) D x, x^T D z = 0:
    G_ij = sum over vectors of -z_i x_j - h x_i x_j + mu z_i x_i + h mu x_i^2 - (g . x) x_i^2 / 2,
    symmetrised (first-order perturbation of D^-1/2 W D^-1/2 with x^T D x = 1).

    Args:
        affinity: `[b, n, n]`; the upper triangle counts.
        eigenvalues: `[b, k]` float64.
        eigenvectors: `[b, k, n]` float64.
        degenerate: `[b]` bool.
        d_eigenvalues: `[b, k]` or None.
        d_eigenvectors: `[b, k, n]` or None.
    """
    gradient = torch.zeros_like(affinity)
    if d_eigenvalues is None and d_eigenvectors is None:
        return gradient
    for i in range(affinity.shape[0]):
        if bool(degenerate[i]):
            warnings.warn(
                f"batch entry {i} is degenerate: its eigenvectors have no derivative, the gradient "
                "is NaN",
                UserWarning,
                stacklevel=2,
            )
            gradient[i] = torch.nan
            continue
        w = affinity[i].double()
        w = w.triu() + w.triu(1).T
        x = eigenvectors[i]  # [k, n]
        h = torch.zeros_like(eigenvalues[i]) if d_eigenvalues is None else d_eigenvalues[i]
        g = torch.zeros_like(x) if d_eigenvectors is None else d_eigenvectors[i]
        gradient[i] = _one(w, 1 - eigenvalues[i], x, h, g, d_eigenvectors is not None)
    return gradient


def _one(
    w: torch.Tensor,
    mu: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor,
    g: torch.Tensor,
    needs_solve: bool,
) -> torch.Tensor:
    degree = w.sum(1)  # [n]
    along = (g * x).sum(1, keepdim=True)  # [k, 1]
    z = torch.zeros_like(x)
    if needs_solve:
        scale = degree.rsqrt()
        m = scale.unsqueeze(1) * w * scale
        y = x / scale
        right = g * scale - along * y  # in y space, orthogonal to y
        solve = _solve_dense if w.shape[0] <= _DENSE else _solve_minres
        z = torch.stack([solve(m, mu[j], y[j], right[j]) for j in range(x.shape[0])]) * scale
    h, mu = h.unsqueeze(1), mu.unsqueeze(1)
    outer = -(z + h * x).T @ x  # [n, n]
    row = (mu * z * x + h * mu * x * x - along * x * x / 2).sum(0)  # [n]
    whole = outer + row.unsqueeze(1)
    return (whole + whole.T) / 2


def _solve_dense(
    m: torch.Tensor, mu: torch.Tensor, y: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """v with (M - mu) v = right, v orthogonal to y, `[n]`."""
    shifted = m - mu * torch.eye(m.shape[0], dtype=m.dtype, device=m.device)
    solution: torch.Tensor = torch.linalg.solve(shifted + torch.outer(y, y), right)
    return solution


def _solve_minres(
    m: torch.Tensor, mu: torch.Tensor, y: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """`_solve_dense` by MINRES (Paige and Saunders 1975), to a relative residual of 1e-12."""
    norm = right.norm()
    x = torch.zeros_like(right)
    if float(norm) == 0:
        return x
    v, previous = right / norm, torch.zeros_like(right)
    beta = torch.zeros_like(norm)
    d, d_before = torch.zeros_like(right), torch.zeros_like(right)
    cosine, sine = torch.ones_like(norm), torch.zeros_like(norm)
    cosine_before, sine_before = cosine, sine
    remaining = norm
    for _ in range(5 * right.shape[0]):
        step = m @ v - mu * v - beta * previous
        alpha = step @ v
        step = step - alpha * v
        step = step - (step @ y) * y
        beta_next = step.norm()
        # The new column of the tridiagonal matrix under the two rotations before it.
        far = sine_before * beta
        near = cosine_before * beta
        off = cosine * near + sine * alpha
        diagonal = cosine * alpha - sine * near
        length = torch.hypot(diagonal, beta_next)
        cosine_before, sine_before = cosine, sine
        cosine, sine = diagonal / length, beta_next / length
        direction = (v - far * d_before - off * d) / length
        x = x + cosine * remaining * direction
        remaining = -sine * remaining
        if float(remaining.abs()) <= _RESIDUAL * float(norm) or float(beta_next) == 0:
            break
        d_before, d = d, direction
        previous, v, beta = v, step / beta_next, beta_next
    return x - (x @ y) * y
