"""The head of Pix2Seq-D as one op: a linear layer and its softmax, without the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foveate._arrays import as_tensors
from foveate._checks import floating, integer, one_of, same_device, same_dtype
from foveate._dispatch import differentiable, register, select
from foveate.ops.analog_bits import reference
from foveate.ops.analog_bits.groups import MOST_BITS, SoftmaxTarget, group_count
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


def bits_linear_softmax_cross_entropy(
    h: Any,
    proj: Any,
    bias: Any,
    x: Any,
    n_bits: int | Sequence[int],
    *,
    groups: int | None = None,
    weight: Any = None,
    bit_order: str = "lsb",
    dim: int = -1,
    reduction: str = "mean",
    chunk: int | None = None,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """`bits_softmax_cross_entropy` of the logits h proj^T + bias, which never exist whole.

    Source: Chen et al., "A Generalist Framework for Panoptic Segmentation of Images and Videos"
    (ICCV 2023).

    Args:
        h: `[*pixel, d]` floating, d at `dim`.
        proj: `[G 2^m, d]`, of h's dtype.
        bias: `[G 2^m]`, of h's dtype, or None.
        x, n_bits, groups, weight, bit_order, dim, reduction, check: as in
            `bits_softmax_cross_entropy`.
        chunk: pixels whose logits exist at a time; None: those of about 2 MiB.
        backend: "auto", "reference" or "cpu".

    Returns:
        float32 (float64 for float64 h), `[]` or `[*pixel]`; gradients go to h, proj and bias.

    Raises:
        TypeError: h, proj, bias or weight is not floating, of two dtypes, ids are not integers.
        ValueError: shapes or groups that do not fit, more than 16 bits a group, an id out of range.
        NotImplementedError: the named backend cannot run this.
    """
    (h, proj, bias, x, weight), back = as_tensors(h=h, proj=proj, bias=bias, x=x, weight=weight)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("check", check, (None, True, False))
    widths = bit_widths(n_bits)
    msb = is_msb(bit_order)
    ids, dim = ids_with_map_axis(x, widths, dim)
    count = group_count(widths, groups)
    _layer(h, proj, bias, dim, count, widths.channels // count)
    pixels = pixel_shape(ids.shape, dim)
    if pixel_shape(h.shape, dim) != pixels:
        raise ValueError(
            f"h must have the pixels {pixels} of x and d at dim {dim}, got {tuple(h.shape)}"
        )
    same_device(h=h, proj=proj, bias=bias, x=x, weight=weight)
    chunk = None if chunk is None else integer("chunk", chunk, 1)
    if check is None:
        check = x.device.type == "cpu"
    w = pixel_weight(weight, pixels, work_dtype(h.dtype))
    target = SoftmaxTarget(ids, list(widths.n_bits), msb, dim, count, w, reduction)
    name = select(_FAMILY, "bits_linear_softmax_loss_fwd", backend, h.device.type, h.dtype)
    if name == "reference":
        checked = check and not torch.compiler.is_compiling()
        return back(reference.bits_linear_softmax_cross_entropy(h, proj, bias, target, checked))
    wanted = any(t is not None and t.requires_grad for t in (h, proj, bias))
    # As in bits_softmax_cross_entropy: where the incoming factor must come first, backward
    # computes the logits again.
    with_slope = (
        wanted and torch.is_grad_enabled() and reduction != "none" and h.dtype != torch.float16
    )
    loss, *_ = _linear_loss(h, proj, bias, chunk, with_slope, check, name, *target)
    return back(loss)


def bits_linear_softmax_expectation(
    h: Any,
    proj: Any,
    bias: Any,
    n_bits: int,
    *,
    scale: float = 1.0,
    bit_order: str = "lsb",
    dim: int = -1,
    chunk: int | None = None,
    backend: str = "auto",
) -> Any:
    """`bits_softmax_expectation` of the logits h proj^T + bias, which never exist whole.

    Args:
        h: `[*pixel, d]` floating, d at `dim`.
        proj: `[G 2^m, d]`, of h's dtype.
        bias: `[G 2^m]`, of h's dtype, or None.
        n_bits: m, bits of a group, 1..16.
        scale, bit_order, dim: as in `bits_softmax_expectation`.
        chunk: pixels whose logits exist at a time; None: those of about 2 MiB.
        backend: "auto", "reference" or "cpu".

    Returns:
        G m channels at `dim`, of h's dtype; gradients go to h, proj and bias.

    Raises:
        TypeError: h, proj or bias is not floating or of another dtype.
        ValueError: shapes that do not fit, n_bits outside 1..16.
        NotImplementedError: the named backend cannot run this.
    """
    (h, proj, bias), back = as_tensors(h=h, proj=proj, bias=bias)
    bits = integer("n_bits", n_bits, 1, MOST_BITS)
    msb = is_msb(bit_order)
    dim = normalize_dim(dim, h.ndim)
    _layer(h, proj, bias, dim, None, bits)
    same_device(h=h, proj=proj, bias=bias)
    chunk = None if chunk is None else integer("chunk", chunk, 1)
    groups = len(proj) >> bits
    name = select(_FAMILY, "bits_linear_softmax_expectation_fwd", backend, h.device.type, h.dtype)
    arguments = (groups, bits, msb, dim, float(scale), chunk)
    if name == "reference":
        return back(reference.bits_linear_softmax_expectation(h, proj, bias, *arguments))
    return back(_linear_expectation(h, proj, bias, *arguments, name))


def _layer(
    h: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    dim: int,
    groups: int | None,
    bits: int,
) -> None:
    """The checks of a layer for `groups` groups (None: any number of them) of `bits` bits."""
    floating(h=h, proj=proj, bias=bias)
    same_dtype(h=h, proj=proj, bias=bias)
    if dim >= h.ndim:
        raise ValueError(f"h must have d at dim {dim}, got shape {tuple(h.shape)}")
    d = h.shape[dim]
    values = "groups * 2**bits" if groups is None else f"{groups} * 2**{bits} = {groups << bits}"
    rows_fit = proj.ndim == 2 and (
        len(proj) % (1 << bits) == 0 and len(proj) > 0
        if groups is None
        else len(proj) == groups << bits
    )
    if not rows_fit or proj.shape[1] != d:
        raise ValueError(
            f"proj must be [groups * 2**bits, d] = [{values}, {d}], got {tuple(proj.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (len(proj),):
        raise ValueError(f"bias must be ({len(proj)},), got {tuple(bias.shape)}")


def _gradients(
    bias: torch.Tensor | None, slopes: tuple[torch.Tensor, ...], upstream: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """Those of h, proj and bias, scaled out of place: a second backward must find the same."""
    if upstream is not None and (torch.compiler.is_compiling() or float(upstream) != 1.0):
        slopes = tuple((slope * upstream).to(slope.dtype) for slope in slopes)
    h, proj, b = slopes
    return h, proj, None if bias is None else b


class _LinearLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        h: torch.Tensor,
        proj: torch.Tensor,
        bias: torch.Tensor | None,
        chunk: int | None,
        with_slope: bool,
        check: bool,
        backend: str,
        *target: Any,
    ) -> tuple[torch.Tensor, ...]:
        result: tuple[torch.Tensor, ...] = _loss_fwd(
            h, proj, bias, *target, chunk, with_slope, check, backend
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        h, proj, bias, chunk, with_slope, _check, backend, *target = inputs
        _loss, *slopes = output
        ctx.mark_non_differentiable(*slopes)
        ctx.set_materialize_grads(False)
        ctx.chunk, ctx.with_slope, ctx.backend = chunk, with_slope, backend
        given = SoftmaxTarget(*target)
        ctx.rest = given[1:5], given.reduction
        if with_slope:
            ctx.save_for_backward(bias, *slopes)
        else:
            ctx.save_for_backward(h, proj, bias, given.x, given.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        nothing = (None,) * (4 + len(SoftmaxTarget._fields))
        if upstream is None:
            return (None, None, None, *nothing)
        if ctx.with_slope:
            bias, *slopes = ctx.saved_tensors
            return (*_gradients(bias, tuple(slopes), upstream), *nothing)
        h, proj, bias, x, weight = ctx.saved_tensors
        middle, reduction = ctx.rest
        target = (x, *middle, weight, reduction)
        slopes = _loss_bwd(h, proj, bias, upstream, *target, ctx.chunk, ctx.backend)
        return (*_gradients(bias, slopes, None), *nothing)


_linear_loss = differentiable(_LinearLoss)


class _LinearExpectation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        h: torch.Tensor, proj: torch.Tensor, bias: torch.Tensor | None, *rest: Any
    ) -> torch.Tensor:
        result: torch.Tensor = _expectation_fwd(h, proj, bias, *rest)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        h, proj, bias, *ctx.rest = inputs
        ctx.save_for_backward(h, proj, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        h, proj, bias = ctx.saved_tensors
        slopes = _expectation_bwd(h, proj, bias, upstream, *ctx.rest)
        return (*_gradients(bias, slopes, None), *(None,) * len(ctx.rest))


_linear_expectation = differentiable(_LinearExpectation)


def _loss_fwd_fake(
    h: torch.Tensor, proj: torch.Tensor, bias: torch.Tensor | None, *args: Any
) -> tuple[torch.Tensor, ...]:
    target, with_slope = SoftmaxTarget(*args[:-4]), args[-3]
    shape = pixel_shape(h.shape, target.dim) if target.reduction == "none" else ()
    loss = h.new_empty(shape, dtype=work_dtype(h.dtype))
    if not with_slope:
        return loss, h.new_empty(0), proj.new_empty(0), proj.new_empty(0)
    return loss, *_slopes_fake(h, proj, bias)


def _slopes_fake(
    h: torch.Tensor, proj: torch.Tensor, bias: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_bias = proj.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return h.new_empty(h.shape), proj.new_empty(proj.shape), of_bias


def _expectation_fake(
    h: torch.Tensor,
    proj: torch.Tensor,
    bias: torch.Tensor | None,
    groups: int,
    bits: int,
    msb: bool,
    dim: int,
    *_: Any,
) -> torch.Tensor:
    return h.new_empty((*h.shape[:dim], groups * bits, *h.shape[dim + 1 :]))


_HEAD = "Tensor h, Tensor proj, Tensor? bias"
_TARGET = "Tensor x, int[] n_bits, bool msb, int dim, int groups, Tensor? weight, str reduction"
_GROUPS = "int groups, int bits, bool msb, int dim, float scale, int? chunk"
_loss_fwd = register(
    _FAMILY,
    f"bits_linear_softmax_loss_fwd({_HEAD}, {_TARGET}, int? chunk, bool with_slope, bool check, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _loss_fwd_fake,
)
_loss_bwd = register(
    _FAMILY,
    f"bits_linear_softmax_loss_bwd({_HEAD}, Tensor upstream, {_TARGET}, int? chunk, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _slopes_fake,
)
_expectation_fwd = register(
    _FAMILY,
    f"bits_linear_softmax_expectation_fwd({_HEAD}, {_GROUPS}, str backend) -> Tensor",
    _expectation_fake,
)
_expectation_bwd = register(
    _FAMILY,
    f"bits_linear_softmax_expectation_bwd({_HEAD}, Tensor upstream, {_GROUPS}, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _slopes_fake,
)
