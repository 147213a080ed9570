"""One timm block with a top-down signal in its values, and what its attention looks at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from foveate.ops.topdown_attention.api.attention import topdown_attention
from foveate.ops.topdown_attention.api.sdpa import topdown_sdpa


class Options(NamedTuple):
    """What is the same for every block of a forward call."""

    attn_mask: torch.Tensor | None
    is_causal: bool
    td_bias: str
    backend: str


class Projected(NamedTuple):
    """Normed queries and keys, and values, each `[b, h, n, d]`, of a block's plain input."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def value_rows(block: Block) -> torch.Tensor:
    """W_v of a block, `[a, c]`."""
    return block.attn.qkv.weight.chunk(3)[2]  # type: ignore[no-any-return]


def signal_bias(block: Block, td_bias: str) -> torch.Tensor | None:
    """What the signal adds to the values beside its product with W_v: b_v if it counts twice."""
    bias = block.attn.qkv.bias
    return None if bias is None or td_bias == "once" else bias.chunk(3)[2]


def _heads(y: torch.Tensor, h: int) -> torch.Tensor:
    split: torch.Tensor = y.unflatten(-1, (h, y.shape[-1] // h))
    return split.transpose(1, 2)


def _joined(o: torch.Tensor) -> torch.Tensor:
    return o.transpose(1, 2).flatten(2)


def project(block: Block, x: torch.Tensor) -> Projected:
    """What a block attends with, from its input `[b, n, c]`."""
    attn = block.attn
    parts = attn.qkv(block.norm1(x)).chunk(3, -1)
    q, k, v = (_heads(part, attn.num_heads) for part in parts)
    return Projected(attn.q_norm(q), attn.k_norm(k), v)


def _attend_projected(
    block: Block,
    projected: Projected,
    td: torch.Tensor | None,
    v_td: torch.Tensor | None,
    queries: int | None,
    options: Options,
) -> torch.Tensor:
    if td is not None:
        v_td = F.linear(td, value_rows(block), signal_bias(block, options.td_bias))
    out: torch.Tensor = topdown_sdpa(
        projected.q[:, :, :queries],
        projected.k,
        projected.v,
        None if v_td is None else _heads(v_td, block.attn.num_heads),
        is_causal=options.is_causal,
        attn_mask=options.attn_mask,
        backend=options.backend,
    )
    return _joined(out)


def _attend_normed(
    block: Block, y: torch.Tensor, td: torch.Tensor | None, queries: int | None, options: Options
) -> torch.Tensor:
    """Queries and keys with their own norms: one product for the values of y + td."""
    attn = block.attn
    w_q, w_k, w_v = attn.qkv.weight.chunk(3)
    b_q, b_k, b_v = (None,) * 3 if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
    if b_v is not None and td is not None and options.td_bias == "twice":
        b_v = 2 * b_v
    h = attn.num_heads
    out = topdown_sdpa(
        attn.q_norm(_heads(F.linear(y[:, :queries], w_q, b_q), h)),
        attn.k_norm(_heads(F.linear(y, w_k, b_k), h)),
        _heads(F.linear(y if td is None else y + td, w_v, b_v), h),
        is_causal=options.is_causal,
        attn_mask=options.attn_mask,
        backend=options.backend,
    )
    return _joined(out)


def _attend(
    block: Block,
    x: torch.Tensor,
    td: torch.Tensor | None,
    v_td: torch.Tensor | None,
    projected: Projected | None,
    queries: int | None,
    options: Options,
) -> torch.Tensor:
    attn = block.attn
    if projected is not None or v_td is not None:
        projected = project(block, x) if projected is None else projected
        return _attend_projected(block, projected, td, v_td, queries, options)
    y = block.norm1(x)
    if not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)):
        return _attend_normed(block, y, td, queries, options)
    out: torch.Tensor = topdown_attention(
        y,
        td,
        attn.qkv.weight,
        attn.qkv.bias,
        num_heads=attn.num_heads,
        td_bias=options.td_bias,
        is_causal=options.is_causal,
        attn_mask=options.attn_mask,
        num_queries=queries,
        backend=options.backend,
    )
    return out


def run_block(
    block: Block,
    x: torch.Tensor,
    td: torch.Tensor | None,
    v_td: torch.Tensor | None,
    projected: Projected | None,
    queries: int | None,
    options: Options,
) -> torch.Tensor:
    """The block's output `[b, n, c]`, or of its first `queries` tokens.

    Args:
        block: timm's.
        x: its input `[b, n, c]`.
        td: the signal `[b, n, c]`, projected here, or None.
        v_td: the signal in value space `[b, n, a]`, its bias included, or None.
        projected: what `project` gave for x, or None.
        queries: None is all tokens.
        options: of the forward call.
    """
    attn = block.attn
    o = _attend(block, x, td, v_td, projected, queries, options)
    o = attn.proj_drop(attn.proj(attn.norm(o)))
    x = x[:, :queries] + block.drop_path1(block.ls1(o))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


def attention_rows(
    block: Block, x: torch.Tensor, prefix: int, has_class_token: bool
) -> torch.Tensor:
    """softmax over all keys, at the patches `[b, h, n - prefix]`: of the class token, or the mean
    over patch queries without one."""
    q, k, _ = project(block, x)
    q = q[:, :, :1] if has_class_token else q[:, :, prefix:]
    work = torch.promote_types(q.dtype, torch.float32)
    rows = ((q.to(work) * block.attn.scale) @ k.to(work).transpose(-1, -2)).softmax(-1)
    seen: torch.Tensor = rows.mean(2)[..., prefix:]
    return seen
