"""Weights from local files: reading them safely, and timm's vision transformers made from them."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.methods._optional import optional

_WRAPPERS = ("teacher", "state_dict", "model")  # keys under which training scripts nest the weights
_PREFIXES = ("module.", "backbone.")
_TRUNK = (
    "blocks.",
    "patch_embed.",
    "norm.",
    "norm_pre.",
    "fc_norm.",
    "pos_embed",
    "cls_token",
    "reg_token",
)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by plain names.

    Nested `teacher`, `state_dict` and `model` are opened; the prefixes `module.` and `backbone.`
    are taken off, however often they repeat. Nothing in the file is executed (`weights_only`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights, or holds other things than weights_only reads.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"weights must be an existing file, got {file}")
    if file.suffix == ".safetensors":
        loaded: Any = _read_safetensors(file)
    else:
        try:
            # Training scripts save their parsed arguments too, a plain container.
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"weights must be a file that torch.load(weights_only=True) reads, got {file}: "
                f"{str(error).splitlines()[0]}"
            ) from error
    return _plain_names(_unwrapped(loaded), file)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    safetensors = optional("safetensors")
    loaded: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, the handle is no mapping
                loaded[key] = tensors.get_tensor(key)
    except safetensors.SafetensorError as error:
        raise ValueError(f"weights must be a safetensors file, got {file}: {error}") from error
    return loaded


def _unwrapped(loaded: Any) -> Any:
    while isinstance(loaded, dict):
        inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded.get(key), dict)), None)
        if inner is None:
            break
        loaded = inner
    return loaded


def _plain_names(loaded: Any, file: Path) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, value in loaded.items() if isinstance(loaded, dict) else ():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            continue
        while key.startswith(_PREFIXES):
            key = key.partition(".")[2]
        named[key] = value
    if not named:
        raise ValueError(f"weights must hold a dict of tensors, got none in {file}")
    return named


def load_vit(
    name: str, weights: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> nn.Module:
    """timm's vision transformer `name` with the weights of a local file, in eval mode.

    It has no classifier and takes images of any size that its patches divide
    (`dynamic_img_size`): timm resamples the position embedding, also one of another length.

    Args:
        name: a model of timm, such as "vit_small_patch8_224".
        weights: a .safetensors, .pth or .pt file, read by `read_state_dict`. Keys of a head and of
            training-only parts are ignored.
        device: where the model goes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: timm has no such vision transformer; keys are missing (up to five are listed),
            have other shapes, or belong to a trunk that the model does not have.
    """
    state = read_state_dict(weights)
    timm = optional("timm")
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=False, num_classes=0, dynamic_img_size=True
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"name must be a vision transformer of timm that takes dynamic_img_size, got {name!r}: "
            f"{error}"
        ) from error
    _fit_position(model, state)
    wanted = model.state_dict()
    _refuse(weights, "keys are missing", [key for key in wanted if key not in state])
    _refuse(
        weights,
        "keys have other shapes",
        [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in wanted.items()
            if state[key].shape != value.shape
        ],
    )
    _refuse(
        weights,
        "keys are not the model's",
        [key for key in state if key not in wanted and key.startswith(_TRUNK)],
    )
    model.load_state_dict({key: state[key] for key in wanted})
    return model.to(device).eval()


def _refuse(weights: str | os.PathLike[str], what: str, keys: list[str]) -> None:
    if keys:
        listing = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
        raise ValueError(
            f"weights must fit the model, got {os.fspath(weights)}, "
            f"where {len(keys)} {what}: {listing}"
        )


def _fit_position(model: Any, state: dict[str, Tensor]) -> None:
    given, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if given is None or own is None or given.shape == own.shape or given.shape[-1] != own.shape[-1]:
        return
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side = round((given.shape[1] - prefix) ** 0.5)
    if side < 1 or given.shape[1] != prefix + side * side:
        return  # the shapes are refused, with both named
    layers = optional("timm.layers")
    state["pos_embed"] = layers.resample_abs_pos_embed(
        given,
        new_size=list(model.patch_embed.grid_size),
        old_size=[side, side],
        num_prefix_tokens=prefix,
    )
