"""Bits as classes: cross entropy over groups of bits, and the bits that a softmax expects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foveate._arrays import as_tensors
from foveate._checks import FLOATING, integer, one_of, same_device
from foveate._dispatch import differentiable, register, select
from foveate.ops.analog_bits import reference
from foveate.ops.analog_bits.api.slope import hand_over, keep_slope, scaled, writes_slope
from foveate.ops.analog_bits.groups import MOST_BITS, SoftmaxTarget, group_count, one_axis
from foveate.ops.analog_bits.layout import (
    REDUCTIONS,
    bit_widths,
    ids_with_map_axis,
    is_msb,
    normalize_dim,
    pixel_shape,
    pixel_weight,
    work_dtype,
)

_FAMILY = "analog_bits"


def bits_softmax_cross_entropy(
    logits: Any,
    x: Any,
    n_bits: int | Sequence[int],
    *,
    groups: int | None = None,
    weight: Any = None,
    bit_order: str = "lsb",
    dim: int = -1,
    reduction: str = "mean",
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """Cross entropy of the integer that each group of bits spells: mean of w (lse(l_g) - l_g[t_g]).

    The N bits fall into G groups of m = N / G, each with 2^m logits; t_g is the group's bits as an
    integer, in the same bit order.
    Source: Chen et al., "A Generalist Framework for Panoptic Segmentation of Images and Videos"
    (ICCV 2023).

    Args:
        logits: floating, the pixel axes and one axis of G 2^m at `dim`, or two (G, 2^m) there.
        x: ids as in `bits_encode`.
        n_bits: bits of an id, 1..63; a tuple gives the bits of each of K maps at `dim`.
        groups: G; None is one group for each map.
        weight: `[*pixel]` or `[b]`, floating; no gradient.
        bit_order: "lsb" or "msb", the bit that comes first.
        dim: axis of the channels in the bits tensor.
        reduction: "mean", "sum", or "none" for `[*pixel]`, the mean over groups.
        check: whether ids are checked. None: on CPU yes, on CUDA no.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        float32 (float64 for float64 logits), `[]` or `[*pixel]`. The gradient goes to logits alone.

    Raises:
        TypeError: logits or weight is not floating, ids are not integers.
        ValueError: shapes or groups that do not fit, more than 16 bits a group, an id out of range.
        NotImplementedError: the named backend cannot run this.
    """
    (logits, x, weight), back = as_tensors(logits=logits, x=x, weight=weight)
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    one_of("reduction", reduction, REDUCTIONS)
    one_of("check", check, (None, True, False))
    widths = bit_widths(n_bits)
    msb = is_msb(bit_order)
    ids, dim = ids_with_map_axis(x, widths, dim)
    count = group_count(widths, groups)
    pixels = pixel_shape(ids.shape, dim)
    logits = one_axis(logits, pixels, dim, count, widths.channels // count)
    same_device(logits=logits, x=x, weight=weight)
    if check is None:
        check = x.device.type == "cpu"
    target = SoftmaxTarget(
        ids,
        list(widths.n_bits),
        msb,
        dim,
        count,
        pixel_weight(weight, pixels, work_dtype(logits.dtype)),
        reduction,
    )
    name = select(_FAMILY, "bits_softmax_loss_fwd", backend, logits.device.type, logits.dtype)
    if name == "reference":
        checked = check and not torch.compiler.is_compiling()
        return back(reference.bits_softmax_cross_entropy(logits, target, checked))
    with_slope = writes_slope(name, logits, reduction)
    loss, _ = _softmax_loss(logits, with_slope, check, name, *target)
    return back(loss)


class _SoftmaxLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: torch.Tensor, with_slope: bool, check: bool, backend: str, *target: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, slope = _loss_fwd(logits, *target, with_slope, check, backend)
        return loss, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        logits, with_slope, _check, backend, *target = inputs
        slope = output[1]
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.slope = backend, None
        ctx.needs_inputs = not with_slope or keep_slope(ctx, slope, backend)
        if not ctx.needs_inputs:
            return
        given = SoftmaxTarget(*target)
        ctx.rest = given[1:5], given.reduction
        ctx.save_for_backward(logits, given.x, given.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        nothing = (None,) * (3 + len(SoftmaxTarget._fields))
        if upstream is None:
            return (None, *nothing)
        if not ctx.needs_inputs:
            (slope,) = ctx.saved_tensors
            return (scaled(slope, upstream), *nothing)
        if (slope := hand_over(ctx, upstream, ctx.backend)) is not None:
            return (slope, *nothing)
        logits, x, weight = ctx.saved_tensors
        middle, reduction = ctx.rest
        target = (x, *middle, weight, reduction)
        return (_loss_bwd(logits, upstream, *target, ctx.backend), *nothing)


_softmax_loss = differentiable(_SoftmaxLoss)


def bits_softmax_expectation(
    logits: Any,
    n_bits: int,
    *,
    groups: int | None = None,
    scale: float = 1.0,
    bit_order: str = "lsb",
    dim: int = -1,
    dtype: torch.dtype | None = None,
    out: Any = None,
    backend: str = "auto",
) -> Any:
    """The bits expected under a softmax over the 2^m integers of a group: scale (2 E_j - 1).

    E_j = sum_k softmax(l_g)_k bit_j(k). This is Pix2Seq-D's prediction of x0 from logits.
    Source: Chen et al., "A Generalist Framework for Panoptic Segmentation of Images and Videos"
    (ICCV 2023).

    Args:
        logits: floating; for groups=None two axes (G, 2^m) at `dim`, else one of G 2^m there.
        n_bits: m, bits of a group, 1..16.
        groups: G for logits with one axis.
        scale: value of a bit that is surely set.
        bit_order: "lsb" or "msb", the bit that comes first.
        dim: axis of the G m channels in the result.
        dtype: dtype of the result; None is that of logits.
        out: tensor of the result's shape and dtype to write to (no gradient then).
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        G m channels at `dim`; differentiable in logits.

    Raises:
        TypeError: logits or dtype is not floating.
        ValueError: shapes that do not fit, n_bits outside 1..16.
        NotImplementedError: the named backend cannot run this.
    """
    (logits, out), back = as_tensors(logits=logits, out=out)
    if logits.dtype not in FLOATING:
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    bits = integer("n_bits", n_bits, 1, MOST_BITS)
    msb = is_msb(bit_order)
    axes = 2 if groups is None else 1
    if logits.ndim < axes:
        raise ValueError(
            f"logits must have {axes} axes of groups * 2**bits, got shape {tuple(logits.shape)}"
        )
    dim = normalize_dim(dim, logits.ndim + 1 - axes)
    pixels = (*logits.shape[:dim], *logits.shape[dim + axes :])
    count = logits.shape[dim] if groups is None else integer("groups", groups, 1)
    logits = one_axis(logits, pixels, dim, count, bits)
    dtype = logits.dtype if dtype is None else dtype
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be floating, got {dtype}")
    shape = (*pixels[:dim], count * bits, *pixels[dim:])
    if out is not None:
        if tuple(out.shape) != shape:
            raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
        if out.dtype != dtype:
            raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
        if logits.requires_grad and torch.is_grad_enabled():
            raise ValueError("out= gets no gradient, but logits require grad")
        same_device(logits=logits, out=out)
    name = select(
        _FAMILY, "bits_softmax_expectation_fwd", backend, logits.device.type, logits.dtype
    )
    arguments = (count, bits, msb, dim, float(scale))
    if name == "reference":
        result = reference.bits_softmax_expectation(logits, *arguments, dtype)
    else:
        wide = dtype == torch.float64 and logits.dtype != torch.float64
        written = torch.float32 if wide else dtype  # in which the kernels compute
        result = _expectation(logits, *arguments, written, name).to(dtype)
    if out is None:
        return back(result)
    out.copy_(result)
    return back(out)


class _Expectation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        result: torch.Tensor = _expectation_fwd(logits, *rest)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, *rest, _dtype, backend = inputs
        ctx.save_for_backward(logits)
        ctx.rest, ctx.backend = rest, backend

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        (logits,) = ctx.saved_tensors
        return (_expectation_bwd(logits, upstream, *ctx.rest, ctx.backend), *(None,) * 7)


_expectation = differentiable(_Expectation)


def _loss_fwd_fake(logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    target, with_slope = SoftmaxTarget(*args[:-3]), args[-3]
    shape = pixel_shape(logits.shape, target.dim) if target.reduction == "none" else ()
    loss = logits.new_empty(shape, dtype=work_dtype(logits.dtype))
    return loss, logits.new_empty(logits.shape if with_slope else (0,))


def _bwd_fake(logits: torch.Tensor, *args: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _expectation_fwd_fake(
    logits: torch.Tensor,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    scale: float,
    dtype: torch.dtype,
    backend: str,
) -> torch.Tensor:
    shape = (*logits.shape[:dim], groups * bits, *logits.shape[dim + 1 :])
    return logits.new_empty(shape, dtype=dtype)


_TARGET = "Tensor x, int[] n_bits, bool msb, int dim, int groups, Tensor? weight, str reduction"
_GROUPS = "int groups, int bits, bool msb, int dim, float scale"
_loss_fwd = register(
    _FAMILY,
    f"bits_softmax_loss_fwd(Tensor logits, {_TARGET}, bool with_slope, bool check, str backend) "
    "-> (Tensor, Tensor)",
    _loss_fwd_fake,
)
_loss_bwd = register(
    _FAMILY,
    f"bits_softmax_loss_bwd(Tensor logits, Tensor upstream, {_TARGET}, str backend) -> Tensor",
    _bwd_fake,
)
_expectation_fwd = register(
    _FAMILY,
    f"bits_softmax_expectation_fwd(Tensor logits, {_GROUPS}, ScalarType dtype, str backend) "
    "-> Tensor",
    _expectation_fwd_fake,
)
_expectation_bwd = register(
    _FAMILY,
    f"bits_softmax_expectation_bwd(Tensor logits, Tensor upstream, {_GROUPS}, str backend) "
    "-> Tensor",
    _bwd_fake,
)
