"""Which layers of a network are read, and reading them during its forward."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from foveate.ops.pearson.layers import LayerSpec

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.Mish)


def default_layers(model: nn.Module) -> list[str]:
    """Names of the layers that are read by default.

    `layer1`..`layer4` if present; else `*.mlp.act` (timm's ViTs); else `*.mlp.1` (torchvision's);
    else the activation modules; else the Conv2d.
    """
    modules = dict(model.named_modules())
    stages = [f"layer{i}" for i in range(1, 5)]
    if all(name in modules for name in stages):
        return stages
    for pattern in ("*.mlp.act", "*.mlp.1"):
        found = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if found:
            return found
    for kinds in (_ACTIVATIONS, (nn.Conv2d,)):
        found = [name for name, module in modules.items() if isinstance(module, kinds)]
        if found:
            return found
    raise ValueError("no layers to read by default: name them in layers")


def chosen_layers(
    model: nn.Module, layers: Sequence[str] | Mapping[str, LayerSpec] | Callable[..., bool] | None
) -> dict[str, LayerSpec]:
    """Layer names and how each is read, in the order of the modules.

    Raises:
        ValueError: no layer has a name, or none fits a pattern; the closest names are given.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if layers is None:
        layers = default_layers(model)
    if callable(layers):
        found = {n: LayerSpec() for n, module in modules.items() if layers(n, module)}
        if not found:
            raise ValueError("layers must choose at least one module, got none")
        return found
    given = layers if isinstance(layers, Mapping) else {name: LayerSpec() for name in layers}
    specs: dict[str, LayerSpec] = {}
    for pattern, spec in given.items():
        names = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if not names:
            close = difflib.get_close_matches(pattern, modules, 3, 0.0)
            raise ValueError(f"layers must name modules, got {pattern!r}; the closest are {close}")
        specs |= dict.fromkeys(names, spec)
    return {name: _filled(model, specs[name]) for name in modules if name in specs}


def _filled(model: nn.Module, spec: LayerSpec) -> LayerSpec:
    """The model's own number of prefix tokens where the spec leaves it open."""
    if spec.prefix_tokens is not None:
        return spec
    prefix = getattr(model, "num_prefix_tokens", 1 if hasattr(model, "class_token") else 0)
    return replace(spec, prefix_tokens=int(prefix))


def _read(name: str, spec: LayerSpec, value: Any) -> torch.Tensor:
    if isinstance(value, (tuple, list, dict)):
        if spec.select is None:
            raise TypeError(
                f"layer {name!r} gives a {type(value).__name__}: LayerSpec(select=...) must say "
                "which part is read"
            )
        parts: Any = value
        value = parts[spec.select]
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"layer {name!r} must give a tensor, got {type(value).__name__}; see select"
        )
    return value.detach().clone()  # a later module may work in place


@contextlib.contextmanager
def capture(
    model: nn.Module, layers: Sequence[str] | Mapping[str, LayerSpec] | Callable[..., bool] | None
) -> Iterator[dict[str, torch.Tensor]]:
    """A dict that each forward of `model` refills with its layers' activations.

    Raises:
        ValueError: no such layer.
        RuntimeError: a layer is called twice in one forward.
        TypeError: a layer gives no tensor.
    """
    specs = chosen_layers(model, layers)
    modules = dict(model.named_modules())
    store: dict[str, torch.Tensor] = {}

    def clear(_module: nn.Module, _inputs: Any) -> None:
        store.clear()

    def reader(name: str, spec: LayerSpec) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            if name in store:
                raise RuntimeError(f"layer {name!r} must be called once per forward, got two calls")
            value = output
            if spec.source == "input":
                value = inputs[0] if len(inputs) == 1 else inputs
            store[name] = _read(name, spec, value)

        return hook

    handles = [model.register_forward_pre_hook(clear)]
    try:
        for name, spec in specs.items():
            handles.append(modules[name].register_forward_hook(reader(name, spec)))
        yield store
    finally:
        for handle in handles:
            handle.remove()
