"""The raw ops of the pairwise losses, opaque to torch.compile, and their autograd Functions.

The ops return gradients without scale, upstream gradient and divisor, in float32 (features; float64
for float64) and float64 (scalars): the factors are applied afterwards, out of place, in float32, so
that nothing under- or overflows in the features' dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from foveate._dispatch import differentiable, register
from foveate.ops.pairwise_loss.checks import accumulator
from foveate.ops.pairwise_loss.pairs import N_PAIRS, PAIRS_SCHEMA

FAMILY = "pairwise_loss"
_ONCE = (
    "{} is once differentiable: its fused backends have no second derivative; "
    'backend="reference" has every order'
)


def _gradients_like(
    x: torch.Tensor, y: torch.Tensor, needs: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty gradients of x, y, scale and bias; those that nobody needs have no elements."""
    acc = accumulator(x.dtype)
    wide = torch.float64
    return (
        x.new_empty(x.shape if needs[0] else (0, x.shape[1]), dtype=acc),
        y.new_empty(y.shape if needs[1] else (0, y.shape[1]), dtype=acc),
        x.new_empty(() if needs[2] else (0,), dtype=wide),
        x.new_empty(() if needs[3] else (0,), dtype=wide),
    )


def _stats_like(x: torch.Tensor, stats: bool) -> tuple[torch.Tensor, torch.Tensor]:
    counts = x.new_empty(2 if stats else 0, dtype=torch.int64)
    return counts, x.new_empty(8 if stats else 0, dtype=torch.float32)


def _loss_like(x: torch.Tensor, reduction: str) -> torch.Tensor:
    shape = (x.shape[0],) if reduction == "none" else ()
    return x.new_empty(shape, dtype=accumulator(x.dtype))


def _sigmoid_fwd_fake(x: Any, y: Any, scale: Any, bias: Any, *rest: Any) -> Any:
    reduction, needs, stats, *_ = rest[N_PAIRS:]
    return _loss_like(x, reduction), *_gradients_like(x, y, needs), *_stats_like(x, stats)


def _sigmoid_bwd_fake(x: Any, y: Any, scale: Any, bias: Any, row_factor: Any, *rest: Any) -> Any:
    return _gradients_like(x, y, rest[N_PAIRS])


def _info_nce_fwd_fake(x: Any, y: Any, scale: Any, bias: Any, *rest: Any) -> Any:
    symmetric, reduction, needs, stats, *_ = rest[N_PAIRS:]
    dx, dy, ds, _ = _gradients_like(x, y, [*needs, False])
    acc = accumulator(x.dtype)
    row_state = x.new_empty((x.shape[0], 2), dtype=acc)
    col_state = x.new_empty((y.shape[0] if symmetric else 0, 2), dtype=acc)
    return (
        _loss_like(x, reduction),
        dx,
        dy,
        ds,
        row_state,
        col_state,
        *_stats_like(x, stats),
    )


def _info_nce_bwd_fake(
    x: Any,
    y: Any,
    scale: Any,
    row_state: Any,
    col_state: Any,
    row_factor: Any,
    col_factor: Any,
    *rest: Any,
) -> Any:
    return _gradients_like(x, y, [*rest[N_PAIRS + 1], False])[:3]


sigmoid_loss_fwd = register(
    FAMILY,
    f"sigmoid_loss_fwd(Tensor x, Tensor y, Tensor scale, Tensor? bias, {PAIRS_SCHEMA}, "
    "str reduction, bool[] needs, bool stats, bool check, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_fwd_fake,
)
sigmoid_loss_bwd = register(
    FAMILY,
    "sigmoid_loss_bwd(Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? row_factor, "
    f"{PAIRS_SCHEMA}, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _sigmoid_bwd_fake,
)
info_nce_loss_fwd = register(
    FAMILY,
    f"info_nce_loss_fwd(Tensor x, Tensor y, Tensor scale, Tensor? bias, {PAIRS_SCHEMA}, "
    "bool symmetric, str reduction, bool[] needs, bool stats, bool check, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _info_nce_fwd_fake,
)
info_nce_loss_bwd = register(
    FAMILY,
    "info_nce_loss_bwd(Tensor x, Tensor y, Tensor scale, Tensor row_state, Tensor col_state, "
    f"Tensor? row_factor, Tensor? col_factor, {PAIRS_SCHEMA}, "
    "bool symmetric, bool[] needs, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _info_nce_bwd_fake,
)


def refuse_second_order(name: str, upstream: tuple[Any, ...]) -> None:
    """RuntimeError if anything but the loss has an upstream gradient.

    The raw gradients are outputs of the forward Function. They meet a gradient of their own only
    when somebody differentiates the gradient.
    """
    if torch.compiler.is_compiling():  # traces with every upstream gradient; torch refuses there
        return
    if any(gradient is not None for gradient in upstream):
        raise RuntimeError(_ONCE.format(name))


