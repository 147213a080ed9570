"""One timm block with a top-down signal in its values, and what its attention looks at."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from foveate.ops.topdown_attention.api.attention import topdown_attention
from foveate.ops.topdown_attention.api.sdpa import topdown_sdpa


def value_rows(block: Block) -> torch.Tensor:
    """W_v of a block, `[a, c]`."""
    return block.attn.qkv.weight.chunk(3)[2]  # type: ignore[no-any-return]


def _heads(y: torch.Tensor, h: int) -> torch.Tensor:
    split: torch.Tensor = y.unflatten(-1, (h, y.shape[-1] // h))
    return split.transpose(1, 2)


def _attend(
    block: Block,
    y: torch.Tensor,
    td: torch.Tensor | None,
    v_td: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    td_bias: str,
    queries: int | None,
    backend: str,
) -> torch.Tensor:
    attn = block.attn
    if v_td is None and isinstance(attn.q_norm, nn.Identity):
        out: torch.Tensor = topdown_attention(
            y,
            td,
            attn.qkv.weight,
            attn.qkv.bias,
            num_heads=attn.num_heads,
            td_bias=td_bias,
            is_causal=is_causal,
            attn_mask=attn_mask,
            num_queries=queries,
            backend=backend,
        )
        return out
    w_q, w_k, w_v = attn.qkv.weight.chunk(3)
    b_q, b_k, b_v = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    if b_v is not None and td_bias == "twice" and not (td is None and v_td is None):
        b_v = 2 * b_v
    h = attn.num_heads
    out = topdown_sdpa(
        attn.q_norm(_heads(F.linear(y[:, :queries], w_q, b_q), h)),
        attn.k_norm(_heads(F.linear(y, w_k, b_k), h)),
        _heads(F.linear(y if td is None else y + td, w_v, b_v), h),
        None if v_td is None else _heads(v_td, h),
        is_causal=is_causal,
        attn_mask=attn_mask,
        backend=backend,
    )
    return out.transpose(1, 2).flatten(2)


def run_block(
    block: Block,
    x: torch.Tensor,
    td: torch.Tensor | None,
    v_td: torch.Tensor | None,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    td_bias: str,
    queries: int | None,
    backend: str,
) -> torch.Tensor:
    """The block's output `[b, n, c]`, or of its first `queries` tokens."""
    attn = block.attn
    o = _attend(block, block.norm1(x), td, v_td, attn_mask, is_causal, td_bias, queries, backend)
    o = attn.proj_drop(attn.proj(attn.norm(o)))
    x = x[:, :queries] + block.drop_path1(block.ls1(o))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


def attention_rows(
    block: Block, x: torch.Tensor, prefix: int, has_class_token: bool
) -> torch.Tensor:
    """softmax over all keys, at the patches `[b, h, n - prefix]`: of the class token, or the mean
    over patch queries without one."""
    attn = block.attn
    q, k, _ = (_heads(part, attn.num_heads) for part in attn.qkv(block.norm1(x)).chunk(3, -1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    q = q[:, :, :1] if has_class_token else q[:, :, prefix:]
    rows = ((q * attn.scale) @ k.transpose(-1, -2)).float().softmax(-1)
    seen: torch.Tensor = rows.mean(2)[..., prefix:]
    return seen
