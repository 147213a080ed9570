"""Small ViTs with feedback for the tests of TOAST, and the published formulation of one."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from foveate.methods.toast import toast
from foveate.methods.toast.decoders import matrix


def vit(**options):
    torch.manual_seed(0)
    settings = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    model = VisionTransformer(**{**settings, "num_classes": 5, **options}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make(method="toast", **options):
    names = ("td_bias", "num_classes", "lora_r")
    given = {name: options.pop(name) for name in names if name in options}
    model = toast(vit(**options), method, generator=torch.Generator().manual_seed(1), **given)
    with torch.no_grad():
        for parameter in model.decoders.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.top_down_transform.add_(0.1 * torch.randn_like(model.top_down_transform))
    return model


def images(b=2, h=16, w=16):
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(3)).double()


def oracle(model, x, td_bias="twice"):
    """The published formulation: the whole qkv(td), explicit softmax, all tokens, no reuse."""

    def run(signals):
        y = model.norm_pre(model._pos_embed(model.patch_embed(x)))
        for i, block in enumerate(model.blocks):
            attn, t = block.attn, block.norm1(y)
            b, n, _ = t.shape

            def split(u, attn=attn, b=b, n=n):
                return u.view(b, n, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)

            q, k, v = split(attn.qkv(t))
            if signals is not None:
                bias = attn.qkv.bias if td_bias == "twice" else None
                v = v + split(F.linear(signals[i], attn.qkv.weight, bias))[2]
            q, k = attn.q_norm(q), attn.k_norm(k)
            p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            o = attn.proj(attn.norm((p @ v).transpose(1, 2).reshape(b, n, -1)))
            y = y + block.drop_path1(block.ls1(attn.proj_drop(o)))
            y = y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))
        return model.norm(y)

    first = run(None)
    cosine = F.normalize(first, dim=-1) @ F.normalize(model.prompt, dim=0)
    z = (first * cosine.clamp(0, 1).unsqueeze(-1)) @ model.top_down_transform
    signals = [None] * len(model.blocks)
    for i in reversed(range(len(model.blocks))):
        left, right = (
            matrix(layer, x.dtype)
            for layer in (model.decoders[i].linear, model.decoders[i].linear2)
        )
        z = z @ left.T
        signals[i] = z @ right.T
    return model.forward_head(run(signals))


BACKBONES = {
    "token": {},
    "average": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "registers and LayerScale": {"reg_tokens": 2, "init_values": 0.5},
    "qk_norm": {"qk_norm": True, "scale_attn_norm": True},
    "depth 1": {"depth": 1},
    "grid 4 x 6": {"img_size": (16, 24)},
    "pre_norm, no bias": {"pre_norm": True, "qkv_bias": False},
}
