"""The definition of the family: dense, float64, `torch.linalg.eigh`, one image after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from foveate.ops.ncut.gradient import ncut_affinity_bwd as ncut_affinity_bwd
from foveate.ops.ncut.partition import (
    Stages,
    component,
    maskcut_stages,
    tokencut_object,
    with_sign,
)
from foveate.ops.ncut.results import NCutResult
from foveate.ops.ncut.values import (
    DEGENERATE_GAP,
    require_affinity,
    require_degrees,
    require_finite,
    warn_not_converged,
)

_FLOOR = 4 * torch.finfo(torch.float64).eps  # no residual is known better


def normalized(features: torch.Tensor) -> torch.Tensor:
    """`F_i / max(|F_i|_2, 1e-12)` of `[n, c]`, float32, or float64 of float64 features.

    A row is scaled by a power of two before it is squared, so that norms of 1e-300 and 1e300 are
    exact too.
    """
    wide = features.double()
    if features.shape[1] == 0:
        return wide.to(_working_dtype(features))
    exponent = torch.frexp(wide.abs().amax(1, keepdim=True)).exponent.clamp_min(-1000)  # [n, 1]
    scaled = torch.ldexp(wide, -exponent)
    floor = torch.ldexp(torch.full_like(scaled[:, :1], 1e-12), -exponent)
    unit: torch.Tensor = scaled / torch.maximum(scaled.norm(dim=1, keepdim=True), floor)
    return unit.to(_working_dtype(features))


def _working_dtype(features: torch.Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def cosines(features: torch.Tensor) -> torch.Tensor:
    """S = f f^T of `[n, c]`, symmetric `[n, n]`, in the precision of the features."""
    f = normalized(features)
    s = (f.double() @ f.double().T).to(f.dtype)
    return s.triu() + s.triu(1).T


def edges(features: torch.Tensor, tau: float, masked: torch.Tensor) -> torch.Tensor:
    """B_ij = [S_ij > tau], bool `[n, n]`; masked tokens are zeroed features, `masked` is `[n]`."""
    f = torch.where(masked.unsqueeze(1), torch.zeros_like(features), features)
    s = cosines(f)
    b = s > torch.tensor(tau, dtype=s.dtype, device=s.device)
    joined_to_zero = torch.full_like(masked, tau < 0)
    zero = ~(f != 0).any(1)
    return torch.where(
        torch.diag(torch.ones_like(zero)), torch.where(zero, joined_to_zero, True), b
    )


def equal_rows(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two exact classes of `[n, n]` bool: tokens joined to none (or to all), isolated tokens.

    Eigenvectors are constant on each class, except those that vanish outside it and sum to zero.
    """
    joined = b.sum(1)
    none = joined == 0
    alike = none if bool(none.any()) else joined == b.shape[0]
    return alike, (joined == 1) & b.diagonal()