def scaled(
    gradient: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | None:
    """gradient * factor in a fresh tensor of `dtype`; None for a gradient without elements."""
    if gradient is None or gradient.numel() == 0:
        return None
    return (gradient * factor.to(gradient.dtype)).to(dtype)


def _grads(
    raw: tuple[Any, ...], upstream: torch.Tensor, scale: torch.Tensor, dtypes: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Gradients of (x, y, scale, bias) from the raw ones."""
    dx, dy, ds, db = raw
    features = upstream * scale
    return (
        scaled(dx, features, dtypes[0]),
        scaled(dy, features, dtypes[1]),
        scaled(ds, upstream, scale.dtype),
        scaled(db, upstream, scale.dtype),
    )


class _SigmoidLossBackward(torch.autograd.Function):
    """The recomputing backward pass, recorded only to refuse a second one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return sigmoid_loss_bwd(*args)

    @staticmethod
    def setup_context(_ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(_ctx: Any, *_upstream: Any) -> Any:
        raise RuntimeError(_ONCE.format("sigmoid_loss"))


class _SigmoidLoss(torch.autograd.Function):
    """(x, y, scale, bias, *pairs, reduction, divisor, forward mode, 4 needs, stats, check, backend)

    Forward mode computes the gradients with the loss and keeps them; else backward recomputes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        tensors, rest = args[: 4 + N_PAIRS], args[4 + N_PAIRS :]
        reduction, _divisor, in_forward, *needs, stats, check, backend = rest
        wanted = [need and in_forward for need in needs]
        return sigmoid_loss_fwd(*tensors, reduction, wanted, stats, check, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, y, scale, bias, *rest = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[5:])
        ctx.dtypes = x.dtype, y.dtype
        ctx.options = rest[N_PAIRS:]
        if ctx.options[2]:
            ctx.save_for_backward(scale, *output[1:5])
        else:
            pairs = rest[:N_PAIRS]
            ctx.scalars = [None if isinstance(v, torch.Tensor) else v for v in pairs]
            ctx.save_for_backward(
                x, y, scale, bias, *[v if isinstance(v, torch.Tensor) else None for v in pairs]
            )

    @staticmethod
    def backward(ctx: Any, upstream: Any, *others: Any) -> Any:
        refuse_second_order("sigmoid_loss", others[:4])
        reduction, divisor, in_forward, *needs, _stats, _check, backend = ctx.options
        nothing = (None,) * (N_PAIRS + len(ctx.options))
        if upstream is None:
            return None, None, None, None, *nothing
        if in_forward:
            scale, *raw = ctx.saved_tensors
        else:
            x, y, scale, bias, *tensors = ctx.saved_tensors
            pairs = [t if s is None else s for t, s in zip(tensors, ctx.scalars, strict=True)]
            row_factor = None
            if reduction == "none":
                row_factor, upstream = upstream, upstream.new_ones(())
            raw = _sigmoid_backward(x, y, scale, bias, row_factor, *pairs, needs, backend)
        return *_grads(tuple(raw), upstream / divisor, scale, ctx.dtypes), *nothing


class _InfoNceLossBackward(torch.autograd.Function):
    """The recomputing backward pass, recorded only to refuse a second one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return info_nce_loss_bwd(*args)

    @staticmethod
    def setup_context(_ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(_ctx: Any, *_upstream: Any) -> Any:
        raise RuntimeError(_ONCE.format("info_nce_loss"))


class _InfoNceLoss(torch.autograd.Function):
    """(x, y, scale, bias, *pairs, symmetric, reduction, divisor, forward mode, 4 needs, stats,
    check, backend)

    Forward mode keeps the gradients; else the log sums are kept and backward recomputes.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        tensors, rest = args[: 4 + N_PAIRS], args[4 + N_PAIRS :]
        symmetric, reduction, _divisor, in_forward, *needs, stats, check, backend = rest
        wanted = [need and in_forward for need in needs[:3]]
        return info_nce_loss_fwd(*tensors, symmetric, reduction, wanted, stats, check, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, y, scale, bias, *rest = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[4:])
        ctx.dtypes = x.dtype, y.dtype
        ctx.has_bias = bias is not None
        ctx.options = rest[N_PAIRS:]
        if ctx.options[3]:
            ctx.save_for_backward(scale, *output[1:4])
        else:
            pairs = rest[:N_PAIRS]
            ctx.scalars = [None if isinstance(v, torch.Tensor) else v for v in pairs]
            tensors = [v if isinstance(v, torch.Tensor) else None for v in pairs]
            ctx.save_for_backward(x, y, scale, *output[4:6], *tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Any, *others: Any) -> Any:
        refuse_second_order("info_nce_loss", others[:3])
        symmetric, reduction, divisor, in_forward, *needs, _stats, _check, backend = ctx.options
        nothing = (None,) * (N_PAIRS + len(ctx.options))
        if upstream is None:
            return None, None, None, None, *nothing
        zero = torch.zeros_like(upstream.sum()) if ctx.has_bias and needs[3] else None
        if in_forward:
            scale, *raw = ctx.saved_tensors
        else:
            x, y, scale, row_state, col_state, *tensors = ctx.saved_tensors
            pairs = [t if s is None else s for t, s in zip(tensors, ctx.scalars, strict=True)]
            row_factor = None
            if reduction == "none":
                row_factor, upstream = upstream, upstream.new_ones(())
            # With columns too, n = m and column j's positive is row j.
            col_factor = row_factor if symmetric else None
            options = symmetric, needs[:3], backend
            raw = _info_nce_backward(
                x, y, scale, row_state, col_state, row_factor, col_factor, *pairs, *options
            )
        grads = _grads((*raw, None), upstream / divisor, scale, ctx.dtypes)
        return *grads[:3], zero, *nothing


sigmoid = differentiable(_SigmoidLoss)
_sigmoid_backward = differentiable(_SigmoidLossBackward)
info_nce = differentiable(_InfoNceLoss)
_info_nce_backward = differentiable(_InfoNceLossBackward)


def recorded(*tensors: torch.Tensor | None) -> list[bool]:
    """Which of the tensors autograd or a functorch transform may differentiate."""
    if torch._C._are_functorch_transforms_active():
        return [tensor is not None for tensor in tensors]
    enabled = torch.is_grad_enabled()
    return [enabled and tensor is not None and tensor.requires_grad for tensor in tensors]
