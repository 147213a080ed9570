"""The batched normalized cut of VoteCut under CuVLER's name (CVPR 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.compat._inputs import tensor, unit_rows


def ncut(
    features: Any, tau: float = 0.15, eps: float = 1e-5, eig_vecs: int = 1
) -> tuple[Tensor, Tensor]:
    """Unit eigenvectors y = D^1/2 x of the normalized Laplacian, the trivial one left out.

    Args:
        features: [B, N, C].
        tau: cosine above which two tokens are joined with weight 1, others with eps.
        eig_vecs: how many.

    Returns:
        y [B, N, eig_vecs] and the Laplacian's eigenvalues [B, eig_vecs], torch fp64.
    """
    tokens = tensor(features)
    result = foveate.ncut(tokens, tau=tau, eps=eps, k=eig_vecs)
    unit = unit_rows(tokens)
    joined = torch.stack([(rows @ rows.T > tau).sum(dim=-1) for rows in unit])  # [B, N]
    n = tokens.shape[-2]
    degree = eps * n + (1 - eps) * joined.to(torch.float64)
    y = result.eigenvectors * degree.sqrt().unsqueeze(1)  # [B, k, N]
    y = y / torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return y.transpose(1, 2), result.eigenvalues
