"""How the layers of a network are read: activations in any layout as maps [n, c, h, w]."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from foveate._checks import FLOATING, integer, one_of

LAYOUTS = ("nc", "ntc", "nchw", "nhwc")
_BY_NDIM = {2: "nc", 3: "ntc", 4: "nchw"}
_NDIM = {"nc": 2, "ntc": 3, "nchw": 4, "nhwc": 4}


@dataclass(frozen=True)
class LayerSpec:
    """One layer's reading.

    Attributes:
        layout: "nc", "ntc", "nchw" or "nhwc"; None: by ndim 2, 3, 4 -> nc, ntc, nchw.
        prefix_tokens: tokens dropped before the grid; None is 0.
        grid_hw: grid of the tokens; None: the square root of t - prefix, which must be exact.
        crop: cells cut off at the top, bottom, left and right.
        source: "output" or "input" of a hooked module.
        select: index or key where that is a tuple or a dict.
    """

    layout: str | None = None
    prefix_tokens: int | None = None
    grid_hw: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    source: str = "output"
    select: int | str | None = None

    def __post_init__(self) -> None:
        one_of("layout", self.layout, (None, *LAYOUTS))
        one_of("source", self.source, ("output", "input"))
        if self.prefix_tokens is not None:
            integer("prefix_tokens", self.prefix_tokens, 0)
        if self.grid_hw is not None:
            if len(self.grid_hw) != 2:
                raise ValueError(f"grid_hw must be (h, w), got {self.grid_hw!r}")
            for size in self.grid_hw:
                integer("grid_hw", size, 1)
        if len(self.crop) != 4:
            raise ValueError(f"crop must be (top, bottom, left, right), got {self.crop!r}")
        for size in self.crop:
            integer("crop", size, 0)


class LayerInfo(NamedTuple):
    """Where a layer's units stand: `start` is the number of its first unit."""

    name: str
    channels: int
    grid: tuple[int, int]
    start: int


def named_layers(side: str, given: Any) -> dict[str, torch.Tensor]:
    """The tensors of one side by layer name; a bare tensor is layer "0", lists are "0", "1", ..."""
    numpy = sys.modules["numpy"]
    if isinstance(given, (torch.Tensor, numpy.ndarray)):
        given = [given]
    if isinstance(given, Mapping):
        items = {str(name): value for name, value in given.items()}
    elif isinstance(given, Sequence) and not isinstance(given, str):
        items = {str(index): value for index, value in enumerate(given)}
    else:
        raise TypeError(
            f"{side} must be a tensor, a list or a dict of tensors, got {type(given).__name__}"
        )
    if not items:
        raise ValueError(f"{side} must hold at least one layer, got none")
    tensors = {}
    for name, value in items.items():
        if isinstance(value, numpy.ndarray):
            value = torch.from_numpy(numpy.array(value))
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"layer {name!r} of {side} must be a tensor or an array, got {type(value).__name__}"
            )
        if value.dtype not in FLOATING:
            raise TypeError(
                f"layer {name!r} of {side} must be float16, bfloat16, float32 or float64, "
                f"got {value.dtype}"
            )
        tensors[name] = value
    return tensors


def spec_of(specs: LayerSpec | Mapping[str, LayerSpec] | None, name: str) -> LayerSpec:
    if specs is None:
        return LayerSpec()
    if isinstance(specs, LayerSpec):
        return specs
    return specs.get(name, LayerSpec())


def read_layer(side: str, name: str, x: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """`x` as maps [n, c, h, w], a view.

    Raises:
        ValueError: a shape that the layout, the prefix, the grid or the crop does not fit.
    """
    layout = spec.layout or _BY_NDIM.get(x.ndim)
    where = f"layer {name!r} of {side}"
    if layout is None or x.ndim != _NDIM[layout]:
        accepted = layout or "[s, c], [n, t, c] or [n, c, h, w]"
        raise ValueError(f"{where} must be {accepted}, got {tuple(x.shape)}")
    if layout == "nc":
        maps = x[:, :, None, None]
    elif layout == "ntc":
        h, w, prefix = _token_grid(where, x.shape[1], spec)
        maps = x[:, prefix:].unflatten(1, (h, w)).permute(0, 3, 1, 2)
    elif layout == "nhwc":
        maps = x.permute(0, 3, 1, 2)
    else:
        maps = x
    top, bottom, left, right = spec.crop
    h, w = maps.shape[2] - top - bottom, maps.shape[3] - left - right
    if h < 1 or w < 1:
        raise ValueError(
            f"{where} must keep h, w >= 1 after crop={spec.crop}, got {tuple(x.shape)}"
        )
    return maps[:, :, top : top + h, left : left + w]


def _token_grid(where: str, tokens: int, spec: LayerSpec) -> tuple[int, int, int]:
    prefix = spec.prefix_tokens or 0
    left = tokens - prefix
    described = f"t={tokens}, prefix_tokens={prefix}, grid_hw={spec.grid_hw}"
    if left < 1:
        raise ValueError(f"{where} must have more tokens than prefix_tokens, got {described}")
    if spec.grid_hw is None:
        root = math.isqrt(left)
        if root * root != left:
            raise ValueError(
                f"{where}: t - prefix_tokens must be a square unless grid_hw is given, "
                f"got {described}"
            )
        return root, root, prefix
    h, w = spec.grid_hw
    if h * w != left:
        raise ValueError(f"{where}: grid_hw must hold t - prefix_tokens tokens, got {described}")
    return h, w, prefix
