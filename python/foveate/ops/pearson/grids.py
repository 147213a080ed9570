"""Resampling as matrices, and the grid on which a pair of map sizes is multiplied.

Resizing is linear and separable, y = R_h x R_w^T. Since <R_a a, R_b b> = <a, R_a^T R_b b>, the
product of two maps that are compared on a large grid runs on the smallest size of each axis.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from foveate._checks import integer, one_of

GRIDS = ("pair-max", "a", "b", "native")
RESAMPLERS = ("bilinear", "nearest", "area")

Size = tuple[int, int]  # height, width


def check_grid(grid: Any) -> None:
    """ValueError or TypeError unless `grid` is a name in `GRIDS` or a pair of sizes."""
    if isinstance(grid, str):
        one_of("grid", grid, (*GRIDS, "(H, W)"))
        return
    if not isinstance(grid, Sequence) or len(grid) != 2:
        names = ", ".join(repr(name) for name in GRIDS)
        raise ValueError(f"grid must be one of {names} or (H, W), got {grid!r}")
    for name, size in zip(("grid[0]", "grid[1]"), grid, strict=True):
        integer(name, size, 1)


def joint_grid(grid: Any, size_a: Size, size_b: Size, names: str = "a and b") -> Size:
    """The grid (H, W) on which maps of two sizes are compared.

    Raises:
        ValueError: grid="native" and the sizes differ.
    """
    if grid == "pair-max":
        return max(size_a[0], size_b[0]), max(size_a[1], size_b[1])
    if grid == "a":
        return size_a
    if grid == "b":
        return size_b
    if grid == "native":
        if size_a != size_b:
            raise ValueError(
                f'grid="native" needs maps of one size, got {names} of {size_a} and {size_b}; '
                'pass grid="pair-max" or grid=(H, W)'
            )
        return size_a
    return int(grid[0]), int(grid[1])


def resize_matrix(source: int, target: int, resample: str) -> torch.Tensor:
    """R [target, source] in float64, whose rows sum to 1.

    "bilinear" has align_corners=False and no antialiasing, "nearest" takes floor(o h / H) in
    integers, "area" averages the sources that an output touches.
    """
    if source == target:
        return torch.eye(source, dtype=torch.float64)
    output = torch.arange(target)
    index = torch.arange(source)
    if resample == "nearest":
        return (index == (output * source // target)[:, None]).double()  # [target, source]
    if resample == "area":
        first = output * source // target
        last = -(-(output + 1) * source // target)  # exclusive
        inside = (index >= first[:, None]) & (index < last[:, None])
        return inside.double() / (last - first)[:, None]
    centre = ((output.double() + 0.5) * source / target - 0.5).clamp(min=0)
    low = centre.long().clamp(max=source - 1)
    high = (low + 1).clamp(max=source - 1)
    fraction = (centre - low)[:, None]
    return (1 - fraction) * (index == low[:, None]) + fraction * (index == high[:, None])


class Axis(NamedTuple):
    """How one axis of a pair is multiplied: <R_a x, R_b y> = <to_a x, to_b y> on `size` points."""

    size: int
    to_a: torch.Tensor  # [size, h_a] float64
    to_b: torch.Tensor  # [size, h_b] float64
    up_a: torch.Tensor  # R_a [H, h_a]
    up_b: torch.Tensor  # R_b [H, h_b]


@functools.cache
def axis_plan(size_a: int, size_b: int, target: int, resample: str) -> Axis:
    """The operators of one axis; the product runs on the smallest of the three sizes."""
    up_a = resize_matrix(size_a, target, resample)
    up_b = resize_matrix(size_b, target, resample)
    size = min(size_a, size_b, target)
    if size == target:
        return Axis(size, up_a, up_b, up_a, up_b)
    if size == size_a:
        return Axis(size, torch.eye(size, dtype=torch.float64), up_a.T @ up_b, up_a, up_b)
    return Axis(size, up_b.T @ up_a, torch.eye(size, dtype=torch.float64), up_a, up_b)


def gram_matrix(source: int, target: int, resample: str) -> torch.Tensor:
    """R^T R [source, source]; tridiagonal where an axis grows."""
    matrix = resize_matrix(source, target, resample)
    return matrix.T @ matrix
