"""Attention over tokens with a top-down signal in its values, from the packed projection."""

from __future__ import annotations

from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import integer, one_of
from foveate._dispatch import missing_kernels, select
from foveate.ops.topdown_attention import reference
from foveate.ops.topdown_attention.api import kernels
from foveate.ops.topdown_attention.checks import (
    FAMILY,
    autocast_dtype,
    cast,
    mask_is_differentiated,
    require_axes,
    require_mask,
    require_one_kind,
    scale_of,
)


def topdown_attention(
    x: Any,
    td: Any,
    qkv_weight: Any,
    qkv_bias: Any = None,
    *,
    num_heads: int,
    td_bias: str = "twice",
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    num_queries: int | None = None,
    backend: str = "auto",
) -> Any:
    """Multi-head attention of tokens `x` whose values carry the top-down signal `td`.

    Q = x W_q^T + b_q, K = x W_k^T + b_k, V = x W_v^T + td W_v^T + beta b_v, and the result is
    softmax(scale Q K^T + mask) V, before the output projection. beta is 2 if td is given and
    td_bias is "twice" (the published code projects td with the bias), else 1.
    Source: Shi et al., "TOAST: Transfer Learning via Attention Steering" (arXiv 2305.15542),
    section 3; "Top-Down Visual Attention from Analysis by Synthesis" (CVPR 2023).

    Differentiable once in every floating tensor; exact to one rounding of float32 sums for half
    dtypes. Inside autocast the floating tensors are cast to its dtype, as `linear` does.

    Args:
        x: `[b, n, c]` normed tokens, prefix tokens included; float32, float64, bfloat16 or
            float16, any strides. NumPy and CuPy arrays are taken and given back.
        td: `[b, n, c]` top-down signal, or None for plain attention.
        qkv_weight: `[3a, c]`, the rows of W_q, W_k and W_v; a = num_heads * head width.
        qkv_bias: `[3a]` or None.
        num_heads: heads, a divisor of a.
        td_bias: "twice" or "once", how often b_v is added when td is given.
        is_causal: token i attends to tokens 0..i.
        attn_mask: bool (True: may attend) or floating (added to the scores), broadcastable to
            `[b, h, num_queries or n, n]`. A row without an allowed key gives zeros.
        scale: factor of the scores; None is (a / num_heads)^-0.5.
        num_queries: only the first so many tokens ask; the first rows of the full result.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        `[b, num_queries or n, a]` in the dtype of x.

    Raises:
        TypeError: non-tensors, mixed kinds or dtypes, an integer mask.
        ValueError: a shape, value or combination that does not fit; the argument is named.
        NotImplementedError: the named backend cannot run this.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return topdown_attention(
                cast(x, dtype),
                cast(td, dtype),
                cast(qkv_weight, dtype),
                cast(qkv_bias, dtype),
                num_heads=num_heads,
                td_bias=td_bias,
                is_causal=is_causal,
                attn_mask=attn_mask,
                scale=scale,
                num_queries=num_queries,
                backend=backend,
            )
    (x, td, qkv_weight, qkv_bias, attn_mask), back = as_tensors(
        x=x, td=td, qkv_weight=qkv_weight, qkv_bias=qkv_bias, attn_mask=attn_mask
    )
    require_one_kind(x=x, td=td, qkv_weight=qkv_weight, qkv_bias=qkv_bias)
    require_axes("x", x, "[b, n, c]", 3)
    b, n, c = x.shape
    if td is not None and td.shape != x.shape:
        raise ValueError(
            f"td must be [b, n, c] = {(b, n, c)}, prefix tokens included, got {tuple(td.shape)}"
        )
    num_heads = integer("num_heads", num_heads, 1)
    if qkv_weight.ndim != 2 or qkv_weight.shape[1] != c or qkv_weight.shape[0] % 3:
        raise ValueError(
            f"qkv_weight must be [3 a, c] with c = {c}, as x of shape {(b, n, c)}, "
            f"got {tuple(qkv_weight.shape)}"
        )
    a = qkv_weight.shape[0] // 3
    if a % num_heads:
        raise ValueError(
            f"num_heads must divide a = {a}, a third of the rows of qkv_weight, got {num_heads}"
        )
    if qkv_bias is not None and tuple(qkv_bias.shape) != (3 * a,):
        raise ValueError(
            f"qkv_bias must be [3 a] = {(3 * a,)}, as qkv_weight of shape {(3 * a, c)}, "
            f"got {tuple(qkv_bias.shape)}"
        )
    one_of("td_bias", td_bias, ("twice", "once"))
    is_causal = bool(is_causal)
    if num_queries is not None:
        num_queries = integer("num_queries", num_queries, 1, n)
        if is_causal:
            raise ValueError("num_queries and is_causal=True cannot be given together")
    require_mask(attn_mask, (b, num_heads, num_queries or n, n), is_causal, x.device)
    factor = scale_of(scale, a // num_heads)
    twice = td_bias == "twice"
    recorded = mask_is_differentiated(attn_mask)
    name = select(FAMILY, "topdown_attention_fwd", backend, x.device.type, x.dtype, recorded)
    if name == "reference":
        return back(
            reference.topdown_attention(
                x,
                td,
                qkv_weight,
                qkv_bias,
                num_heads,
                twice,
                attn_mask,
                is_causal,
                factor,
                num_queries,
            )
        )
    arguments = (x, td, qkv_weight, qkv_bias, attn_mask, num_heads, twice, is_causal, factor)
    if (
        kernels.unrecorded(x, td, qkv_weight, qkv_bias)
        and missing_kernels(FAMILY, name, "topdown_attention_apply") is None
    ):
        return back(kernels.attention_apply(*arguments, num_queries, name))
    out, *_ = kernels.attention(*arguments, num_queries, name)
    return back(out.flatten(2))
