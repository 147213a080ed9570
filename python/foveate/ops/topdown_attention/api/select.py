"""Which tokens a prompt selects."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foveate._arrays import as_tensors
from foveate._checks import shape
from foveate._dispatch import differentiable, register, select
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
    name = select(FAMILY, "prompt_select_fwd", backend, x.device.type, x.dtype)
    if name == "reference":
        z, mask = reference.prompt_select(x, prompt, float(eps))
    else:
        z, mask, *_ = _prompt_select(x, prompt, float(eps), name)
    if transform is not None:
        z = z @ transform
    return back((z, mask) if return_mask else z)


class _PromptSelect(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: torch.Tensor, prompt: torch.Tensor, eps: float, backend: str
    ) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = _select_fwd(x, prompt, eps, backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, prompt, ctx.eps, ctx.backend = inputs
        _z, _mask, *rest = output
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)
        ctx.per_image = prompt.ndim == 2
        ctx.save_for_backward(x, *rest)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, z_slope: torch.Tensor | None, mask_slope: torch.Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        x, unit, cosine, length = ctx.saved_tensors
        if z_slope is None and mask_slope is None:
            return None, None, None, None
        for_x, for_prompt = ctx.needs_input_grad[:2]
        x_slope, prompt_slope = _select_bwd(
            x,
            unit,
            cosine,
            length,
            ctx.eps,
            torch.zeros_like(x) if z_slope is None else z_slope,
            mask_slope,
            ctx.per_image,
            for_x,
            for_prompt,
            ctx.backend,
        )
        return x_slope if for_x else None, prompt_slope if for_prompt else None, None, None


_prompt_select = differentiable(_PromptSelect)


def _fwd_fake(x: torch.Tensor, prompt: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    b, n, c = x.shape
    work = torch.float64
    return (
        x.new_empty(b, n, c),
        x.new_empty(b, n, 1),
        x.new_empty(b if prompt.ndim == 2 else 1, c + 1, dtype=work),
        x.new_empty(b, n, dtype=work),
        x.new_empty(b, n, dtype=work),
    )


def _bwd_fake(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    per_image, for_x, for_prompt = args[-4:-1]
    b, n, c = x.shape
    prompt = (b, c) if per_image else (c,)
    return x.new_empty((b, n, c) if for_x else (0,)), x.new_empty(prompt if for_prompt else (0,))


_select_fwd = register(
    FAMILY,
    "prompt_select_fwd(Tensor x, Tensor prompt, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_select_bwd = register(
    FAMILY,
    "prompt_select_bwd(Tensor x, Tensor unit, Tensor cosine, Tensor length, float eps, "
    "Tensor z_slope, Tensor? mask_slope, bool per_image, bool for_x, bool for_prompt, "
    "str backend) -> (Tensor, Tensor)",
    _bwd_fake,
)
