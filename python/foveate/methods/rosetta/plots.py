"""Matched units side by side, drawn over the images that they saw."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from foveate._checks import integer
from foveate.methods._optional import optional
from foveate.methods.rosetta.driver import evaluated
from foveate.methods.rosetta.hooks import capture, chosen_layers
from foveate.methods.rosetta.result import RosettaResult
from foveate.ops.pearson.layers import read_layer


def plot_sets(
    result: RosettaResult,
    models: Mapping[str, nn.Module],
    images: torch.Tensor,
    *,
    sets: int = 4,
    preprocess: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    columns: int = 6,
    path: str | os.PathLike[str] | None = None,
) -> Any:
    """A matplotlib Figure: a row per set, per image the image and each network's map over it.

    Args:
        result: of `rosetta` on these models.
        models: {name: module}.
        images: `[n, 3, h, w]` or `[n, 1, h, w]`; each is drawn from its least to its largest value.
        sets: sets drawn, the best first.
        preprocess: {name: function of the batch}.
        columns: images drawn at most.
        path: where the figure is saved; None: nowhere.

    Raises:
        ValueError: a model is missing, there is nothing to draw, or the images have another shape.
    """
    integer("sets", sets, 1)
    integer("columns", columns, 1)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [n, 3, h, w], got {tuple(images.shape)}")
    missing = [name for name in result.layout if name not in models]
    if missing:
        raise ValueError(f"models must hold every network of the result, got none of {missing}")
    chosen = result.sets[:sets]
    images = images[:columns]
    if not chosen or not len(images):
        raise ValueError("plot_sets needs at least one set and one image, got none")
    units = {}
    with evaluated(models, None):
        for name, infos in result.layout.items():
            specs = chosen_layers(models[name], [info.name for info in infos])
            batch = preprocess[name](images) if preprocess and name in preprocess else images
            with capture(models[name], specs) as store:
                models[name](batch)
                units[name] = {k: read_layer(name, k, store[k], specs[k]) for k in store}
    figures = optional("matplotlib.figure")
    wide, high = len(images) * (1 + len(units)), len(chosen)
    figure = figures.Figure(figsize=(1.2 * wide, 1.3 * high))
    axes = figure.subplots(high, wide, squeeze=False)
    extent = (0, images.shape[3], images.shape[2], 0)
    for row, found in enumerate(chosen):
        for column, picture in enumerate(images):
            shown = _shown(picture)
            panels = axes[row, column * (1 + len(units)) :]
            panels[0].imshow(shown, extent=extent)
            panels[0].set_title(f"{found.score:.2f}", fontsize=7)
            for panel, name in zip(panels[1:], units, strict=False):
                panel.imshow(shown, extent=extent)
                panel.set_title(name, fontsize=7)
                maps = [result.unit(name, unit) for unit in found.units.get(name, ())]
                if maps:
                    mean = torch.stack([units[name][k][column, c] for k, c in maps]).mean(0)
                    panel.imshow(mean.float().cpu().numpy(), extent=extent, alpha=0.6, cmap="jet")
    for panel in axes.flat:
        panel.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=100, bbox_inches="tight")
    return figure


def _shown(picture: torch.Tensor) -> Any:
    low, high = picture.amin(), picture.amax()
    unit = (picture - low) / (high - low).clamp(min=1e-12)
    return unit.expand(3, -1, -1).permute(1, 2, 0).float().cpu().numpy()
