"""Correlation of chosen pairs of units, differentiable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from foveate._checks import one_of
from foveate._dispatch import select
from foveate.ops.pearson.grids import RESAMPLERS, Size, check_grid, joint_grid
from foveate.ops.pearson.layers import LayerSpec, named_layers, read_layer, spec_of
from foveate.ops.pearson.plan import Moment, Operand, moment_plan, pair_plan
from foveate.ops.pearson.policies import CONSTANTS


def paired_correlation(
    a: Any,
    b: Any,
    pairs: Any,
    *,
    center: bool | tuple[torch.Tensor, torch.Tensor] = True,
    per_image: bool = False,
    grid: str | tuple[int, int] = "pair-max",
    resample: str = "bilinear",
    layers_a: LayerSpec | Mapping[str, LayerSpec] | None = None,
    layers_b: LayerSpec | Mapping[str, LayerSpec] | None = None,
    constant: str = "nan",
    backend: str = "auto",
) -> torch.Tensor:
    """r of chosen pairs of units, differentiable in every floating input.

    Args:
        a: tensor, list or dict of layers, as in `PearsonAccumulator.update`.
        b: the same.
        pairs: `[p, 2]` int, (unit of a, unit of b); repeats are allowed.
        center: True: Pearson; False: cosine; (mean_a `[c1]`, mean_b `[c2]`): cosine after
            subtracting these, the loss of the original's inversion and editing.
        per_image: one value per image.
        grid: as in `pearson_matrix`.
        resample: as in `pearson_matrix`.
        layers_a: how layers of a are read.
        layers_b: how layers of b are read.
        constant: value of a pair of which a unit has no variance: "nan", or "zero" with zero
            gradient.
        backend: "auto" or "reference".

    Returns:
        `[p]`, or `[n, p]` per image; float32, or float64 if an input is float64.

    Raises:
        TypeError: an input that is no floating tensor, or pairs that are not int.
        ValueError: shapes, choices or pairs out of range.
    """
    one_of("resample", resample, RESAMPLERS)
    one_of("constant", constant, CONSTANTS)
    check_grid(grid)
    sides = [
        [read_layer(s, name, x, spec_of(specs, name)) for name, x in named_layers(s, given).items()]
        for s, given, specs in (("a", a, layers_a), ("b", b, layers_b))
    ]
    n, device = sides[0][0].shape[0], sides[0][0].device
    for side, maps in zip("ab", sides, strict=True):
        for x in maps:
            if x.shape[0] != n:
                raise ValueError(
                    f"a and b must have the same first size, got a has n={n}, "
                    f"{side} has n={x.shape[0]}"
                )
            if x.device != device:
                raise ValueError(f"a and b must be on one device, got {device} and {x.device}")
    sizes = [sum(x.shape[1] for x in maps) for maps in sides]
    pairs = _checked_pairs(pairs, sizes, device)
    select("pearson", "paired_correlation_fwd", backend, device.type)
    means = _centres(center, sizes, device)
    double = any(x.dtype == torch.float64 for maps in sides for x in maps)
    if n == 0:
        raise ValueError("paired_correlation needs at least one image, got 0")
    out = torch.zeros((n if per_image else 1, len(pairs)), dtype=torch.float64, device=device)
    starts = [_starts(maps) for maps in sides]
    owner = [
        torch.bucketize(
            pairs[:, s].contiguous(), torch.tensor(starts[s][1:], device=device), right=True
        )
        for s in (0, 1)
    ]
    for i, x in enumerate(sides[0]):
        for j, y in enumerate(sides[1]):
            chosen = ((owner[0] == i) & (owner[1] == j)).nonzero()[:, 0]
            if not len(chosen):
                continue
            units = pairs[chosen]
            parts = []
            for s, layer, index in ((0, x, i), (1, y, j)):
                fixed = None if means is None else means[s][units[:, s]]
                parts.append((layer[:, units[:, s] - starts[s][index]].double(), fixed))
            joint = joint_grid(grid, (x.shape[2], x.shape[3]), (y.shape[2], y.shape[3]))
            found = _correlate(parts, joint, resample, center is True, per_image, constant)
            out = out.index_copy(1, chosen, found)
    out = out.to(torch.float64 if double else torch.float32)
    return out if per_image else out[0]


def _starts(maps: list[torch.Tensor]) -> list[int]:
    starts = [0]
    for x in maps:
        starts.append(starts[-1] + x.shape[1])
    return starts


def _checked_pairs(pairs: Any, sizes: list[int], device: torch.device) -> torch.Tensor:
    found: torch.Tensor = torch.as_tensor(pairs, device=device)
    if found.numel() == 0 and found.ndim == 1:
        found = found.reshape(0, 2).long()
    if found.ndim != 2 or found.shape[1] != 2:
        raise ValueError(f"pairs must be [p, 2], got {tuple(found.shape)}")
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"pairs must be int, got {found.dtype}")
    found = found.long()
    for column, size in enumerate(sizes):
        wrong = (found[:, column] < 0) | (found[:, column] >= size)
        if bool(wrong.any()):
            value = int(found[:, column][wrong][0])
            raise ValueError(f"pairs[:, {column}] must be in 0..{size - 1}, got {value}")
    return found


def _centres(
    center: Any, sizes: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if isinstance(center, bool):
        return None
    if not isinstance(center, (tuple, list)) or len(center) != 2:
        raise ValueError(f"center must be True, False or (mean_a, mean_b), got {center!r}")
    found = []
    for name, mean, size in zip(("mean_a", "mean_b"), center, sizes, strict=True):
        mean = torch.as_tensor(mean, device=device).double()
        if tuple(mean.shape) != (size,):
            raise ValueError(f"center: {name} must be [{size}], got {tuple(mean.shape)}")
        found.append(mean)
    return found[0], found[1]


def _banded(x: torch.Tensor, matrices: Any) -> torch.Tensor:
    if matrices[0] is not None:
        x = matrices[0].to(x) @ x
    if matrices[1] is not None:
        x = x @ matrices[1].to(x).mT
    return x


def _line(z: torch.Tensor, moment: Moment) -> torch.Tensor:
    """Sums of R z over the joint grid, [n, p]."""
    for axis, weight in zip((2, 3), moment.weights, strict=True):
        if weight is not None:
            z = z * weight.to(z).view((-1, 1) if axis == 2 else (-1,))
    return z.sum((2, 3))


def _centred(
    x: torch.Tensor,
    fixed: torch.Tensor | None,
    operand: Operand,
    moment: Moment,
    joint: Size,
    pearson: bool,
    per_image: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operand of the product, sums of squares [n or 1, p], and which pairs are constant."""
    z = _banded(x, moment.shrink)
    axes = (2, 3) if per_image else (0, 2, 3)
    still = torch.zeros(1, dtype=torch.bool, device=x.device)
    if fixed is not None:
        x = x - fixed.view(-1, 1, 1)
    elif pearson:
        still = (z.detach().amax(axes) == z.detach().amin(axes)).view(-1, x.shape[1])
        images = 1 if per_image else x.shape[0]
        total = _line(z, moment)
        total = total if per_image else total.sum(0, keepdim=True)
        x = x - (total / (images * joint[0] * joint[1]))[:, :, None, None]
    z = _banded(x, moment.shrink)
    square = (z * _banded(z, moment.gram)).sum((2, 3))
    square = square if per_image else square.sum(0, keepdim=True)
    return _banded(x, (operand.along_h, operand.along_w)), square, still


