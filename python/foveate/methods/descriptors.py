"""Patch descriptors [n, c] of pictures: colour statistics, a ViT's last block, saved files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foveate._checks import one_of
from foveate.methods._optional import optional

FACETS = ("query", "key", "value", "kqv")

# Linear sRGB to CIE XYZ, and the white point D65 of the 2 degree observer.
_XYZ = np.array(
    [
        (0.412453, 0.357580, 0.180423),
        (0.212671, 0.715160, 0.072169),
        (0.019334, 0.119193, 0.950227),
    ]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])
_LEVELS = np.arange(256) / 255.0
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _lab(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    t = _LINEAR[image] @ (_XYZ / _WHITE[:, None]).T  # [H, W, 3]
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def color_features(image: Any, grid: tuple[int, int]) -> Tensor:
    """Ten numbers per patch from CIELAB alone: a descriptor that needs no weights.

    Columns: the mean of L, a, b / 50; their population standard deviation / 50; the mean absolute
    forward difference of L down and across / 20 (0 in the image's last row or column); the place
    0.5 (i + 0.5) / h and 0.5 (j + 0.5) / w. Each column is then centred over the image, so that the
    cosine of two patches tells whether they differ from the average in the same direction.

    Args:
        image: [H, W, 3] uint8 sRGB, a NumPy array or a tensor.
        grid: (h, w) patches; h divides H and w divides W.

    Returns:
        [h w, 10] fp32, rows in row-major order, computed in fp64.

    Raises:
        TypeError: the image is not uint8.
        ValueError: it is not [H, W, 3], or the grid does not divide it.
    """
    pixels = np.asarray(image)
    h, w = grid
    if pixels.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {pixels.dtype}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"image must be [H, W, 3], got {pixels.shape}")
    height, width = pixels.shape[:2]
    if h < 1 or w < 1 or height % h or width % w:
        raise ValueError(f"grid must divide the image's {height} x {width}, got {h} x {w}")
    lab = _lab(pixels)
    lightness = lab[..., 0]
    down, across = np.zeros((2, height, width))
    down[:-1] = np.abs(np.diff(lightness, axis=0))
    across[:, :-1] = np.abs(np.diff(lightness, axis=1))

    def patches(plane: NDArray[np.float64]) -> NDArray[np.float64]:
        tiles = plane.reshape(h, height // h, w, width // w).transpose(0, 2, 1, 3)
        return tiles.reshape(h * w, -1)  # [n, pixels of a patch]

    channels = [patches(lab[..., i]) for i in range(3)]
    rows, columns = np.divmod(np.arange(h * w), w)
    table = np.stack(
        [
            *(channel.mean(axis=1) / 50 for channel in channels),
            *(channel.std(axis=1) / 50 for channel in channels),
            patches(down).mean(axis=1) / 20,
            patches(across).mean(axis=1) / 20,
            0.5 * (rows + 0.5) / h,
            0.5 * (columns + 0.5) / w,
        ],
        axis=1,
    )  # [n, 10]
    return torch.from_numpy((table - table.mean(axis=0)).astype(np.float32))


def patch_size(model: nn.Module) -> int:
    """The side of the model's square patches, in pixels.

    Raises:
        NotImplementedError: the model has no `patch_embed` with square patches.
    """
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
    if sides[0] is None or sides[0] != sides[1]:
        raise NotImplementedError(f"the model must have square patches, got patch_size {size}")
    return int(sides[0])


def normalized(image: NDArray[np.uint8], model: nn.Module) -> Tensor:
    """`image` [H, W, 3] uint8 as [3, H, W] fp32, with the model's own mean and std."""
    config = getattr(model, "pretrained_cfg", None) or {}
    mean = torch.tensor(config.get("mean") or _IMAGENET[0])
    std = torch.tensor(config.get("std") or _IMAGENET[1])
    scaled = torch.from_numpy(image).to(torch.float32) / 255
    return ((scaled - mean) / std).permute(2, 0, 1).contiguous()


def vit_features(model: nn.Module, images: Tensor, *, facet: str = "key") -> Tensor:
    """What the last block's attention computes for each patch: its key, query, value, or all.

    Args:
        model: a timm vision transformer; `blocks[-1].attn.qkv` is hooked for this one call.
        images: [b, 3, H, W], normalised, on the model's device.
        facet: "query", "key", "value", or "kqv", the three concatenated in that order.

    Returns:
        [b, n, c] fp32 (3 c for "kqv"), no class or register tokens, no gradient.

    Raises:
        ValueError: an unknown facet, or images of another rank.
        NotImplementedError: the last block has no fused qkv projection that its attention calls.
    """
    one_of("facet", facet, FACETS)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [b, 3, H, W], got {tuple(images.shape)}")
    blocks: Any = getattr(model, "blocks", None)
    layer = getattr(getattr(blocks[-1], "attn", None), "qkv", None) if blocks else None
    if not isinstance(layer, nn.Module):
        raise NotImplementedError(
            f"the model must have a fused blocks[-1].attn.qkv, {type(model).__name__} has none"
        )
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        seen.append(output)

    forward = getattr(model, "forward_features", model)
    handle = layer.register_forward_hook(keep)
    try:
        with torch.no_grad():
            forward(images)
    finally:
        handle.remove()
    if not seen:
        raise NotImplementedError(
            f"the model must call blocks[-1].attn.qkv, {type(model).__name__} does not"
        )
    prefix = int(getattr(model, "num_prefix_tokens", 1))
    query, key, value = seen[-1][:, prefix:].float().chunk(3, dim=-1)  # [b, n, c] each
    if facet == "kqv":
        return torch.cat([key, query, value], dim=-1)
    return {"query": query, "key": key, "value": value}[facet].contiguous()


def read_features(folder: Path, name: str) -> tuple[Tensor, tuple[int, int]]:
    """The descriptors saved for the picture `name`, [n, c], and their grid.

    The file is `folder/<name without suffix>.npy`, or `.safetensors` with the key `features`; it
    holds [h, w, c], or [n, c] with n a square.

    Raises:
        FileNotFoundError: there is neither file.
        TypeError: the values are not floating point.
        ValueError: another shape, fewer than 3 tokens, NaN or Inf.
    """
    stem = folder / Path(name).with_suffix("")
    arrays, tensors = (stem.parent / f"{stem.name}{suffix}" for suffix in (".npy", ".safetensors"))
    if arrays.is_file():
        values = torch.from_numpy(np.array(np.load(arrays, allow_pickle=False)))
    elif tensors.is_file():
        with optional("safetensors").safe_open(tensors, framework="pt") as file:
            values = file.get_tensor("features")
    else:
        raise FileNotFoundError(f"features must be saved as {arrays} or {tensors.name}")
    if not values.dtype.is_floating_point:
        raise TypeError(f"features must be floating point, got {values.dtype}")
    shape = tuple(values.shape)
    if values.ndim == 3:
        grid = (shape[0], shape[1])
    elif values.ndim == 2 and math.isqrt(shape[0]) ** 2 == shape[0]:
        grid = (math.isqrt(shape[0]), math.isqrt(shape[0]))
    else:
        raise ValueError(f"features must be [h, w, c], or [n, c] with n a square, got {shape}")
    flat = values.reshape(grid[0] * grid[1], shape[-1])
    require_usable(flat)
    return flat, grid


def require_usable(features: Tensor) -> None:
    """ValueError unless `features` [n, c] has at least 3 tokens, 1 column, and finite values."""
    n, c = features.shape
    if n < 3 or c < 1:
        raise ValueError(f"features must have 3 tokens and 1 column at least, got {n} x {c}")
    if not bool(torch.isfinite(features).all()):
        raise ValueError("features must be finite, got NaN or Inf")
