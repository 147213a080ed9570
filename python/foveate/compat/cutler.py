"""MaskCut under the names and argument orders of CutLER's maskcut.py (CVPR 2023).

Features are [C, N] and may be torch or NumPy; results are NumPy fp64. Solutions are foveate's:
exact, with a canonical sign, and empty masks where the second eigenvalue is multiple.
"""

from __future__ import annotations

import datetime
import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import foveate
from foveate.compat._inputs import array, nearest, tensor, unit_rows
from foveate.methods._optional import optional

_MEAN = (0.485, 0.456, 0.406)  # of ImageNet, per channel
_STD = (0.229, 0.224, 0.225)

Plane = NDArray[np.float64]


def get_affinity_matrix(feats: Any, tau: float, eps: float = 1e-5) -> tuple[Plane, Plane]:
    """A [N, N] with 1 where the cosine of two columns of `feats` [C, N] exceeds tau, else eps;
    and D, the diagonal matrix of its row sums.
    """
    unit = unit_rows(tensor(feats).transpose(0, 1))  # [N, C]
    affinity = np.where((unit @ unit.T > tau).cpu().numpy(), 1.0, eps)
    return affinity, np.diag(affinity.sum(axis=1))


def second_smallest_eigenvector(A: Any, D: Any) -> tuple[Plane, Plane]:
    """The second smallest eigenvector of (D - A) x = lam D x, x^T D x = 1, and a copy of it.

    In place of a dense `eigh`: import this function instead of the original.

    Args:
        A: [N, N] symmetric, non-negative, torch or NumPy.
        D: its row sums, as a diagonal matrix [N, N] or as its diagonal [N].

    Returns:
        (copy, vector), [N] each. The largest entry is positive.

    Raises:
        ValueError: D is not the row sums of A (relative 1e-5), or A is no affinity.
    """
    affinity, degree = tensor(A), tensor(D).to(torch.float64)
    sums = affinity.to(torch.float64).sum(dim=-1)
    n = sums.numel()
    if affinity.ndim != 2 or affinity.shape != (n, n) or degree.shape not in ((n, n), (n,)):
        raise ValueError(
            "A must be [N, N] and D [N, N] or [N], "
            f"got {tuple(affinity.shape)} and {tuple(degree.shape)}"
        )
    expected = torch.diag(sums) if degree.ndim == 2 else sums
    worst = float((degree.to(sums.device) - expected).abs().max())
    if not worst <= 1e-5 * float(sums.abs().max()) or not bool(
        ((degree.to(sums.device) - expected).abs() <= 1e-5 * expected.abs() + 1e-300).all()
    ):
        raise ValueError(
            f"D must be the row sums of A (relative 1e-5), got a difference of {worst}"
        )
    if not affinity.dtype.is_floating_point:
        affinity = affinity.to(torch.float64)
    vector = array(foveate.ncut_affinity(affinity, k=1).eigenvectors[0])
    return vector.copy(), vector


def get_salient_areas(second_smallest_vec: Any) -> NDArray[np.bool_]:
    """Which entries exceed the mean."""
    vector = array(second_smallest_vec)
    return np.asarray(vector > vector.mean())


def check_num_fg_corners(bipartition: Any, dims: tuple[int, int]) -> int:
    """How many of the four corners of the grid `dims` are foreground."""
    plane = array(bipartition).reshape(dims) > 0
    return int(plane[[0, 0, -1, -1], [0, -1, 0, -1]].sum())


def get_masked_affinity_matrix(
    painting: Any, feats: Any, mask: Any, ps: int
) -> tuple[Plane, Plane]:
    """`feats` [C, N] with the tokens of `painting` or `mask` zeroed, and the two united (0 or 1).

    `ps` is the side of the original's square grid; the grid here is the mask's.
    """
    del ps
    seen, fresh, values = array(painting), array(mask), array(feats)
    united = (seen + fresh.reshape(seen.shape) > 0).astype(np.float64)
    if values.ndim != 2 or values.shape[1] != united.size:
        raise ValueError(f"feats must be [C, N] with N = {united.size}, got {values.shape}")
    return values * (1 - united.reshape(1, -1)), united


