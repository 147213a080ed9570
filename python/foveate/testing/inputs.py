"""Real inputs for benchmarks: photographs, their segments, digits; at the sizes of real models."""

from __future__ import annotations

import functools

import numpy as np
import torch


@functools.cache
def photographs() -> tuple[np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], ...]:
    """The colour photographs that scikit-image ships, `[h, w, 3]` uint8."""
    from skimage import data

    return tuple(getattr(data, name)() for name in ("astronaut", "coffee", "chelsea", "rocket"))


@functools.cache
def _panoptic_map(index: int, size: int) -> torch.Tensor:
    from skimage import color, segmentation, transform

    image = transform.resize(photographs()[index % len(photographs())], (size, size), order=1)
    instance = segmentation.slic(image, n_segments=100, compactness=10, start_label=1)
    lightness = color.rgb2gray(image)
    means = np.array([lightness[instance == i].mean() for i in range(1, instance.max() + 1)])
    label = np.concatenate([[0], 1 + (means * 131).astype(np.int64)])[instance]
    return torch.from_numpy(np.stack([label, instance], -1).astype(np.int32))


def panoptic_maps(batch: int, size: int) -> torch.Tensor:
    """Label maps of photographs: ids [batch, size, size, 2] int32, (class, instance) below 256.

    Instances are SLIC segments; the class of a segment is its mean lightness in 133 levels.
    """
    return torch.stack([_panoptic_map(i % 4, size) for i in range(batch)])
