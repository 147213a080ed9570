"""A gradient that the forward pass wrote waits for its factor."""

from __future__ import annotations

from typing import Any

import torch

from foveate._dispatch import register

_FAMILY = "analog_bits"


def writes_slope(name: str, prediction: torch.Tensor, reduction: str) -> bool:
    """Whether the forward pass of backend `name` should write the gradient too.

    It has the prediction at hand. float16 waits for the incoming factor, which may lift the
    gradient out of underflow; a factor per pixel cannot be applied to it later.
    """
    return (
        name in ("cpu", "triton")
        and prediction.requires_grad
        and torch.is_grad_enabled()
        and reduction != "none"
        and prediction.dtype != torch.float16
    )


def keep_slope(ctx: Any, slope: torch.Tensor, backend: str) -> bool:
    """Keep the gradient for the backward pass; whether the inputs are needed there as well.

    On a GPU the first backward pass scales the buffer in place and hands it over, since reading the
    factor would synchronise; a second pass computes the gradient again. Elsewhere, and where a
    transform looks on, the buffer stays as it is.
    """
    if backend == "triton" and not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        ctx.slope = slope
        return True
    ctx.save_for_backward(slope)
    return False


def hand_over(ctx: Any, upstream: torch.Tensor, backend: str) -> torch.Tensor | None:
    """The kept gradient times `upstream` `[]`; None where it was handed over before."""
    if ctx.slope is None:
        return None
    slope: torch.Tensor = ctx.slope
    if torch._C._are_functorch_transforms_active():  # a batch of factors
        return (slope * upstream).to(slope.dtype)
    ctx.slope = None
    _scale_slope(slope, upstream.reshape(1), backend)
    return slope


def scaled(slope: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """The saved gradient times `upstream` `[]`, out of place: a second pass must find the same."""
    # Factor 1 is the usual case.
    unscaled = (
        not torch.compiler.is_compiling()
        and slope.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
        and float(upstream) == 1.0
    )
    return slope if unscaled else (slope * upstream).to(slope.dtype)


def _nothing(*args: Any) -> None:
    return None


_scale_slope = register(
    _FAMILY, "bits_scale_slope(Tensor(a!) slope, Tensor upstream, str backend) -> ()", _nothing
)
