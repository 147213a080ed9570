"""TokenCut of one picture with a vision transformer (CVPR 2022)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import foveate
from foveate.methods.descriptors import normalized, patch_size, vit_features


def tokencut_image(image: Any, model: nn.Module, *, tau: float = 0.2) -> foveate.TokenCutResult:
    """The salient object of a picture at its own resolution.

    The normalised picture is padded with zeros right and below to a multiple of the model's patch;
    the keys of the last attention are cut by `foveate.tokencut`.

    Args:
        image: [H, W, 3] uint8 RGB.
        model: a vision transformer, as for `vit_features`.
        tau: cosine above which two patches are joined.

    Returns:
        TokenCutResult without a batch axis: `mask` [H, W] in pixels, `box` (x0, y0, x1, y1) in
        pixels, clipped to the image; the rest on the patch grid.

    Raises:
        ValueError: the image is not [H, W, 3] uint8.
    """
    pixels = np.array(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise ValueError(f"image must be [H, W, 3] uint8, got {pixels.dtype} {pixels.shape}")
    height, width = pixels.shape[:2]
    patch = patch_size(model)
    h, w = -(-height // patch), -(-width // patch)
    first = next(model.parameters(), None)
    padded = torch.zeros(1, 3, h * patch, w * patch)
    padded[0, :, :height, :width] = normalized(pixels, model)
    features = vit_features(model, padded.to("cpu" if first is None else first.device))[0]
    result: foveate.TokenCutResult = foveate.tokencut(
        features, (h, w), tau=tau, size=(h * patch, w * patch)
    )
    limit = result.box.new_tensor([width, height, width, height])
    return result._replace(
        mask=result.mask[:height, :width], box=torch.minimum(result.box * patch, limit)
    )
