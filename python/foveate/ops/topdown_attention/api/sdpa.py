"""Scaled dot product attention over v + v_td, for blocks that have their own q, k and v."""

from __future__ import annotations

from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._dispatch import select
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


def topdown_sdpa(
    q: Any,
    k: Any,
    v: Any,
    v_td: Any = None,
    *,
    is_causal: bool = False,
    attn_mask: Any = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Any:
    """softmax(scale q k^T + mask) (v + v_td), for blocks that make their own q, k and v.

    Source: "TOAST: Transfer Learning via Attention Steering" (arXiv 2305.15542), section 3.
    Differentiable once in every floating tensor. Strided views of one packed buffer are read in
    place. Inside autocast the floating tensors are cast to its dtype.

    Args:
        q: `[b, h, n, d]` float32, float64, bfloat16 or float16, any strides. NumPy and CuPy
            arrays are taken and given back.
        k: `[b, h, m, d]`.
        v: `[b, h, m, d]`.
        v_td: `[b, h, m, d]`, the top-down signal in value space, or None.
        is_causal: query i attends to keys 0..i; needs m == n.
        attn_mask: bool (True: may attend) or floating (added to the scores), broadcastable to
            `[b, h, n, m]`. A row without an allowed key gives zeros.
        scale: factor of the scores; None is d^-0.5.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        `[b, h, n, d]` in the dtype of q.

    Raises:
        TypeError: non-tensors, mixed kinds or dtypes, an integer mask.
        ValueError: a shape, value or combination that does not fit; the argument is named.
        NotImplementedError: the named backend cannot run this.
    """
    dtype = autocast_dtype(q)
    if dtype is not None:
        with torch.autocast(q.device.type, enabled=False):
            return topdown_sdpa(
                cast(q, dtype),
                cast(k, dtype),
                cast(v, dtype),
                cast(v_td, dtype),
                is_causal=is_causal,
                attn_mask=attn_mask,
                scale=scale,
                backend=backend,
            )
    (q, k, v, v_td, attn_mask), back = as_tensors(q=q, k=k, v=v, v_td=v_td, attn_mask=attn_mask)
    require_one_kind(q=q, k=k, v=v, v_td=v_td)
    require_axes("q", q, "[b, h, n, d]", 4)
    b, h, n, d = q.shape
    require_axes("k", k, "[b, h, m, d]", 4)
    m = k.shape[2]
    for name, tensor in (("k", k), ("v", v), ("v_td", v_td)):
        if tensor is not None and tuple(tensor.shape) != (b, h, m, d):
            raise ValueError(
                f"{name} must be [b, h, m, d] = {(b, h, m, d)}, as q and k (repeat the heads of "
                f"grouped-query attention), got {tuple(tensor.shape)}"
            )
    is_causal = bool(is_causal)
    if is_causal and m != n:
        raise ValueError(f"is_causal=True needs as many keys as queries, got m = {m}, n = {n}")
    require_mask(attn_mask, (b, h, n, m), is_causal, q.device)
    factor = scale_of(scale, d)
    recorded = mask_is_differentiated(attn_mask)
    name = select(FAMILY, "topdown_attention_fwd", backend, q.device.type, q.dtype, recorded)
    if name == "reference":
        return back(reference.topdown_sdpa(q, k, v, v_td, attn_mask, is_causal, factor))
    out, _ = kernels.sdpa(q, k, v, v_td, attn_mask, is_causal, factor, name)
    return back(out.transpose(1, 2))
