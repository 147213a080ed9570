"""Rosetta units of several networks, from a loader of images to joined sets."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from foveate._checks import one_of
from foveate.methods._optional import optional
from foveate.methods.rosetta.hooks import capture, chosen_layers
from foveate.methods.rosetta.result import RosettaResult
from foveate.methods.rosetta.sets import RANKS, RULES, rosetta_sets
from foveate.ops.pearson.accumulator import MODES, PearsonAccumulator
from foveate.ops.pearson.matching import mutual_nearest_neighbors

Pair = tuple[str, str]


def rosetta(
    models: Mapping[str, nn.Module],
    loader: Iterable[Any],
    *,
    layers: Mapping[str, Any] | None = None,
    anchor: str | None = None,
    generator: str | None = None,
    preprocess: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    k: int | tuple[int, int] = (1, 5),
    by: str = "signed",
    min_corr: float | None = None,
    rule: str = "star",
    min_models: int | None = None,
    rank: str = "mean",
    mode: str = "pearson",
    grid: str | tuple[int, int] = "pair-max",
    resample: str = "bilinear",
    precision: str = "fp32",
    nan_policy: str = "propagate",
    baseline: bool = False,
    max_images: int | None = None,
    device: torch.device | str | None = None,
    store: str = "auto",
    memory_limit: int | None = None,
    progress: bool = False,
    backend: str = "auto",
) -> RosettaResult:
    """Units of several networks that behave alike over many images.

    Source: Dravid, Gandelsman, Efros, Shocher, "Rosetta Neurons" (ICCV 2023).

    Args:
        models: {name: module}, at least two; each runs in eval and inference mode.
        loader: batches `[n, 3, h, w]`, or tuples whose first element is one.
        layers: {name: names or patterns | {pattern: LayerSpec} | callable(name, module)}; None or
            an absent name: `default_layers`.
        anchor: the network whose units a star starts from; None: the generator, or the first.
        generator: this network gets the batch; the others get its output image.
        preprocess: {name: function of the batch}.
        k: int, or (k_a, k_b) of (first, second) of each pair, the anchor first.
        by: "signed" or "abs".
        min_corr: least score of a match.
        rule: "star", "clique" or "components", as `rosetta_sets`.
        min_models: networks that a set must span; None: all.
        rank: how a set's edges are ranked.
        mode: "pearson", or "iccv2023": two passes, means and then scores.
        grid: as PearsonAccumulator.
        resample: as PearsonAccumulator.
        precision: as PearsonAccumulator.
        nan_policy: as PearsonAccumulator.
        baseline: also correlate with the images of the second network rolled by one in each batch,
            and keep each unit's largest score: what chance gives.
        max_images: images read at most.
        device: where models and batches go; None: they stay.
        store: "auto" (products), "products" or "samples".
        memory_limit: bytes of one accumulator.
        progress: show a bar.
        backend: as PearsonAccumulator.

    Returns:
        RosettaResult.

    Raises:
        ValueError: fewer than two models, an unknown name, an empty loader, or a loader that cannot
            be read twice under iccv2023.
    """
    one_of("rule", rule, RULES)
    one_of("rank", rank, RANKS)
    one_of("mode", mode, MODES)
    one_of("store", store, ("auto", "products", "samples"))
    names = list(models)
    if len(names) < 2:
        raise ValueError(f"models must hold at least 2 networks, got {names}")
    for title, name in (("anchor", anchor), ("generator", generator)):
        if name is not None and name not in models:
            raise ValueError(f"{title} must be one of {names}, got {name!r}")
    for title, given in (("layers", layers), ("preprocess", preprocess)):
        for name in given or ():
            if name not in models:
                raise ValueError(f"{title} must name models of {names}, got {name!r}")
    first = anchor or generator or names[0]
    order = [first, *(name for name in names if name != first)]
    pairs = [(first, name) for name in order[1:]]
    if rule != "star":
        pairs = list(itertools.combinations(order, 2))
    if mode == "iccv2023" and iter(loader) is iter(loader):
        raise ValueError("loader must be readable twice with mode='iccv2023', got an iterator")
    specs = {name: chosen_layers(models[name], (layers or {}).get(name)) for name in order}

    def batches() -> Iterator[dict[str, dict[str, torch.Tensor]]]:
        return _activations(
            models, loader, order, specs, generator, preprocess or {}, max_images, device, progress
        )

    with evaluated(models, device):
        means = _means(batches(), specs) if mode == "iccv2023" else None
        options: dict[str, Any] = {
            "mode": mode,
            "grid": grid,
            "resample": resample,
            "precision": precision,
            "nan_policy": nan_policy,
            "store": "products" if store == "auto" else store,
            "memory_limit": memory_limit,
            "backend": backend,
        }
        real, rolled = (
            {
                pair: PearsonAccumulator(
                    layers_a=specs[pair[0]],
                    layers_b=specs[pair[1]],
                    means=None if means is None else (means[pair[0]], means[pair[1]]),
                    **options,
                )
                for pair in (pairs if wanted else ())
            }
            for wanted in (True, baseline)
        )
        count = 0
        for maps in batches():
            count += next(iter(maps[first].values())).shape[0]
            for pair, acc in real.items():
                acc.update(maps[pair[0]], maps[pair[1]])
            for pair, acc in rolled.items():
                moved = {name: x.roll(1, 0) for name, x in maps[pair[1]].items()}
                acc.update(maps[pair[0]], moved)
    if count == 0:
        raise ValueError("loader must give at least one image, got none")
    matches = {
        pair: mutual_nearest_neighbors(acc, k, min_corr=min_corr, by=by)
        for pair, acc in real.items()
    }
    chance = {}
    for pair, acc in rolled.items():
        best = acc.topk(1, side="a", by=by).values_a
        assert best is not None
        chance[pair] = best[:, 0].cpu()
    layout = {}
    for (name_a, name_b), acc in real.items():
        layout[name_a], layout[name_b] = acc.layout_a, acc.layout_b
    config = {
        "k": list(k) if isinstance(k, (tuple, list)) else k,
        "by": by,
        "min_corr": min_corr,
        "rule": rule,
        "rank": rank,
        "min_models": min_models,
        "anchor": first,
        "mode": mode,
        "grid": grid if isinstance(grid, str) else list(grid),
        "resample": resample,
        "precision": precision,
    }
    sets = rosetta_sets(matches, anchor=first, rule=rule, min_models=min_models, rank=rank)
    return RosettaResult(layout, matches, sets, config, count, chance if baseline else None)


@contextlib.contextmanager
def evaluated(models: Mapping[str, nn.Module], device: torch.device | str | None) -> Iterator[None]:
    """Eval and inference mode; training flags and random states are restored."""
    flags = {module: module.training for model in models.values() for module in model.modules()}
    with torch.random.fork_rng(), torch.inference_mode():
        try:
            for model in models.values():
                model.eval()
                if device is not None:
                    model.to(device)
            yield
        finally:
            for module, flag in flags.items():
                module.training = flag


def _activations(
    models: Mapping[str, nn.Module],
    loader: Iterable[Any],
    order: list[str],
    specs: Mapping[str, Any],
    generator: str | None,
    preprocess: Mapping[str, Callable[[torch.Tensor], torch.Tensor]],
    max_images: int | None,
    device: torch.device | str | None,
    progress: bool,
) -> Iterator[dict[str, dict[str, torch.Tensor]]]:
    """The layers' activations of every network, batch by batch."""
    left = max_images
    running = [name for name in order if name == generator]
    running += [name for name in order if name != generator]
    with contextlib.ExitStack() as stack:
        stores = {name: stack.enter_context(capture(models[name], specs[name])) for name in running}
        for item in optional("tqdm").tqdm(loader, desc="rosetta") if progress else loader:
            batch = item[0] if isinstance(item, (tuple, list)) else item
            if left is not None:
                if left <= 0:
                    return
                batch = batch[:left]
                left -= len(batch)
            if device is not None:
                batch = batch.to(device)
            for name in running:
                prepared = preprocess[name](batch) if name in preprocess else batch
                output = models[name](prepared)
                if name == generator:
                    batch = output
            yield {name: dict(store) for name, store in stores.items()}


def _means(
    batches: Iterator[dict[str, dict[str, torch.Tensor]]], specs: Mapping[str, Any]
) -> dict[str, dict[str, torch.Tensor]]:
    """Plain means over batches of the batches' means, in float64, by network and layer."""
    from foveate.ops.pearson.layers import read_layer

    totals: dict[str, dict[str, torch.Tensor]] = {}
    count = 0
    for maps in batches:
        count += 1
        for name, layers in maps.items():
            mine = totals.setdefault(name, {})
            for layer, x in layers.items():
                read = read_layer(name, layer, x, specs[name][layer]).double().mean((0, 2, 3))
                mine[layer] = mine[layer] + read if layer in mine else read
    return {
        name: {layer: total / count for layer, total in layers.items()}
        for name, layers in totals.items()
    }
