"""An accumulator as tensors and JSON-able values, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate.ops.pearson.layers import LayerInfo

_SIDE = ("exponent", "varied", "broken", "mean", "square")


def _jsonable(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _layout(infos: Sequence[LayerInfo]) -> list[list[Any]]:
    return [[i.name, i.channels, list(i.grid), i.start] for i in infos]


def _infos(layout: Any) -> tuple[LayerInfo, ...]:
    return tuple(LayerInfo(n, c, (g[0], g[1]), s) for n, c, g, s in layout)


def dump(owner: Any, settings: Sequence[str], version: int) -> dict[str, Any]:
    """The state of a PearsonAccumulator."""
    state = owner._state
    return {
        "version": version,
        "settings": {name: _jsonable(getattr(owner, name)) for name in settings},
        "layout_a": _layout(owner.layout_a),
        "layout_b": _layout(owner.layout_b),
        "count": owner.count,
        "omitted": owner.omitted,
        "wide": owner._wide,
        "sealed": owner._sealed,
        "weight": 0.0 if state is None else state.weight,
        "batches": 0 if state is None else state.batches,
        "acc": None if state is None else state.acc.clone(),
        "a": None if state is None else {n: getattr(state.a, n).clone() for n in _SIDE},
        "b": None if state is None else {n: getattr(state.b, n).clone() for n in _SIDE},
        "samples": [
            {"a": [x.clone() for x in s["a"]], "b": [x.clone() for x in s["b"]], "w": s["w"]}
            for s in owner._samples
        ],
    }


def load(owner: Any, state: dict[str, Any], settings: Sequence[str], version: int) -> None:
    """Put a dumped state into a PearsonAccumulator."""
    if state.get("version") != version:
        raise ValueError(f"version must be {version}, got {state.get('version')!r}")
    for name in settings:
        own, given = _jsonable(getattr(owner, name)), state["settings"].get(name)
        if own != given:
            raise ValueError(f"{name} must be {own!r} as in this accumulator, got {given!r}")
    for name in ("layout_a", "layout_b"):
        own = _layout(getattr(owner, name))
        if own and own != state[name]:
            raise ValueError(f"{name} must be {own!r} as in this accumulator, got {state[name]!r}")
    owner.reset()
    owner.layout_a, owner.layout_b = _infos(state["layout_a"]), _infos(state["layout_b"])
    owner.count, owner.omitted = int(state["count"]), int(state["omitted"])
    owner._wide, owner._sealed = bool(state["wide"]), bool(state["sealed"])
    if owner.device is None:
        tensors = [state["acc"]] if state["acc"] is not None else []
        tensors += [x for s in state["samples"] for x in s["a"]]
        owner.device = tensors[0].device if tensors else None
    if state["acc"] is not None:
        products = owner._products()
        products.acc.copy_(state["acc"])
        for side, values in ((products.a, state["a"]), (products.b, state["b"])):
            for name in _SIDE:
                getattr(side, name).copy_(values[name])
        products.weight, products.batches = float(state["weight"]), int(state["batches"])
    owner._samples = [
        {
            "a": [x.to(owner.device) for x in s["a"]],
            "b": [x.to(owner.device) for x in s["b"]],
            "w": None if s["w"] is None else s["w"].to(owner.device),
        }
        for s in state["samples"]
    ]


def on_cpu(value: Any) -> Any:
    """`value` with every tensor on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list) else value
