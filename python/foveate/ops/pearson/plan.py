"""What the stage kernels are told: banded matrices, moments of resized maps, scales."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from foveate.ops.pearson.grids import Size, axis_plan, resize_matrix


class Moment(NamedTuple):
    """S and Q of x = R z for z the native map, or its resized form where R shrinks an axis."""

    shrink: tuple[torch.Tensor | None, torch.Tensor | None]  # to z along h and w; None: identity
    weights: tuple[torch.Tensor | None, torch.Tensor | None]  # R^T 1 of z's axes; None: ones
    gram: tuple[torch.Tensor | None, torch.Tensor | None]  # (R^T R) of z's axes; None: identity


class Operand(NamedTuple):
    """The two matrices that take a native map to the grid of a product; None: the identity."""

    along_h: torch.Tensor | None  # [g_h, h] float64
    along_w: torch.Tensor | None  # [g_w, w] float64
    grid: Size
    key: tuple[object, ...]  # equal for equal operands


class PairPlan(NamedTuple):
    """How maps of two sizes are multiplied as if both were resized to `joint`."""

    joint: Size
    grid: Size  # of the product
    a: Operand
    b: Operand
    moment_a: Moment
    moment_b: Moment


def _unless_identity(matrix: torch.Tensor) -> torch.Tensor | None:
    return None if matrix.shape[0] == matrix.shape[1] and _is_eye(matrix) else matrix


def _is_eye(matrix: torch.Tensor) -> bool:
    return torch.equal(matrix, torch.eye(matrix.shape[0], dtype=matrix.dtype))


@functools.cache
def moment_plan(size: Size, joint: Size, resample: str) -> Moment:
    """S and Q on `joint` of maps of `size`, without resizing an axis that grows."""
    shrink: list[torch.Tensor | None] = []
    weights: list[torch.Tensor | None] = []
    gram: list[torch.Tensor | None] = []
    for native, target in zip(size, joint, strict=True):
        matrix = resize_matrix(native, target, resample)
        if target <= native:
            shrink.append(_unless_identity(matrix))
            weights.append(None)
            gram.append(None)
        else:
            shrink.append(None)
            weights.append(matrix.sum(0))
            gram.append(matrix.T @ matrix)
    return Moment((shrink[0], shrink[1]), (weights[0], weights[1]), (gram[0], gram[1]))


@functools.cache
def pair_plan(size_a: Size, size_b: Size, joint: Size, resample: str) -> PairPlan:
    """The product grid, operands and moments of one pair of map sizes."""
    axes = [axis_plan(*sizes, resample) for sizes in zip(size_a, size_b, joint, strict=True)]
    grid = (axes[0].size, axes[1].size)
    operands = []
    for side, native in (("to_a", size_a), ("to_b", size_b)):
        along = [_unless_identity(getattr(axis, side)) for axis in axes]
        key = (native, *(None if m is None else tuple(m.flatten().tolist()) for m in along))
        operands.append(Operand(along[0], along[1], grid, key))
    return PairPlan(
        joint,
        grid,
        operands[0],
        operands[1],
        moment_plan(size_a, joint, resample),
        moment_plan(size_b, joint, resample),
    )


class Scales(NamedTuple):
    """Powers of two that bring a unit's largest deviation to [1, 2), as two float32 factors."""

    exponent: torch.Tensor  # [c] int32
    factors: torch.Tensor  # [2, c] float64


def power_scales(exponent: torch.Tensor) -> Scales:
    """2^exponent as two factors that float32 holds."""
    first = exponent.clamp(-126, 126)
    factors = torch.stack([first, exponent - first]).double()
    return Scales(exponent, torch.exp2(factors))


def exponents(largest: torch.Tensor) -> torch.Tensor:
    """e [c] int32 with 2^e largest in [1/2, 1); 0 where `largest` is 0 or not finite."""
    usable = (largest > 0) & largest.isfinite()
    _, exponent = torch.frexp(torch.where(usable, largest, 1.0))
    return torch.where(usable, -exponent, 0).int()
