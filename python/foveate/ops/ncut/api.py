"""Normalized cuts of token graphs, and the masks that MaskCut and TokenCut make of them."""

from __future__ import annotations

from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import floating, integer, one_of
from foveate._dispatch import select
from foveate.ops.ncut.api_raw import (
    differentiable_affinity,
    maskcut_fwd,
    ncut_fwd,
    tokencut_fwd,
)
from foveate.ops.ncut.arguments import (
    Graphs,
    effort,
    floor_weight,
    fraction,
    graphs,
    grids,
    output_size,
    pairs_wanted,
    require_three_tokens,
    threshold,
)
from foveate.ops.ncut.results import MaskCutResult, NCutResult, TokenCutResult

_FAMILY = "ncut"


def ncut(
    features: Any,
    *,
    tau: float = 0.2,
    eps: float = 1e-5,
    k: int = 1,
    mask: Any = None,
    tol: float = 1e-9,
    max_iter: int = 256,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """The k smallest non-trivial eigenpairs of a thresholded cosine graph's normalized Laplacian.

    f_i = F_i / max(|F_i|_2, 1e-12), B_ij = [f_i . f_j > tau], W = eps + (1 - eps) B, D = diag(W 1);
    (D - W) x = lam D x. Sources: Shi and Malik, "Normalized Cuts and Image Segmentation" (PAMI
    2000), eq. 11; TokenCut (CVPR 2022), section 3. W is kept as bits, the eigenpairs are exact to
    rounding and certified; D^-1/2 is applied, and the largest entry of every vector is positive.

    Args:
        features: `[b, n, c]`, `[n, c]`, or a list of `[n_i, c_i]` (one dtype, one device), float16,
            bfloat16, float32 or float64, any strides, without a class token. NumPy and CuPy arrays
            are taken and given back.
        tau: cosine that an edge exceeds, below 1.
        eps: weight of an absent edge, inside (0, 1).
        k: pairs wanted, 1..16, at most n - 2.
        mask: bool `[b, n]` or `[n]` (a list with a list), True: the token's features count as zero.
        tol: residual wanted.
        max_iter: most passes of the search over the affinity.
        check: None, True: features are scanned for NaN and infinity. False: not.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        `NCutResult` in float64 on the device of the features; without the axis b for `[n, c]`; a
        list of such for a list.

    Raises:
        TypeError: features are not floating, a mask is not bool, dtypes are mixed.
        ValueError: a value, shape, k, tau, eps, tol or max_iter outside what is allowed.
        NotImplementedError: the named backend cannot run this.
    """
    graph = graphs(features, mask)
    tokens = [group.shape[1] for group in graph.groups]
    k = pairs_wanted(k, tokens)
    tau, eps = threshold(tau), floor_weight(eps)
    tol, max_iter, checked = effort(tol, max_iter, check)
    name = _backend("ncut_fwd", graph, backend, k)
    if not graph.groups:
        return []
    outputs = ncut_fwd(graph.groups, graph.masks, tau, eps, k, tol, max_iter, checked, name)
    if graph.layout == "batch":
        return graph.back(NCutResult(*outputs))
    singles = [
        NCutResult(*(out[i] for out in outputs))._replace(eigenvectors=outputs[1][i, :, :n])
        for i, n in enumerate(tokens)
    ]
    return graph.back(singles if graph.layout == "list" else singles[0])


def ncut_affinity(
    affinity: Any,
    *,
    k: int = 1,
    tol: float = 1e-9,
    max_iter: int = 256,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """The k smallest non-trivial eigenpairs of (D - W) x = lam D x for a given affinity W.

    Source: Shi and Malik 2000, eq. 11. An affinity of exactly two values is solved as bits, any
    other with its weights. Eigenvalues and eigenvectors are differentiable once with respect to
    the affinity; the gradient is symmetric, and NaN (with a warning) where the result is
    degenerate.

    Args:
        affinity: `[b, n, n]` or `[n, n]`, floating, symmetric to 1e-6 of its largest entry (the
            upper triangle defines it), non-negative, with positive row sums. NumPy and CuPy arrays
            are taken and given back.
        k: pairs wanted, 1..16, at most n - 2.
        tol: residual wanted.
        max_iter: most passes of the search over the affinity.
        check: None, True: the values of the affinity are checked. False: not.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        `NCutResult` in float64, without the axis b for `[n, n]`.

    Raises:
        TypeError: the affinity is not floating.
        ValueError: the affinity is not square, finite, symmetric, non-negative or has a row without
            weight; k, tol or max_iter outside what is allowed.
        NotImplementedError: the named backend cannot run this.
    """
    (affinity,), back = as_tensors(affinity=affinity)
    floating(affinity=affinity)
    if affinity.ndim not in (2, 3) or affinity.shape[-1] != affinity.shape[-2]:
        raise ValueError(
            f"affinity must be square, [b, n, n] or [n, n], got shape {tuple(affinity.shape)}"
        )
    k = pairs_wanted(k, [affinity.shape[-1]])
    tol, max_iter, checked = effort(tol, max_iter, check)
    batch = affinity if affinity.ndim == 3 else affinity.unsqueeze(0)
    name = select(_FAMILY, "ncut_affinity_fwd", backend, batch.device.type, [batch], k)
    result = NCutResult(*differentiable_affinity(batch, k, tol, max_iter, checked, name))
    return back(result if affinity.ndim == 3 else NCutResult(*(out[0] for out in result)))


def maskcut(
    features: Any,
    grid: Any,
    *,
    n_masks: int = 3,
    tau: float = 0.15,
    eps: float = 1e-5,
    iou_threshold: float = 0.5,
    min_area: float = 0.01,
    corners: int | None = 3,
    on_reject: str = "retry",
    size: Any = None,
    tol: float = 1e-9,
    max_iter: int = 256,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """Up to `n_masks` object masks per image: cut, keep a component, paint it out, cut again.

    Each stage solves `ncut` with the accepted tokens masked, splits the vector at its mean, takes
    the side that does not hold `corners` grid corners and keeps the 4-connected component of that
    side's extreme token. Source: MaskCut, in CutLER (CVPR 2023), section 3.2. The sign of a vector
    is canonical (largest entry positive), where the original takes what LAPACK returns.

    Args:
        features: as for `ncut`.
        grid: (h, w), h w = n, row-major; a list of pairs with a list.
        n_masks: stages, at least 1.
        tau: cosine that an edge exceeds, below 1.
        eps: weight of an absent edge, inside (0, 1).
        iou_threshold: a candidate whose IoU with the one before it is larger is rejected.
        min_area: after stage 0, a candidate of at most this fraction of the tokens is rejected.
        corners: 1..4, a side that holds so many grid corners is background; None: never.
        on_reject: "retry" forgets the candidate before and tries the same vector again (the
            original), "stop" ends, "skip" paints the candidate out and goes on.
        size: (H, W) of the masks, by nearest: source row floor(y h / H); None: the grid.
        tol, max_iter, check, backend: as for `ncut`.

    Returns:
        `MaskCutResult` on the device of the features; without the axis b for `[n, c]`; a list of
        such for a list.

    Raises:
        TypeError: features are not floating, dtypes are mixed.
        ValueError: grid and n differ, or an argument is outside what is allowed.
        NotImplementedError: the named backend cannot run this.
    """
    graph = graphs(features)
    cells = grids(grid, graph)
    require_three_tokens([group.shape[1] for group in graph.groups])
    n_masks = integer("n_masks", n_masks, 1)
    tau, eps = threshold(tau), floor_weight(eps)
    iou_threshold = fraction("iou_threshold", iou_threshold)
    min_area = fraction("min_area", min_area)
    held = 0 if corners is None else integer("corners", corners, 1, 4)
    one_of("on_reject", on_reject, ("retry", "stop", "skip"))
    target = output_size(size)
    tol, max_iter, checked = effort(tol, max_iter, check)
    name = _backend("maskcut_fwd", graph, backend, 1)
    if not graph.groups:
        return []
    flat = [side for pair in cells for side in pair]
    outputs = maskcut_fwd(
        graph.groups,
        flat,
        n_masks,
        tau,
        eps,
        iou_threshold,
        min_area,
        held,
        on_reject,
        tol,
        max_iter,
        checked,
        name,
    )
    if graph.layout == "batch":
        masks, status, candidates, *rest = outputs
        result = MaskCutResult(
            _upsampled(masks, cells[0], target), status, candidates.unflatten(-1, cells[0]), *rest
        )
        return graph.back(result)
    singles = []
    for i, (h, w) in enumerate(cells):
        masks, status, candidates, *rest = (out[i] for out in outputs)
        singles.append(
            MaskCutResult(
                _upsampled(masks[:, : h * w], (h, w), target),
                status,
                candidates[:, : h * w].unflatten(-1, (h, w)),
                *rest,
            )._replace(eigenvectors=outputs[-1][i, :, : h * w])
        )
    return graph.back(singles if graph.layout == "list" else singles[0])


def tokencut(
    features: Any,
    grid: Any,
    *,
    tau: float = 0.2,
    eps: float = 1e-5,
    binary: bool = True,
    size: Any = None,
    tol: float = 1e-9,
    max_iter: int = 256,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """The salient object of each image: mask, box and eigenvector of one normalized cut.

    fg = x > mean(x) of the second eigenvector x; the mask is the 4-connected component of fg that
    holds the token with the largest entry. Source: TokenCut (CVPR 2022), section 3.

    Args:
        features: as for `ncut`.
        grid: (h, w), h w = n, row-major; a list of pairs with a list.
        tau: cosine that an edge exceeds, below 1.
        eps: weight of an absent edge, inside (0, 1).
        binary: True: W = 1 on edges. False: W = where(S < tau, eps, S), the cosines as weights.
        size: (H, W) of the mask, by nearest: source row floor(y h / H); None: the grid.
        tol, max_iter, check, backend: as for `ncut`.

    Returns:
        `TokenCutResult` on the device of the features; without the axis b for `[n, c]`; a list of
        such for a list.

    Raises:
        TypeError: features are not floating, dtypes are mixed.
        ValueError: grid and n differ, an argument is outside what is allowed, or binary=False gives
            a token a degree that is not positive.
        NotImplementedError: the named backend cannot run this.
    """
    graph = graphs(features)
    cells = grids(grid, graph)
    require_three_tokens([group.shape[1] for group in graph.groups])
    tau, eps = threshold(tau), floor_weight(eps)
    one_of("binary", binary, (True, False))
    target = output_size(size)
    tol, max_iter, checked = effort(tol, max_iter, check)
    name = _backend("tokencut_fwd", graph, backend, 1)
    if not graph.groups:
        return []
    flat = [side for pair in cells for side in pair]
    outputs = tokencut_fwd(graph.groups, flat, tau, eps, binary, tol, max_iter, checked, name)
    if graph.layout == "batch":
        mask, box, seed, vector, side, *rest = outputs
        result = TokenCutResult(
            _upsampled(mask, cells[0], target),
            box,
            seed,
            vector,
            side.unflatten(-1, cells[0]),
            *rest,
        )
        return graph.back(result)
    singles = []
    for i, (h, w) in enumerate(cells):
        mask, box, seed, vector, side, *rest = (out[i] for out in outputs)
        singles.append(
            TokenCutResult(
                _upsampled(mask[: h * w], (h, w), target),
                box,
                seed,
                vector[: h * w],
                side[: h * w].unflatten(-1, (h, w)),
                *rest,
            )
        )
    return graph.back(singles if graph.layout == "list" else singles[0])


def _backend(op: str, graph: Graphs, backend: str, k: int) -> str:
    device = graph.groups[0].device.type if graph.groups else "cpu"
    return select(_FAMILY, op, backend, device, graph.groups, k)


def _upsampled(
    masks: torch.Tensor, grid: tuple[int, int], size: tuple[int, int] | None
) -> torch.Tensor:
    """Masks `[.., n]` as `[.., H, W]` by nearest."""
    h, w = grid
    masks = masks.unflatten(-1, (h, w))
    if size is None:
        return masks
    rows = torch.arange(size[0], device=masks.device) * h // size[0]
    columns = torch.arange(size[1], device=masks.device) * w // size[1]
    return masks[..., rows.unsqueeze(1), columns]
