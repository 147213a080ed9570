"""Which tokens a prompt selects."""

from __future__ import annotations

from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import shape
from foveate._dispatch import select
from foveate.ops.topdown_attention import reference
from foveate.ops.topdown_attention.checks import (
    FAMILY,
    autocast_dtype,
    cast,
    require_axes,
    require_one_kind,
)


def prompt_select(
    x: Any,
    prompt: Any,
    transform: Any = None,
    *,
    eps: float = 1e-12,
    return_mask: bool = False,
    backend: str = "auto",
) -> Any:
    """Tokens weighted by their cosine with a prompt, and transformed: z = (m x) T.

    m = clamp(x/max(|x|, eps) . p/max(|p|, eps), 0, 1); the scale of p does not matter.
    Source: "TOAST: Transfer Learning via Attention Steering" (arXiv 2305.15542), section 3.
    Differentiable once in every floating tensor; the mask has the cosine's gradient where
    0 < cosine < 1 and none elsewhere. Inside autocast the tensors are cast to its dtype.

    Args:
        x: `[b, n, c]` float32, float64, bfloat16 or float16, any strides. NumPy and CuPy arrays
            are taken and given back.
        prompt: `[c]`, or `[b, c]` for one per image.
        transform: `[c, c]`, multiplied from the right without a transpose; None is no product.
        eps: smallest norm that divides, > 0.
        return_mask: also give m.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        z `[b, n, c]`, or (z, m `[b, n, 1]`), in the dtype of x.

    Raises:
        TypeError: non-tensors, mixed kinds or dtypes.
        ValueError: a shape that does not fit, eps <= 0; the argument is named.
        NotImplementedError: the named backend cannot run this.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        with torch.autocast(x.device.type, enabled=False):
            return prompt_select(
                cast(x, dtype),
                cast(prompt, dtype),
                cast(transform, dtype),
                eps=eps,
                return_mask=return_mask,
                backend=backend,
            )
    (x, prompt, transform), back = as_tensors(x=x, prompt=prompt, transform=transform)
    require_one_kind(x=x, prompt=prompt, transform=transform)
    require_axes("x", x, "[b, n, c]", 3)
    b, _, c = x.shape
    if tuple(prompt.shape) not in ((c,), (b, c)):
        raise ValueError(
            f"prompt must be [c] = {(c,)} or [b, c] = {(b, c)}, got {tuple(prompt.shape)}"
        )
    if transform is not None:
        shape("transform", transform, (c, c), "[c, c]")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps > 0:
        raise ValueError(f"eps must be greater than 0, got {eps}")
    select(FAMILY, "prompt_select", backend, x.device.type)
    z, mask = reference.prompt_select(x, prompt, float(eps))
    if transform is not None:
        z = z @ transform
    return back((z, mask) if return_mask else z)