def _correlate(
    parts: list[tuple[torch.Tensor, torch.Tensor | None]],
    joint: Size,
    resample: str,
    pearson: bool,
    per_image: bool,
    constant: str,
) -> torch.Tensor:
    """r [n or 1, p] of maps [n, p, h, w]; the product runs on the smaller grid of each axis."""
    sizes = [(x.shape[2], x.shape[3]) for x, _ in parts]
    plan = pair_plan(sizes[0], sizes[1], joint, resample)
    sides = []
    for (x, fixed), operand, size in zip(parts, (plan.a, plan.b), sizes, strict=True):
        moment = moment_plan(size, joint, resample)
        scale = torch.exp2(-x.detach().abs().amax((0, 2, 3)).clamp(min=1e-300).log2().floor())
        scale = torch.where(scale.isfinite(), scale, 1.0)
        scaled = x * scale.view(-1, 1, 1)
        fixed = None if fixed is None else fixed * scale
        sides.append(_centred(scaled, fixed, operand, moment, joint, pearson, per_image))
    (x, square_x, still_x), (y, square_y, still_y) = sides
    product = (x * y).sum((2, 3))
    product = product if per_image else product.sum(0, keepdim=True)
    bad = still_x | still_y | (square_x == 0) | (square_y == 0)
    root = torch.where(bad, 1.0, square_x).sqrt() * torch.where(bad, 1.0, square_y).sqrt()
    r = product / root
    r = r + (r.clamp(-1, 1) - r).detach()
    # NaN also reaches the gradient, of constant units alone.
    policy = product * torch.where(bad, 0.0 if constant == "zero" else float("nan"), 0.0)
    return torch.where(bad, policy, r)
