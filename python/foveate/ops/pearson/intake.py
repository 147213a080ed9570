"""What a stream accepts: the layers of a batch, its weights, fixed means, non-finite values."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from foveate.ops.pearson.comoment import Block
from foveate.ops.pearson.layers import LayerInfo, named_layers, read_layer, spec_of
from foveate.ops.pearson.policies import finite_images

Layout = tuple[LayerInfo, ...]


def read_side(side: str, given: Any, specs: Any) -> dict[str, torch.Tensor]:
    """Maps [n, c, h, w] of every layer, detached."""
    return {
        name: read_layer(side, name, x.detach(), spec_of(specs, name))
        for name, x in named_layers(side, given).items()
    }


def checked_batch(
    a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], device: torch.device | None
) -> int:
    """The first size, which all layers share, as they share the device."""
    first = next(iter(a.values()))
    n, device = first.shape[0], device or first.device
    for side, maps in (("a", a), ("b", b)):
        for name, x in maps.items():
            if x.device != device:
                raise ValueError(f"layer {name!r} of {side} must be on {device}, got {x.device}")
            if x.shape[0] != n:
                raise ValueError(
                    f"a and b must have the same first size, got a has n={n}, "
                    f"{side} has n={x.shape[0]} in layer {name!r}"
                )
    return n


def checked_weight(weight: Any, n: int, device: torch.device, iccv: bool) -> torch.Tensor | None:
    """Image weights [n] in float64, or None."""
    if weight is None:
        return None
    if iccv:
        raise ValueError("weight must be None with mode='iccv2023', got a weight")
    found: torch.Tensor = torch.as_tensor(weight).detach().to(device=device, dtype=torch.float64)
    if tuple(found.shape) != (n,):
        raise ValueError(f"weight must be [n] = ({n},), got {tuple(found.shape)}")
    wrong = ~(found.isfinite() & (found >= 0))
    if bool(wrong.any()):
        raise ValueError(f"weight must be finite and not negative, got {float(found[wrong][0])}")
    return found


def layout_of(side: dict[str, torch.Tensor]) -> Layout:
    """Names, channels, grids and first units."""
    infos, start = [], 0
    for name, x in side.items():
        infos.append(LayerInfo(name, x.shape[1], (x.shape[2], x.shape[3]), start))
        start += x.shape[1]
    return tuple(infos)


def check_same_layout(side: str, old: Layout, new: Layout) -> None:
    """ValueError if layers, channels or grids changed."""
    names, given = {i.name: i for i in old}, {i.name: i for i in new}
    if names.keys() != given.keys():
        raise ValueError(f"the layers of {side} must stay {sorted(names)}, got {sorted(given)}")
    for name, info in names.items():
        before, after = (info.channels, info.grid), (given[name].channels, given[name].grid)
        if before != after:
            raise ValueError(
                f"layer {name!r} of {side} must keep its (channels, grid) {before}, got {after}"
            )


def fixed_means(side: str, given: Any, layout: Layout, device: torch.device | None) -> torch.Tensor:
    """Means [c] of one side in float64."""
    if isinstance(given, Mapping):
        parts = []
        for info in layout:
            if info.name not in given:
                raise ValueError(f"means of {side} must hold layer {info.name!r}, got none")
            part = torch.as_tensor(given[info.name])
            if tuple(part.shape) != (info.channels,):
                raise ValueError(
                    f"means of layer {info.name!r} of {side} must be [{info.channels}], "
                    f"got {tuple(part.shape)}"
                )
            parts.append(part)
        given = torch.cat(parts)
    found: torch.Tensor = torch.as_tensor(given)
    channels = sum(info.channels for info in layout)
    if tuple(found.shape) != (channels,):
        raise ValueError(f"means of {side} must be [c] = ({channels},), got {tuple(found.shape)}")
    return found.to(device=device, dtype=torch.float64)


def kept_images(
    sides: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]], nan_policy: str
) -> torch.Tensor | None:
    """Images [n] to keep; None: all.

    Raises:
        ValueError: a non-finite value under "raise"; side, layer, channel and count.
    """
    if nan_policy == "propagate":
        return None
    if nan_policy == "omit":
        return finite_images(*(x for side in sides for x in side.values()))
    for side, maps in zip("ab", sides, strict=True):
        for name, x in maps.items():
            wrong = (~x.isfinite()).sum((0, 2, 3))
            if bool(wrong.any()):
                channel = int(wrong.nonzero()[0, 0])
                raise ValueError(
                    f"{side} must be finite under nan_policy='raise', got {int(wrong[channel])} "
                    f"non-finite values in channel {channel} of layer {name!r}"
                )
    return None


def grid_blocks(layout: tuple[LayerInfo, ...]) -> list[Block]:
    """Runs of layers of one grid."""
    blocks: list[Block] = []
    for info in layout:
        if blocks and blocks[-1].grid == info.grid:
            last = blocks.pop()
            blocks.append(Block(last.start, last.channels + info.channels, last.grid))
        else:
            blocks.append(Block(info.start, info.channels, info.grid))
    return blocks


def by_block(blocks: list[Block], layers: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The layers of each block."""
    found, rest = [], list(layers)
    for block in blocks:
        part: list[torch.Tensor] = []
        while rest and sum(x.shape[1] for x in part) + rest[0].shape[1] <= block.channels:
            if tuple(rest[0].shape[2:]) != block.grid:
                break
            part.append(rest.pop(0))
        found.append(part)
    return found


def free_bytes(device: torch.device) -> int:
    """Memory of the device that nothing uses."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
