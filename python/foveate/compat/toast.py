"""The constructors of TOAST's code (arXiv 2305.15542) under their names: timm ViTs with feedback.

It needs timm.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from foveate.methods.toast import ToastMaps, ToastViT, load_toast_checkpoint, toast

__all__ = [
    "TopDownViT",
    "vit_topdown_base_patch16_224",
    "vit_topdown_large_patch16_224",
    "vit_topdown_small_patch16_224",
    "vit_topdown_tiny_patch16_224",
]


class TopDownViT(ToastViT):
    """A ToastViT without a head whose call gives features as the original's does."""

    return_maps: bool

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ToastMaps | None]:  # type: ignore[override]
        """(features `[b, c]` of pass 2, None), or with `cfg.RETURN_VISUALIZATION` their maps."""
        return super().forward(x), self.maps(x) if self.return_maps else None


def _build(
    width: int,
    depth: int,
    num_heads: int,
    pretrained: bool,
    cfg: Any,
    img_size: int,
    drop_path_rate: float,
    init_values: float | None,
) -> tuple[TopDownViT, int]:
    path: Any = getattr(getattr(cfg, "MODEL", None), "MODEL_ROOT", None)
    if pretrained and not path:
        raise ValueError(
            f"pretrained=True needs the file to load in cfg.MODEL.MODEL_ROOT, got {path!r}"
        )
    vit = VisionTransformer(
        img_size=img_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads,
        num_classes=0,
        drop_path_rate=drop_path_rate,
        init_values=init_values,
    )
    model = toast(vit, "end2end")
    model.__class__ = TopDownViT
    model.return_maps = bool(getattr(cfg, "RETURN_VISUALIZATION", False))
    if pretrained:
        load_toast_checkpoint(model, path)
    return model, width


def vit_topdown_tiny_patch16_224(
    pretrained: bool = False,
    cfg: Any = None,
    prompt_cfg: Any = None,  # noqa: ARG001
    *,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
    init_values: float | None = None,
) -> tuple[TopDownViT, int]:
    """(model, 192): ViT-Ti/16 with feedback, no head, every parameter trainable.

    Args:
        pretrained: load the file `cfg.MODEL.MODEL_ROOT` (`load_toast_checkpoint`).
        cfg: any object; `cfg.RETURN_VISUALIZATION` makes calls give maps beside features.
        prompt_cfg: part of the original's call; nothing is read from it.
        img_size: side of the images.
        drop_path_rate: of timm's VisionTransformer.
        init_values: likewise.

    Returns:
        The model, whose call gives (features `[b, c]`, None or `ToastMaps`), and its width.

    Raises:
        ValueError: pretrained without a file.
        RuntimeError: the file does not fit.
    """
    return _build(192, 12, 3, pretrained, cfg, img_size, drop_path_rate, init_values)


def vit_topdown_small_patch16_224(
    pretrained: bool = False,
    cfg: Any = None,
    prompt_cfg: Any = None,  # noqa: ARG001
    *,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
    init_values: float | None = None,
) -> tuple[TopDownViT, int]:
    """(model, 384): ViT-S/16; see `vit_topdown_tiny_patch16_224`."""
    return _build(384, 12, 6, pretrained, cfg, img_size, drop_path_rate, init_values)


def vit_topdown_base_patch16_224(
    pretrained: bool = False,
    cfg: Any = None,
    prompt_cfg: Any = None,  # noqa: ARG001
    *,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
    init_values: float | None = None,
) -> tuple[TopDownViT, int]:
    """(model, 768): ViT-B/16; see `vit_topdown_tiny_patch16_224`."""
    return _build(768, 12, 12, pretrained, cfg, img_size, drop_path_rate, init_values)


def vit_topdown_large_patch16_224(
    pretrained: bool = False,
    cfg: Any = None,
    prompt_cfg: Any = None,  # noqa: ARG001
    *,
    img_size: int = 224,
    drop_path_rate: float = 0.0,
    init_values: float | None = None,
) -> tuple[TopDownViT, int]:
    """(model, 1024): ViT-L/16; see `vit_topdown_tiny_patch16_224`."""
    return _build(1024, 24, 16, pretrained, cfg, img_size, drop_path_rate, init_values)
