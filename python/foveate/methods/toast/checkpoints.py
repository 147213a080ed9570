"""Checkpoints of TOAST models in the layouts of the published code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from foveate.methods.toast.decoders import LoraLinear
from foveate.methods.toast.driver import ToastViT


class LoadReport(NamedTuple):
    """What a load found."""

    layout: str  # "flat" | "released" | "trained"
    missing: tuple[str, ...]  # keys of the model
    ignored: tuple[str, ...]  # keys of the file
    lora_unmerged: bool


def _flat(file: Mapping[str, Any]) -> tuple[str, dict[str, torch.Tensor]]:
    """The layout, and the tensors by the model's names."""
    layout, state = "flat", file
    for key, found in (("model_state_dict", "trained"), ("model", "released")):
        if isinstance(file.get(key), Mapping):
            layout, state = found, file[key]
            break
    flat = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise RuntimeError(
                f"the checkpoint must map names to tensors, got {type(value).__name__} at {key!r}"
            )
        name = key.removeprefix("module.")
        if layout == "trained":
            name = name.removeprefix("enc.").removeprefix("module.")
            if name.startswith("head.projection."):
                raise RuntimeError(f"{key}: MLP heads (head.projection.*) are not supported")
            if name.startswith("head.last_layer."):
                name = "head." + name.removeprefix("head.last_layer.")
        flat[name] = value
    return layout, flat


def _require_fit(model: ToastViT, state: dict[str, torch.Tensor]) -> None:
    decoders = [name for name in state if name.startswith("decoders.")]
    if not decoders:
        raise RuntimeError("the checkpoint has no bottom-up feedback: no key decoders.*")
    if any(state[name].ndim == 4 for name in decoders):
        raise RuntimeError("the decoders are 4-D: checkpoints of ConvNeXt are not supported")
    depth = len({name.split(".")[1] for name in decoders})
    if depth != len(model.decoders):
        raise RuntimeError(f"the checkpoint has {depth} decoders, the model {len(model.decoders)}")
    has_lora = any(isinstance(m, LoraLinear) for m in model.decoders.modules())
    if any(".lora_" in name for name in decoders) and not has_lora:
        raise RuntimeError('the checkpoint has lora_* factors: the model needs method="toast-lite"')
    for name, value in model.state_dict().items():
        if name in state and state[name].shape != value.shape:
            raise RuntimeError(
                f"{name} must have size {tuple(value.shape)}, got {tuple(state[name].shape)}"
            )


def _read(path: str | os.PathLike[str], weights_only: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        if not weights_only:
            raise
        raise RuntimeError(
            f"the file holds more than tensors: pass weights_only=False, only for files you trust "
            f"({str(error).splitlines()[0]})"
        ) from error


def load_toast_checkpoint(
    model: ToastViT,
    path_or_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    lora_merged: bool | None = None,
    weights_only: bool = True,
) -> LoadReport:
    """Load a flat, released (`["model"]`) or trained (`["model_state_dict"]`) checkpoint.

    The published trainer saves after `eval()`, which has added scale B A to the base matrix, and
    saves the factors too: adding them again is wrong. `lora_merged=None` takes that for granted
    for trained checkpoints alone; when True, base <- base - scale B A in float64. A refused load
    changes nothing; a load drops a fold.

    Args:
        model: what `toast` gave.
        path_or_dict: a file, or what it holds.
        strict: every key must be known and there, except `top_down_transform` (the identity if
            absent), the head, and lora_* factors when the file has none.
        lora_merged: whether the file's base matrices contain the factors' product.
        weights_only: of torch.load; False only for files you trust.

    Returns:
        The layout, missing and ignored keys, and whether factors were subtracted.

    Raises:
        TypeError: model is not a ToastViT.
        RuntimeError: the file does not fit the model; the keys or sizes are named. Or it holds
            other objects than tensors.
    """
    if not isinstance(model, ToastViT):
        raise TypeError(f"model must be a ToastViT, got {type(model).__name__}")
    file: Any = path_or_dict
    if not isinstance(path_or_dict, Mapping):
        file = _read(path_or_dict, weights_only)
    if not isinstance(file, Mapping):
        raise RuntimeError(f"the checkpoint must hold a dict, got {type(file).__name__}")
    layout, state = _flat(file)
    _require_fit(model, state)
    own = model.state_dict()
    ignored = tuple(name for name in state if name not in own)
    missing = tuple(name for name in own if name not in state)
    file_has_lora = any(".lora_" in name for name in state)
    if strict:
        no_head = not any(name.startswith("head.") for name in own)
        unknown = [n for n in ignored if not (no_head and n.startswith("head."))]
        absent = [
            name
            for name in missing
            if name != "top_down_transform"
            and not name.startswith("head.")
            and (file_has_lora or ".lora_" not in name)
        ]
        if unknown or absent:
            raise RuntimeError(f"missing keys {absent}, unknown keys {unknown}")
    merged = layout == "trained" if lora_merged is None else lora_merged
    values = {name: value for name, value in state.items() if name in own}
    if "top_down_transform" not in values:
        values["top_down_transform"] = torch.eye(len(model.top_down_transform))
    unmerged = False
    for name, layer in model.named_modules():
        keys = [f"{name}.{part}" for part in ("weight", "lora_A", "lora_B")]
        if isinstance(layer, LoraLinear) and merged and all(key in values for key in keys):
            base, low, high = (values[key].double() for key in keys)
            values[keys[0]] = base - layer.lora_scale * (high @ low)
            unmerged = True
    model.load_state_dict(values, strict=False)
    return LoadReport(layout, missing, ignored, unmerged)
