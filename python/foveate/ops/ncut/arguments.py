"""What the four functions ask of their arguments before any value is looked at."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from foveate._arrays import as_tensors
from foveate._checks import floating, integer, one_of

MAX_K = 16


class Graphs(NamedTuple):
    """Images in the form the raw ops take: groups `[b_i, n_i, c_i]`, one group for a batch.

    Attributes:
        groups: one 3-D tensor for a batch or a single image, one with b = 1 for each list entry.
        layout: "batch", "single" or "list", the layout of the results.
        back: gives results back in the kind of array that came.
        masks: a bool `[b_i, n_i]` for each group, or nothing.
    """

    groups: list[torch.Tensor]
    layout: str
    back: Callable[[Any], Any]
    masks: list[torch.Tensor]


def warn(message: str, category: type[Warning] = UserWarning) -> bool:
    """Issues a warning; under torch.compile once, when the call is traced."""
    warnings.warn(message, category, stacklevel=4)
    return True


# What torch.compiler.assume_constant_result sets; it would import torch._dynamo to do so.
warn._dynamo_marked_constant = True  # type: ignore[attr-defined]


def graphs(features: Any, mask: Any = None) -> Graphs:
    """`features` and `mask` of a public function as groups, detached."""
    if isinstance(features, (list, tuple)):
        return _listed(list(features), mask)
    (features, mask), back = as_tensors(features=features, mask=mask)
    floating(features=features)
    if features.ndim not in (2, 3):
        raise ValueError(
            "features must be [b, n, c], [n, c] or a list of [n_i, c_i], "
            f"got shape {tuple(features.shape)}"
        )
    layout = "batch" if features.ndim == 3 else "single"
    masks = []
    if mask is not None:
        _require_mask("mask", mask, features)
        masks = [mask if layout == "batch" else mask.unsqueeze(0)]
    if features.requires_grad:
        _warn_no_gradient()
    features = features.detach()
    group = features if layout == "batch" else features.unsqueeze(0)
    return Graphs([group], layout, back, masks)


def _listed(features: list[Any], mask: Any) -> Graphs:
    names = [f"features[{i}]" for i in range(len(features))]
    given = dict(zip(names, features, strict=True))
    mask_names: list[str] = []
    if mask is not None:
        if not isinstance(mask, (list, tuple)) or len(mask) != len(features):
            raise ValueError(
                f"mask must be a list of {len(features)} masks, one for each entry of features, "
                f"got {type(mask).__name__}"
                + (f" of {len(mask)}" if isinstance(mask, (list, tuple)) else "")
            )
        mask_names = [f"mask[{i}]" for i in range(len(mask))]
        given.update(zip(mask_names, mask, strict=True))
    tensors, back = as_tensors(**given)
    tensors, masks = tensors[: len(names)], tensors[len(names) :]
    for name, tensor in zip(names, tensors, strict=True):
        floating(**{name: tensor})
        if tensor.ndim != 2:
            raise ValueError(
                "features must be [b, n, c], [n, c] or a list of [n_i, c_i], "
                f"got {name} of shape {tuple(tensor.shape)}"
            )
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(
                "a list of features must have one dtype: "
                f"features[0] is {tensors[0].dtype}, {name} is {tensor.dtype}"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(
                "a list of features must be on one device: "
                f"features[0] is on {tensors[0].device}, {name} is on {tensor.device}"
            )
    for name, entry, tensor in zip(mask_names, masks, tensors, strict=bool(mask_names)):
        _require_mask(name, entry, tensor)
    if any(tensor.requires_grad for tensor in tensors):
        _warn_no_gradient()
    groups = [tensor.detach().unsqueeze(0) for tensor in tensors]
    return Graphs(groups, "list", back, [entry.unsqueeze(0) for entry in masks])


def _warn_no_gradient() -> None:
    warn(
        "features require grad, but a threshold has no gradient: the result is detached "
        "(ncut_affinity differentiates with respect to an affinity)"
    )


def _require_mask(name: str, mask: torch.Tensor, features: torch.Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}")
    if mask.shape != features.shape[:-1]:
        raise ValueError(
            f"{name} must have the shape of features without channels "
            f"{tuple(features.shape[:-1])}, got {tuple(mask.shape)}"
        )
    if mask.device != features.device:
        raise ValueError(
            f"{name} must be on the device of features {features.device}, got {mask.device}"
        )


def pairs_wanted(k: int, tokens: Sequence[int]) -> int:
    """`k`, at least 1, at most 16 and two less than every count of tokens."""
    k = integer("k", k, low=-(1 << 31))
    smallest = min(tokens, default=MAX_K + 2)
    if not 1 <= k <= min(MAX_K, smallest - 2):
        raise ValueError(
            f"k must be in 1..{MAX_K} and at most n - 2, got k={k} with n={smallest} tokens"
        )
    return k


def require_three_tokens(tokens: Sequence[int]) -> None:
    """ValueError unless every graph has a second and a third eigenvalue."""
    for n in tokens:
        if n < 3:
            raise ValueError(f"features must hold at least 3 tokens, got n={n}")


def threshold(tau: float) -> float:
    """`tau`, below 1; a warning where it joins every pair."""
    tau = float(tau)
    if not tau < 1:
        raise ValueError(f"tau must be a cosine below 1, got {tau}")
    if tau < -1:
        warn(f"tau={tau} is below every cosine: every pair of tokens is joined")
    return tau


def floor_weight(eps: float) -> float:
    """`eps`, the weight of an absent edge, inside (0, 1)."""
    eps = float(eps)
    if not 0 < eps < 1:
        raise ValueError(f"eps must be inside (0, 1), got {eps}")
    return eps


def fraction(name: str, value: float) -> float:
    """A threshold in [0, 1]."""
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value


def effort(tol: float, max_iter: int, check: bool | None) -> tuple[float, int, bool]:
    """`tol`, `max_iter` and whether values are checked."""
    tol = float(tol)
    if not 0 < tol < float("inf"):
        raise ValueError(f"tol must be positive and finite, got {tol}")
    one_of("check", check, (None, True, False))
    return tol, integer("max_iter", max_iter, 1), check is not False


def _pair(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, (int, float, str)) or not hasattr(value, "__len__") or len(value) != 2:
        raise ValueError(f"{name} must be (height, width), got {value!r}")
    return integer(f"{name}[0]", value[0], 1), integer(f"{name}[1]", value[1], 1)


def grids(grid: Any, graph: Graphs) -> list[tuple[int, int]]:
    """The grid (h, w) of each group; h w is its number of tokens."""
    if graph.layout != "list":
        given = [_pair("grid", grid)]
        names = ["grid"]
    else:
        count = len(graph.groups)
        listed = isinstance(grid, (list, tuple)) and len(grid) == count
        if not listed or any(hasattr(pair, "__index__") for pair in grid):
            raise ValueError(
                f"grid must be a list of {count} pairs (height, width), one for each entry of "
                f"features, got {grid!r}"
            )
        names = [f"grid[{i}]" for i in range(count)]
        given = [_pair(name, pair) for name, pair in zip(names, grid, strict=True)]
    for name, (h, w), group in zip(names, given, graph.groups, strict=True):
        n = group.shape[1]
        if h * w != n:
            hint = "; drop the CLS token" if n == h * w + 1 else ""
            raise ValueError(
                f"{name} must have as many cells as there are tokens, got {h} x {w} = {h * w} "
                f"cells and {n} tokens{hint}"
            )
    return given


def output_size(size: Any) -> tuple[int, int] | None:
    """`size` as (H, W), or None for the grid."""
    return None if size is None else _pair("size", size)
