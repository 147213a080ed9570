"""Heat maps over images, and a figure of what the two passes look at."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from foveate.methods.toast.results import ToastMaps


def _array(value: Any) -> np.ndarray[Any, Any]:
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    value = value.detach().cpu()
    array: np.ndarray[Any, Any] = (value.double() if value.is_floating_point() else value).numpy()
    return array


def overlay(image: Any, heat: Any, *, alpha: float = 0.6) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The image reddened where the heat is high.

    t = alpha (heat - min) / (max - min), 0 if constant, nearest-upsampled; the result is
    round(255 ((1 - t) image + t (1, 0, 0))).

    Args:
        image: `[H, W, 3]`, uint8 or float in [0, 1].
        heat: `[gh, gw]`, array or tensor.
        alpha: share of red at the maximum.

    Returns:
        `[H, W, 3]` uint8.

    Raises:
        TypeError: an image of another dtype.
        ValueError: a shape that does not fit.
    """
    pixels = _array(image)
    if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
        raise TypeError(f"image must be uint8 or floating, got {pixels.dtype}")
    pixels = pixels.astype(np.float64) / (255 if pixels.dtype == np.uint8 else 1)
    values = _array(heat).astype(np.float64)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image must be [H, W, 3], got {pixels.shape}")
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"heat must be [gh, gw], got {values.shape}")
    span = values.max() - values.min()
    t = alpha * (values - values.min()) / span if span > 0 else np.zeros_like(values)
    rows = np.arange(pixels.shape[0]) * t.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * t.shape[1] // pixels.shape[1]
    t = t[rows][:, columns, None]
    mixed = np.rint(255 * ((1 - t) * pixels + t * np.array([1.0, 0, 0]))).clip(0, 255)
    result: np.ndarray[Any, np.dtype[np.uint8]] = mixed.astype(np.uint8)
    return result


def plot_maps(
    images: torch.Tensor,
    maps: ToastMaps,
    *,
    mean: Any = None,
    std: Any = None,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """A figure with a row per image: image, selection, attention of both passes, feature norm.

    Args:
        images: `[b, 3, H, W]`, or `[b, 1, H, W]`, as given to the model.
        maps: what `ToastViT.maps` gave for them.
        mean: per channel, to undo normalisation; None scales each image from its minimum to its
            maximum.
        std: likewise.
        path: file to write.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: images of another shape, or not as many as maps.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_maps needs matplotlib") from error
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [b, 3, H, W] or [b, 1, H, W], got {tuple(images.shape)}")
    if len(images) != len(maps.selection):
        raise ValueError(f"maps must be of {len(images)} images, got {len(maps.selection)}")
    pixels = images.detach().float().cpu()
    if mean is None and std is None:
        low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp_min(1e-12)
    else:
        scale = torch.as_tensor(1.0 if std is None else std).view(-1, 1, 1)
        pixels = pixels * scale + torch.as_tensor(0.0 if mean is None else mean).view(-1, 1, 1)
    pixels = pixels.clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    heats = {
        "selection": maps.selection,
        "attention, pass 1": maps.attention_first.mean(1),
        "attention, pass 2": maps.attention.mean(1),
        "feature norm": maps.feature_norm,
    }
    count = len(pixels)
    figure = Figure(figsize=(10, 2 * count + 0.4), layout="constrained")
    axes = figure.subplots(count, 5, squeeze=False)
    for row, image in zip(axes, pixels, strict=True):
        row[0].imshow(image.numpy())
    for column, (title, heat) in enumerate(heats.items(), 1):
        for index in range(count):
            axes[index][column].imshow(overlay(pixels[index], heat[index]))
        axes[0][column].set_title(title, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
