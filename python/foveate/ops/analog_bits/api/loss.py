"""Losses on predicted bits, without target bits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foveate._arrays import as_tensors
from foveate._checks import FLOATING, one_of, same_device
from foveate._dispatch import differentiable, register, select
from foveate.ops.analog_bits import reference
from foveate.ops.analog_bits.api.noise import given_noise
from foveate.ops.analog_bits.api.slope import hand_over, keep_slope, scaled, writes_slope
from foveate.ops.analog_bits.layout import (
    LOSS_KINDS,
    REDUCTIONS,
    LossTarget,
    bit_widths,
    ids_with_map_axis,
    is_msb,
    pixel_shape,
    pixel_weight,
    work_dtype,
)
from foveate.ops.analog_bits.seeds import noise_key, per_sample

_FAMILY = "analog_bits"


def bits_loss(
    pred: Any,
    x: Any,
    n_bits: int | Sequence[int],
    *,
    kind: str = "x",
    scale: float = 1.0,
    weight: Any = None,
    gamma: Any = None,
    noise: Any = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    eps: float = 0.0,
    bit_order: str = "lsb",
    dim: int = -1,
    reduction: str = "mean",
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """Loss of predicted bits against ids: the mean of w L(pred, target), gradient to pred alone.

    "x": (pred - s)^2, s = +-scale; "eps": (pred - e)^2; "v": (pred - v)^2 with
    v = sqrt(gamma) e - sqrt(1 - gamma) s; "sigmoid": -log(sigmoid(z) + eps), z = pred where the bit
    is set, else -pred. Means divide by the count of bits, never by the sum of weights.
    Source: Chen et al., "Analog Bits" (ICLR 2023), sections 2 and 3.2; v: Salimans and Ho (2022).

    Args:
        pred: `[.., N, ..]` float16, bfloat16, float32 or float64, channels at `dim`.
        x: ids as in `bits_encode`.
        n_bits: bits of an id, 1..63; a tuple gives the bits of each of K maps at `dim`.
        kind: "x", "eps", "v" or "sigmoid".
        scale: value of a set bit (kinds "x" and "v").
        weight: `[*pixel]` or `[b]`, floating; no gradient.
        gamma: float or `[b]`, noise level (kind "v").
        noise: e, floating, like pred (kinds "eps" and "v").
        seed, offset: e is the stream that `bits_q_sample` added.
        eps: added to the sigmoid; 0 is the exact binary cross entropy.
        bit_order: "lsb" or "msb", the bit that comes first.
        dim: axis of the channels.
        reduction: "mean", "sum", or "none" for `[*pixel]`, the mean over bits.
        check: whether ids and gamma are checked. None: on CPU yes, on CUDA no.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        float32 (float64 for float64 pred), `[]` or `[*pixel]`.

    Raises:
        TypeError: pred or weight is not floating, ids are not integers.
        ValueError: shapes that do not fit, a kind without its noise or gamma, an id out of range.
        NotImplementedError: the named backend cannot run this.
    """
    (pred, x, weight, gamma, noise), back = as_tensors(
        pred=pred, x=x, weight=weight, gamma=gamma, noise=noise
    )
    if pred.dtype not in FLOATING:
        raise TypeError(f"pred must be float16, bfloat16, float32 or float64, got {pred.dtype}")
    one_of("kind", kind, LOSS_KINDS)
    one_of("reduction", reduction, REDUCTIONS)
    one_of("check", check, (None, True, False))
    widths = bit_widths(n_bits)
    msb = is_msb(bit_order)
    ids, dim = ids_with_map_axis(x, widths, dim)
    shape = (*ids.shape[:dim], widths.channels, *ids.shape[dim + 1 :])
    if tuple(pred.shape) != shape:
        hint = ""
        if sorted(pred.shape) == sorted(shape) and widths.channels in pred.shape:
            hint = f"; pass dim={list(pred.shape).index(widths.channels)}"
        raise ValueError(
            f"pred must have shape {shape} for N = {widths.channels} bits, "
            f"got {tuple(pred.shape)}{hint}"
        )
    same_device(pred=pred, x=x, weight=weight, noise=noise)
    if not eps >= 0.0:
        raise ValueError(f"eps must be at least 0, got {eps}")
    if check is None:
        check = x.device.type == "cpu"
    work = work_dtype(pred.dtype)
    key: tuple[torch.Tensor | None, int, int] = (None, 0, 0)
    if kind in ("eps", "v"):
        if noise is not None and seed is not None:
            raise ValueError("noise and seed exclude each other, got both")
        if noise is not None:
            noise = given_noise(noise, shape, work)
        elif seed is None:
            raise ValueError(f"kind={kind!r} needs noise= or seed=, got neither")
        else:
            key = noise_key(seed, offset, None, pred.device)
    else:
        noise = None
    levels = None
    if kind == "v":
        if gamma is None:
            raise ValueError("kind='v' needs gamma=, got None")
        levels = per_sample("gamma", gamma, torch.Size(shape), dim, check).to(pred.device)
    target = LossTarget(
        ids,
        list(widths.n_bits),
        msb,
        dim,
        LOSS_KINDS[kind],
        float(scale),
        float(eps),
        levels,
        noise,
        *key,
        pixel_weight(weight, pixel_shape(shape, dim), work),
        reduction,
    )
    name = select(_FAMILY, "bits_loss_fwd", backend, pred.device.type, widths.channels)
    if name == "reference":
        return back(reference.bits_loss(pred, target, check and not torch.compiler.is_compiling()))
    with_slope = writes_slope(name, pred, reduction)
    loss, _ = _bits_loss(pred, with_slope, check, name, *target)
    return back(loss)


class _BitsLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        pred: torch.Tensor, with_slope: bool, check: bool, backend: str, *target: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, slope = _fwd(pred, *target, with_slope, check, backend)
        return loss, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pred, with_slope, _check, backend, *target = inputs
        slope = output[1]
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.slope = backend, None
        ctx.needs_inputs = not with_slope or keep_slope(ctx, slope, backend)
        if not ctx.needs_inputs:
            return
        tensors = [value if isinstance(value, torch.Tensor) else None for value in target]
        ctx.rest = [None if isinstance(value, torch.Tensor) else value for value in target]
        ctx.save_for_backward(pred, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
        nothing = (None,) * (3 + len(LossTarget._fields))
        if upstream is None:
            return (None, *nothing)
        if not ctx.needs_inputs:
            (slope,) = ctx.saved_tensors
            return (scaled(slope, upstream), *nothing)
        if (slope := hand_over(ctx, upstream, ctx.backend)) is not None:
            return (slope, *nothing)
        pred, *tensors = ctx.saved_tensors
        target = [
            rest if tensor is None else tensor
            for tensor, rest in zip(tensors, ctx.rest, strict=True)
        ]
        return (_bwd(pred, upstream, *target, ctx.backend), *nothing)


_bits_loss = differentiable(_BitsLoss)


def _fwd_fake(pred: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    target, with_slope = LossTarget(*args[:-3]), args[-3]
    shape = pixel_shape(pred.shape, target.dim) if target.reduction == "none" else ()
    loss = pred.new_empty(shape, dtype=work_dtype(pred.dtype))
    slope_shape = pred.shape if with_slope else (0,)
    return loss, pred.new_empty(slope_shape)


def _bwd_fake(pred: torch.Tensor, upstream: torch.Tensor, *args: Any) -> torch.Tensor:
    return pred.new_empty(pred.shape)


_TARGET = (
    "Tensor x, int[] n_bits, bool msb, int dim, int kind, float scale, float eps, Tensor? gamma, "
    "Tensor? noise, Tensor? seed_tensor, int seed, int offset, Tensor? weight, str reduction"
)
_fwd = register(
    _FAMILY,
    f"bits_loss_fwd(Tensor pred, {_TARGET}, bool with_slope, bool check, str backend) "
    "-> (Tensor, Tensor)",
    _fwd_fake,
)
_bwd = register(
    _FAMILY,
    f"bits_loss_bwd(Tensor pred, Tensor upstream, {_TARGET}, str backend) -> Tensor",
    _bwd_fake,
)
