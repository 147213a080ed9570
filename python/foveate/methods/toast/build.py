"""From a timm VisionTransformer to a ToastViT."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from foveate._checks import integer, one_of
from foveate._dispatch import BACKENDS
from foveate.methods.toast.decoders import Decoder
from foveate.methods.toast.driver import ToastViT

METHODS = ("toast", "toast-lite", "end2end", "frozen")
_TRAINED = {
    "toast": ("decoders.", "prompt", "head."),
    "toast-lite": ("prompt", "top_down_transform", "head."),
    "end2end": ("",),
    "frozen": ("head.",),
}


def _require_plain_vit(vit: Any) -> None:
    if isinstance(vit, ToastViT):
        raise TypeError("vit is a ToastViT already")
    if isinstance(vit, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"vit is wrapped in {type(vit).__name__}: pass .module")
    if type(vit) is not VisionTransformer:
        raise TypeError(f"vit must be a timm VisionTransformer, got {type(vit).__name__}")
    if len(vit.blocks) == 0:
        raise ValueError("vit must have at least one block, got none")
    for block in vit.blocks:
        if type(block) is not Block:
            raise TypeError(f"blocks must be timm's Block, got {type(block).__name__}")
        if type(block.attn) is not Attention:
            raise TypeError(f"attn must be timm's Attention, got {type(block.attn).__name__}")
        if getattr(block.attn, "gate", None) is not None:
            raise TypeError("attn must be timm's Attention without a gate, got gated attention")
        if block.attn.attn_drop.p > 0:
            raise ValueError(f"attn_drop_rate must be 0, got {block.attn.attn_drop.p}")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError(
            "patch_drop_rate must be 0, or the passes keep different patches; "
            f"got {vit.patch_drop.prob}"
        )


def toast(
    vit: Any,
    method: str = "toast",
    *,
    num_classes: int | None = None,
    td_bias: str = "twice",
    lora_r: int = 4,
    lora_alpha: float = 1.0,
    train_transform: bool | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> ToastViT:
    """A ViT that runs twice, its second pass steered by tokens that a prompt selects.

    Source: Shi et al., "TOAST" (arXiv 2305.15542), sections 3 and 4. The result shares the
    tensors of `vit` and sets their `requires_grad`; `vit` stays a plain ViT.

    Args:
        vit: a timm `VisionTransformer` of `Block` and `Attention`.
        method: "toast" trains decoders, prompt and head; "toast-lite" LoRA factors of the
            decoders, prompt, transform and head; "end2end" everything; "frozen" the head.
        num_classes: a new head of so many classes; None keeps the head.
        td_bias: "twice" or "once", how often b_v is added in pass 2.
        lora_r: rank of the factors.
        lora_alpha: the factors count alpha / r.
        train_transform: whether the transform trains; None is the method's rule.
        generator: of the initial prompt, decoders and factors.
        backend: of the ops.

    Returns:
        The model, in the training mode of `vit`.

    Raises:
        TypeError: another model, block or attention.
        ValueError: dropout of patches or attention, a bad method, td_bias or lora_r.
    """
    _require_plain_vit(vit)
    one_of("method", method, METHODS)
    one_of("td_bias", td_bias, ("twice", "once"))
    one_of("train_transform", train_transform, (None, True, False))
    one_of("backend", backend, ("auto", *BACKENDS))
    lora_r = integer("lora_r", lora_r, 1)
    lora_alpha = _number("lora_alpha", lora_alpha)
    if num_classes is not None:
        num_classes = integer("num_classes", num_classes, 0)
    shared = {id(tensor): tensor for tensor in (*vit.parameters(), *vit.buffers())}
    model: ToastViT = copy.deepcopy(vit, shared)
    model.__class__ = ToastViT
    if num_classes is not None:
        model.reset_classifier(num_classes)
    model.td_bias, model.toast_backend, model.toast_method = td_bias, backend, method
    model._fold, model._fold_key, model._identity_key = None, (), None
    where = vit.blocks[0].attn.qkv.weight
    device = where.device if generator is None else generator.device
    drawn: dict[str, Any] = {"device": device, "dtype": where.dtype}
    c = vit.embed_dim
    rank = lora_r if method == "toast-lite" else None
    prompt = torch.empty(c, **drawn).normal_(generator=generator)
    model.prompt = nn.Parameter(prompt.to(where.device))
    model.top_down_transform = nn.Parameter(torch.eye(c, device=where.device, dtype=where.dtype))
    decoders = (Decoder(c, rank, lora_alpha, generator, **drawn) for _ in vit.blocks)
    model.decoders = nn.ModuleList(decoders).to(where.device).train(vit.training)
    for name, parameter in model.named_parameters():
        lora = method == "toast-lite" and ".lora_" in name
        parameter.requires_grad_(lora or name.startswith(_TRAINED[method]))
    if train_transform is not None:
        model.top_down_transform.requires_grad_(train_transform)
    return model


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)