def contrasts(members: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` orthonormal vectors that sum to zero on `members` `[n]`: `[count, n]`.

    Vector t is 1 on the first t members, -t on the next, scaled (Helmert).
    """
    index = members.nonzero().flatten()
    vectors = torch.zeros(count, members.shape[0], dtype=torch.float64, device=members.device)
    for t in range(1, count + 1):
        vectors[t - 1, index[:t]] = 1 / math.sqrt(t * (t + 1))
        vectors[t - 1, index[t]] = -t / math.sqrt(t * (t + 1))
    return vectors


def solve_dense(
    w: torch.Tensor,
    k: int,
    tol: float,
    classes: Sequence[tuple[torch.Tensor, float]] = (),
) -> NCutResult:
    """The k smallest non-trivial eigenpairs of (D - W) x = lam D x, unbatched.

    Shi and Malik 2000, eq. 11, as M y = mu y with M = D^-1/2 W D^-1/2, y = D^1/2 x, mu = 1 - lam.

    Args:
        w: `[n, n]` float64, symmetric, positive row sums.
        k: pairs wanted, at most n - 2.
        tol: residual that counts as converged.
        classes: tokens of equal rows, bool `[n]`, with the eigenvalue mu of the vectors that
            vanish outside the class and sum to zero on it.
    """
    n = w.shape[0]
    scale = w.sum(1).rsqrt()  # D^-1/2
    m = scale.unsqueeze(1) * w * scale
    trivial = (1 / scale) / (1 / scale).norm()
    average = torch.eye(n, dtype=w.dtype, device=w.device)
    merged: list[tuple[float, torch.Tensor]] = []
    size = n - 1
    for members, eigenvalue in classes:
        count = int(members.sum())
        if count > 1:
            ones = members.to(w.dtype)
            average = average - torch.diag(ones) + torch.outer(ones, ones) / count
            wanted = min(count - 1, k + 1)
            merged += zip([eigenvalue] * wanted, contrasts(members, wanted), strict=True)
            size -= count - 1
    # What is not searched is moved below every eigenvalue of M (>= -1 for weights >= 0): the
    # trivial vector and the contrasts of the classes.
    below = 3.0 if bool((w >= 0).all()) else 2 + float(m.norm())
    rest = torch.eye(n, dtype=w.dtype, device=w.device) - average
    searched = average @ m @ average - below * (torch.outer(trivial, trivial) + rest)
    values, vectors = torch.linalg.eigh((searched + searched.T) / 2)
    top = range(n - 1, n - 1 - min(size, k + 1), -1)
    merged = [(float(values[i]), average @ vectors[:, i]) for i in top] + merged
    merged.sort(key=lambda pair: -pair[0])
    mu = torch.tensor([pair[0] for pair in merged[: k + 1]], dtype=w.dtype, device=w.device)
    y = torch.stack([pair[1] / pair[1].norm() for pair in merged[: k + 1]])  # [k + 1, n]
    residual = (y @ m - mu.unsqueeze(1) * y).norm(dim=1)  # [k + 1]
    x = torch.stack([with_sign(row) for row in y[:k] * scale])  # [k, n]
    gaps = mu[:-1] - mu[1:]  # [k]
    return NCutResult(
        1 - mu[:k],
        x,
        residual[:k],
        gaps.min(),
        torch.ones((), dtype=torch.int64, device=w.device),
        (residual[:k] <= tol).all(),
        gaps.min() <= DEGENERATE_GAP,
        _uncertain(x[0], scale, gaps[0], residual[:2].clamp_min(_FLOOR)),
    )


def _uncertain(
    x: torch.Tensor, scale: torch.Tensor, gap: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """Tokens of `x` `[n]` whose side of the mean the residuals of lam_2, lam_3 do not certify.

    Davis and Kahan: |y - y*| <= sqrt(2) r / (mu_2 - mu_3 - r_3).
    """
    separation = gap - residual[1]
    if float(gap) <= DEGENERATE_GAP or float(separation) <= 0:
        return torch.tensor(x.shape[0], device=x.device)
    delta = math.sqrt(2) * residual[0] / separation
    bound = delta * (scale + scale.norm() / x.shape[0])
    undecided: torch.Tensor = ((x - x.mean()).abs() <= bound).sum()
    return undecided


def solve_edges(b: torch.Tensor, eps: float, k: int, tol: float) -> NCutResult:
    """`solve_dense` of W = eps + (1 - eps) B, B bool `[n, n]`."""
    n = b.shape[0]
    alike, isolated = equal_rows(b)
    classes = ((alike, 0.0), (isolated, (1 - eps) / (1 - eps + n * eps)))
    return solve_dense(eps + (1 - eps) * b.double(), k, tol, classes)


def _images(
    features: list[torch.Tensor], masks: list[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(features [n, c], masked [n]) of every image of every group."""
    for i, group in enumerate(features):
        masked = masks[i] if masks else torch.zeros_like(group[..., 0], dtype=torch.bool)
        yield from zip(group, masked, strict=True)


def padded(rows: list[torch.Tensor], like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The tensors `rows`, of different last sizes, in one `[len(rows), *shape]` filled with 0."""
    dtype = rows[0].dtype if rows else torch.float64
    out = torch.zeros((len(rows), *shape), dtype=dtype, device=like.device)
    for row, target in zip(rows, out, strict=True):
        target[tuple(slice(size) for size in row.shape)] = row
    return out


def stacked(
    results: list[tuple[torch.Tensor, ...]],
    features: list[torch.Tensor],
    empty: tuple[tuple[torch.dtype, tuple[int, ...]], ...],
) -> tuple[torch.Tensor, ...]:
    """Results of single images as the outputs of a raw op, padded to the largest n.

    Args:
        results: one tuple of tensors for each image.
        features: the groups, for the device.
        empty: dtype and shape without b of every output.
    """
    return tuple(
        padded([result[i] for result in results], features[0], shape).to(dtype)
        for i, (dtype, shape) in enumerate(empty)
    )


_F64, _I64, _BOOL = torch.float64, torch.int64, torch.bool


def _pair_outputs(k: int, n: int) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    return (
        (_F64, (k,)),
        (_F64, (k, n)),
        (_F64, (k,)),
        (_F64, ()),
        (_I64, ()),
        (_BOOL, ()),
        (_BOOL, ()),
        (_I64, ()),
    )


def pair_outputs(
    results: list[NCutResult], features: list[torch.Tensor], k: int, tol: float, check: bool
) -> tuple[torch.Tensor, ...]:
    """Outputs of ncut_fwd and ncut_affinity_fwd; warns of what did not converge."""
    n = max(group.shape[1] for group in features)
    outputs = stacked([tuple(r) for r in results], features, _pair_outputs(k, n))
    if check:
        warn_not_converged(outputs[5], outputs[4], outputs[2], tol)
    return outputs


def ncut_fwd(
    features: list[torch.Tensor],
    mask: list[torch.Tensor],
    tau: float,
    eps: float,
    k: int,
    tol: float,
    max_iter: int,  # noqa: ARG001
    check: bool,
) -> tuple[torch.Tensor, ...]:
    if check:
        require_finite(features)
    results = [
        solve_edges(edges(image, tau, masked), eps, k, tol)
        for image, masked in _images(features, mask)
    ]
    return pair_outputs(results, features, k, tol, check)


def ncut_affinity_fwd(
    affinity: torch.Tensor,
    k: int,
    tol: float,
    max_iter: int,  # noqa: ARG001
    check: bool,
) -> tuple[torch.Tensor, ...]:
    if check:
        require_affinity(affinity)
    results = [solve_affinity(matrix, k, tol) for matrix in affinity]
    return pair_outputs(results, [affinity], k, tol, check)


def solve_affinity(matrix: torch.Tensor, k: int, tol: float) -> NCutResult:
    """`solve_dense` of the symmetric matrix that the upper triangle of `[n, n]` defines."""
    w = matrix.double()
    w = w.triu() + w.triu(1).T
    low, high = w.min(), w.max()
    b = w == high
    if float(low) < float(high) and not bool((b | (w == low)).all()):
        return solve_dense(w, k, tol)
    alike, isolated = equal_rows(b)
    degree = (w.sum(1) * isolated).max()
    classes = ((alike, 0.0), (isolated, float((high - low) / degree.clamp_min(high))))
    return solve_dense(w, k, tol, classes)


def stage_outputs(
    results: list[Stages], features: list[torch.Tensor], n_masks: int, tol: float, check: bool
) -> tuple[torch.Tensor, ...]:
    """Outputs of maskcut_fwd; warns of what did not converge."""
    n, m = max(group.shape[1] for group in features), n_masks
    shapes = (
        *((_BOOL, (m, n)), (_I64, (m,)), (_BOOL, (m, n)), (_I64, (m,))),
        *((_F64, (m,)), (_F64, (m,)), (_F64, (m,)), (_I64, (m,)), (_BOOL, (m,)), (_BOOL, (m,))),
        *((_F64, (m, n)), (_I64, (m,))),
    )
    outputs = stacked([tuple(r) for r in results], features, shapes)
    if check:
        tried = outputs[1] != 5
        warn_not_converged(outputs[9] | ~tried, outputs[11], outputs[6], tol)
    return outputs[:11]


def maskcut_fwd(
    features: list[torch.Tensor],
    grid: list[int],
    n_masks: int,
    tau: float,
    eps: float,
    iou_threshold: float,
    min_area: float,
    corners: int,
    on_reject: str,
    tol: float,
    max_iter: int,  # noqa: ARG001
    check: bool,
) -> tuple[torch.Tensor, ...]:
    if check:
        require_finite(features)
    results = []
    for i, group in enumerate(features):
        cells = (grid[2 * i], grid[2 * i + 1])
        for image in group:
            results.append(
                maskcut_stages(
                    lambda painted, image=image: solve_edges(  # type: ignore[misc]
                        edges(image, tau, painted), eps, 1, tol
                    ),
                    cells,
                    n_masks,
                    iou_threshold,
                    min_area,
                    corners,
                    on_reject,
                    image.device,
                )
            )
    return stage_outputs(results, features, n_masks, tol, check)


def tokencut_fwd(
    features: list[torch.Tensor],
    grid: list[int],
    tau: float,
    eps: float,
    binary: bool,
    tol: float,
    max_iter: int,  # noqa: ARG001
    check: bool,
) -> tuple[torch.Tensor, ...]:
    if check:
        require_finite(features)
    pairs, grids = [], []
    for i, group in enumerate(features):
        for image in group:
            if binary:
                b = edges(image, tau, torch.zeros_like(image[:, 0], dtype=torch.bool))
                pairs.append(solve_edges(b, eps, 1, tol))
            else:
                pairs.append(solve_dense(weights(image, tau, eps, len(pairs)), 1, tol))
            grids.append((grid[2 * i], grid[2 * i + 1]))
    return object_outputs(pairs, grids, features, tol, check)


def object_outputs(
    pairs: list[NCutResult],
    grids: list[tuple[int, int]],
    features: list[torch.Tensor],
    tol: float,
    check: bool,
    connected: Callable[[torch.Tensor, int, tuple[int, int]], torch.Tensor] = component,
) -> tuple[torch.Tensor, ...]:
    """Outputs of tokencut_fwd; warns of what did not converge."""
    results: list[tuple[torch.Tensor, ...]] = []
    for pair, cells in zip(pairs, grids, strict=True):
        found = tokencut_object(pair, cells, connected)
        results.append(
            (
                *(found.mask, found.box, found.seed, pair.eigenvectors[0], found.foreground),
                *(pair.eigenvalues[0], pair.gap, pair.residual[0], pair.uncertain),
                *(pair.degenerate, pair.converged),
            )
        )
    n = max(group.shape[1] for group in features)
    shapes = (
        *((_BOOL, (n,)), (_I64, (4,)), (_I64, ()), (_F64, (n,)), (_BOOL, (n,))),
        *((_F64, ()), (_F64, ()), (_F64, ()), (_I64, ()), (_BOOL, ()), (_BOOL, ())),
    )
    outputs = stacked(results, features, shapes)
    if check and pairs:
        passes = torch.stack([pair.iterations for pair in pairs])
        warn_not_converged(outputs[10], passes, outputs[7], tol)
    return outputs


def weights(features: torch.Tensor, tau: float, eps: float, entry: int) -> torch.Tensor:
    """W = where(S < tau, eps, S) of `[n, c]`, float64 `[n, n]`; S = tau stays.

    Raises:
        ValueError: a row whose weights do not sum to a positive degree.
    """
    s = cosines(features)
    below = s < torch.tensor(tau, dtype=s.dtype, device=s.device)
    w = torch.where(below, torch.full_like(s, eps, dtype=torch.float64), s.double())
    require_degrees(w.sum(1), entry, f"tau={tau} with binary=False")
    return w
