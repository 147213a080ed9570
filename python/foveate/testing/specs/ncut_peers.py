"""ncut: what users run today, on the arguments of our functions.

`eigsh` stands for the best plain pipeline: a float32 product, a threshold, and ARPACK on the
deflated matrix with D^-1/2 applied to vectors. `eigh` is what MaskCut and TokenCut call: a dense
generalised solver in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from foveate.ops.ncut import partition
from foveate.ops.ncut.results import NCutResult

Solver = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def eigsh(w: torch.Tensor, k: int, tol: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """lam `[k]` ascending and x `[k, n]` of (D - W) x = lam D x by ARPACK, in the dtype of `w`."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    n = w.shape[0]
    degree = w.sum(1)
    scale = degree.rsqrt()
    trivial = degree.sqrt() / degree.sqrt().norm()

    def product(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        y = torch.from_numpy(np.ascontiguousarray(vector.ravel()))
        image = scale * torch.mv(w, scale * y) - 2 * trivial * torch.dot(trivial, y)
        result: np.ndarray[Any, Any] = image.numpy()
        return result

    start = np.random.default_rng(0).standard_normal(n).astype(w.numpy().dtype)
    operator = LinearOperator((n, n), matvec=product, dtype=start.dtype)
    mu, y = eigsh(operator, k=k, which="LA", v0=start, tol=tol)
    order = np.argsort(-mu)
    vectors = torch.from_numpy(np.ascontiguousarray(y[:, order].T)) * scale
    return 1 - torch.from_numpy(mu[order].copy()), vectors


def eigsh_to_1e9(w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`eigsh` in float64 to the residual of our default."""
    return eigsh(w.double(), k, 1e-9)


def eigh(w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by LAPACK: float64, eigenvalues 1 to k of the dense pencil."""
    from scipy.linalg import eigh

    wide = w.double().numpy()
    degree = np.diag(wide.sum(1))
    lam, x = eigh(degree - wide, degree, subset_by_index=[1, k])
    return torch.from_numpy(lam), torch.from_numpy(np.ascontiguousarray(x.T))


def edge_weights(features: torch.Tensor, tau: float, eps: float) -> torch.Tensor:
    """W of `[n, c]` by plain PyTorch, in the dtype of the features."""
    f = F.normalize(features)
    return torch.where(f @ f.T > tau, 1.0, eps)


def _images(features: Any) -> list[torch.Tensor]:
    return list(features)


def ncut(solver: Solver) -> Callable[..., Any]:
    """`foveate.ncut` by a plain pipeline."""

    def run(features: Any, *, tau: float = 0.2, k: int = 1, **_: Any) -> Any:
        return [solver(edge_weights(image, tau, 1e-5), k) for image in _images(features)]

    return run


def ncut_affinity(solver: Solver) -> Callable[..., Any]:
    """`foveate.ncut_affinity` by a plain solver."""

    def run(affinity: torch.Tensor, *, k: int = 1, **_: Any) -> Any:
        return [solver(w, k) for w in affinity]

    return run


def lobpcg(w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """torch.lobpcg on the dense scaled matrix, the trivial pair included."""
    wide = w.double()
    scale = wide.sum(1).rsqrt()
    start = torch.randn(w.shape[0], k + 1, generator=torch.Generator().manual_seed(0))
    mu, y = torch.lobpcg(scale[:, None] * wide * scale, X=start.double(), largest=True)
    return 1 - mu[1:], (y[:, 1:] * scale[:, None]).T


def spectral_embedding(w: torch.Tensor, k: int) -> Any:
    """scikit-learn's embedding of a given affinity."""
    from sklearn.manifold import spectral_embedding

    return spectral_embedding(w.double().numpy(), n_components=k, random_state=0)


def component(side: torch.Tensor, seed: int, grid: tuple[int, int]) -> torch.Tensor:
    """The 4-connected component of `side` that holds `seed`, by SciPy."""
    from scipy import ndimage

    labels, _ = ndimage.label(side.view(grid).numpy())
    flat = torch.from_numpy(labels).flatten()
    return side & (flat == flat[seed])


def _pair(w: torch.Tensor, solver: Solver) -> NCutResult:
    """A solver's first vector as a result that claims to be determined."""
    lam, x = solver(w, 1)
    vector = partition.with_sign(x[0].double()).unsqueeze(0)
    none, yes = torch.zeros((), dtype=torch.float64), torch.tensor(True)
    passes = torch.zeros((), dtype=torch.int64)
    return NCutResult(lam.double(), vector, lam.double(), none, passes, yes, ~yes, passes)


def maskcut(solver: Solver) -> Callable[..., Any]:
    """`foveate.maskcut` with one product for all stages and a plain solver for each."""

    def run(
        features: Any,
        grid: tuple[int, int],
        *,
        tau: float = 0.15,
        n_masks: int = 3,
        on_reject: str = "retry",
        **_: Any,
    ) -> Any:
        found = []
        for image in _images(features):
            whole = edge_weights(image, tau, 1e-5)

            def solve(painted: torch.Tensor, whole: torch.Tensor = whole) -> NCutResult:
                w = whole.masked_fill(painted[:, None] | painted, 1e-5)
                return _pair(w, solver)

            found.append(
                partition.maskcut_stages(
                    *(solve, grid, n_masks, 0.5, 0.01, 3, on_reject),
                    image.device,
                    component,
                )
            )
        return found

    return run


def tokencut(solver: Solver) -> Callable[..., Any]:
    """`foveate.tokencut` by a plain pipeline."""

    def run(features: Any, grid: tuple[int, int], *, tau: float = 0.2, **_: Any) -> Any:
        found = []
        for image in _images(features):
            x = _pair(edge_weights(image, tau, 1e-5), solver).eigenvectors[0]
            side = x > x.mean()
            found.append(component(side, int(x.abs().argmax()), grid))
        return found

    return run
