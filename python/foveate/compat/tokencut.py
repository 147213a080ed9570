"""TokenCut under the names and argument orders of its repository (CVPR 2022).

Results are NumPy fp64. Where the second eigenvalue is multiple, masks are empty and the seed is -1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import foveate
from foveate.compat._inputs import array, nearest, tensor
from foveate.methods._optional import optional

Plane = NDArray[np.float64]


def ncut(
    feats: Any,
    dims: tuple[int, int],
    scales: tuple[float, float],
    init_image_size: tuple[int, int, int],
    tau: float = 0,
    eps: float = 1e-5,
    im_name: str = "",
    no_binary_graph: bool = False,
) -> tuple[Plane, Plane, Plane, int, None, Plane]:
    """TokenCut of `feats` [1, 1 + N, C], whose first token (the class token) is dropped.

    Args:
        dims: the grid (h, w), h w = N.
        scales: pixels per token, down and across.
        init_image_size: (3, H, W).
        no_binary_graph: keep cosines of at least tau as weights.

    Returns:
        The box (x0, y0, x1, y1) in pixels, clipped; the labels [h, w] of the foreground's
        components; the mask [h, w]; the seed token; None; the eigenvector [h, w].
    """
    del im_name
    grid = (int(dims[0]), int(dims[1]))
    tokens = tensor(feats)[0, 1:]
    result = foveate.tokencut(tokens, grid, tau=tau, eps=eps, binary=not no_binary_graph)
    vector = array(result.eigenvector).reshape(grid)
    seed = int(result.seed)
    if seed < 0:
        return np.zeros(4), np.zeros(grid), np.zeros(grid), -1, None, vector
    sides = (int(init_image_size[1]), int(init_image_size[2]))
    box, _, labels, _ = detect_box(array(result.foreground), seed, grid, sides, scales)
    return box, labels, array(result.mask), seed, None, vector


def ncut_saliency(
    feats: Any,
    dims: tuple[int, int],
    scales: tuple[float, float],
    init_image_size: tuple[int, int],
    tau: float = 0,
    eps: float = 1e-5,
    im_name: str = "",
    no_binary_graph: bool = False,
) -> tuple[int, Plane, Plane]:
    """TokenCut of `feats` [C, N]: the seed, the mask and the eigenvector.

    Mask and vector are upsampled by nearest to `init_image_size` (H, W).
    """
    del scales, im_name
    grid = (int(dims[0]), int(dims[1]))
    size = (int(init_image_size[0]), int(init_image_size[1]))
    result = foveate.tokencut(
        tensor(feats).transpose(0, 1), grid, tau=tau, eps=eps, binary=not no_binary_graph
    )
    vector = array(result.eigenvector).reshape(grid)
    return int(result.seed), nearest(result.mask, size), nearest(vector, size)


def detect_box(
    bipartition: Any,
    seed: int,
    dims: tuple[int, int],
    initial_im_size: tuple[int, int] | None = None,
    scales: tuple[float, float] | None = None,
    principle_object: bool = True,
) -> tuple[Plane, list[int], Plane, tuple[NDArray[np.intp], ...]]:
    """The box of the 4-connected foreground component that holds the seed.

    Args:
        bipartition: [h, w] or [h w], non-zero is foreground.
        seed: a token of the foreground.
        initial_im_size: (H, W) to which the box is clipped.
        scales: pixels per token, down and across; None: tokens.

    Returns:
        The box (x0, y0, x1, y1), half-open; [y0, x0, y1, x1] in tokens; the components' labels
        [h, w]; the row and column indices of the component.

    Raises:
        NotImplementedError: `principle_object` is False.
        ValueError: the seed is not in the foreground.
    """
    if not principle_object:
        raise NotImplementedError("detect_box finds the seed's component, not all of them")
    label = optional("scipy.ndimage").label
    labels, _ = label(array(bipartition).reshape(dims) != 0)
    row, column = divmod(int(seed), int(dims[1]))
    if not 0 <= row < dims[0] or labels[row, column] == 0:
        raise ValueError(f"seed must be a token of the foreground, got {seed}")
    inside = np.nonzero(labels == labels[row, column])
    y0, x0 = (int(side.min()) for side in inside)
    y1, x1 = (int(side.max()) + 1 for side in inside)
    down, across = (1, 1) if scales is None else scales
    box = np.array([across * x0, down * y0, across * x1, down * y1], dtype=np.float64)
    if initial_im_size is not None:
        box[2] = min(box[2], initial_im_size[1])
        box[3] = min(box[3], initial_im_size[0])
    return box, [y0, x0, y1, x1], labels.astype(np.float64), inside