def maskcut_forward(
    feats: Any,
    dims: tuple[int, int],
    scales: Any,
    init_image_size: tuple[int, int],
    tau: float = 0,
    N: int = 3,
    cpu: bool = False,
) -> tuple[int, list[Plane], list[Plane]]:
    """N MaskCut stages on `feats` [C, n] of the grid `dims`.

    `scales` and `cpu` are accepted: the sizes and the features' device decide.

    Returns:
        The last stage's seed (-1 if it had none); N masks, 0 or 1; N eigenvectors, not reversed;
        masks and vectors upsampled by nearest to `init_image_size` (H, W).
    """
    del scales, cpu
    size = (int(init_image_size[0]), int(init_image_size[1]))
    grid = (int(dims[0]), int(dims[1]))
    result = foveate.maskcut(
        tensor(feats).transpose(0, 1), grid, n_masks=N, tau=tau, corners=3, on_reject="retry"
    )
    masks = [nearest(mask, size) for mask in result.masks]
    vectors = [nearest(vector.reshape(grid), size) for vector in result.eigenvectors]
    return int(result.seeds[-1]), masks, vectors


def maskcut(
    img_path: str | os.PathLike[str],
    backbone: Any,
    patch_size: int,
    tau: float,
    N: int = 1,
    fixed_size: int = 480,
    cpu: bool = False,
) -> tuple[list[Plane], list[Plane], Any]:
    """`maskcut_forward` of the picture at `img_path`.

    It is resampled (LANCZOS) to `fixed_size` squared and to the nearest multiple of `patch_size`.

    Args:
        backbone: maps [1, 3, S, S], normalised with ImageNet's statistics and on the backbone's
            device, to an object whose item 0 is [C, n].

    Returns:
        N masks and N vectors [S, S], and the resampled picture (PIL).
    """
    del cpu
    image_module = optional("PIL.Image")
    lanczos = image_module.Resampling.LANCZOS
    side = round(fixed_size / patch_size)
    with image_module.open(img_path) as file:
        picture = file.convert("RGB").resize((fixed_size, fixed_size), lanczos)
    picture = picture.resize((side * patch_size, side * patch_size), lanczos)
    pixels = torch.from_numpy(np.array(picture)).to(torch.float32) / 255
    inputs = ((pixels - torch.tensor(_MEAN)) / torch.tensor(_STD)).permute(2, 0, 1).unsqueeze(0)
    with torch.no_grad():
        feats: Tensor = backbone(inputs.to(_device_of(backbone)))[0]
    _, masks, vectors = maskcut_forward(
        feats, (side, side), (patch_size, patch_size), (picture.height, picture.width), tau, N
    )
    return masks, vectors, picture


def _device_of(backbone: Any) -> torch.device:
    first = next(backbone.parameters(), None) if isinstance(backbone, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def resize_binary_mask(array: Any, new_size: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask at `new_size` (width, height), true where Pillow's filter leaves a trace."""
    image_module = optional("PIL.Image")
    levels = (np.asarray(array) != 0).astype(np.uint8) * 255
    return np.asarray(image_module.fromarray(levels).resize(new_size)) > 0


def create_image_info(
    image_id: int,
    file_name: str,
    image_size: tuple[int, int],
    date_captured: str | None = None,
    license_id: int = 1,
    coco_url: str = "",
    flickr_url: str = "",
) -> dict[str, Any]:
    """A COCO image record; `image_size` is (width, height), the date defaults to the present."""
    if date_captured is None:
        date_captured = datetime.datetime.now(datetime.timezone.utc).isoformat(" ")
    return {
        "id": image_id,
        "file_name": file_name,
        "width": image_size[0],
        "height": image_size[1],
        "date_captured": date_captured,
        "license": license_id,
        "coco_url": coco_url,
        "flickr_url": flickr_url,
    }


def create_annotation_info(
    annotation_id: int,
    image_id: int,
    category_info: dict[str, Any],
    binary_mask: Any,
    image_size: tuple[int, int] | None = None,
    bounding_box: Any = None,
) -> dict[str, Any] | None:
    """A COCO annotation of the pixels above half the maximum; None when there is none.

    `category_info` has `id` and `is_crowd`; `image_size` (width, height) resizes the mask.
    """
    rle_module = optional("pycocotools.mask")
    values = array(binary_mask)
    mask = values > values.max(initial=0) / 2
    if image_size is not None:
        mask = resize_binary_mask(mask, image_size)
    rle = rle_module.encode(np.asfortranarray(mask, dtype=np.uint8))
    area = int(rle_module.area(rle))
    if area < 1:
        return None
    box = rle_module.toBbox(rle) if bounding_box is None else np.asarray(bounding_box)
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_info["id"],
        "iscrowd": category_info["is_crowd"],
        "area": area,
        "bbox": box.tolist(),
        "segmentation": {
            "size": [int(side) for side in rle["size"]],
            "counts": rle["counts"].decode("ascii"),
        },
        "width": mask.shape[1],
        "height": mask.shape[0],
    }
