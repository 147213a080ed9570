"""What the shims share: arrays in, fp64 NumPy out, unit features, nearest upsampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def tensor(value: Any) -> Tensor:
    """`value`, a tensor (detached, on its device) or an array, as a tensor."""
    if isinstance(value, Tensor):
        return value.detach()
    return torch.from_numpy(np.array(value))


def array(value: Any) -> NDArray[np.float64]:
    """`value`, a tensor or an array, as a NumPy fp64 array."""
    return np.asarray(tensor(value).cpu().to(torch.float64).numpy())


def unit_rows(features: Tensor) -> Tensor:
    """`features` [..., n, c] with rows of norm 1; fp16 and bf16 as fp32, zero rows stay zero."""
    rows = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    largest = rows.abs().amax(dim=-1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, torch.ones_like(largest))
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    floor = 1e-12 / torch.where(largest > 0, largest, torch.ones_like(largest))
    return scaled / torch.maximum(norm, floor)


def nearest(plane: Any, size: tuple[int, int]) -> NDArray[np.float64]:
    """`plane` [h, w] at [H, W] = `size`: source row floor(y h / H)."""
    values = array(plane)
    h, w = values.shape
    height, width = size
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    return np.asarray(values[rows[:, None], columns])
