"""The wording of refusals that several families share: the contract first, then what came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def one_of(name: str, value: Any, choices: Iterable[Any]) -> None:
    """ValueError unless `value` is one of `choices`; 1 is not True."""
    choices = tuple(choices)
    for choice in choices:
        if value is choice or (type(value) is type(choice) and value == choice):
            return
    listing = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"{name} must be one of {listing}, got {value!r}")


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]; TypeError for bool and non-integers, else ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {bound}, got {number}")
    return number


def floating(**tensors: torch.Tensor | None) -> None:
    """TypeError unless every tensor has one of the four floating dtypes."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
            )


def same_dtype(**tensors: torch.Tensor | None) -> None:
    """TypeError unless all tensors have the dtype of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.dtype for tensor in given.values()}) > 1:
        listing = ", ".join(f"{name} is {tensor.dtype}" for name, tensor in given.items())
        raise TypeError(f"the tensors must have one dtype: {listing}")


def same_device(**tensors: torch.Tensor | None) -> None:
    """ValueError unless all tensors are on the device of the first."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in given.values()}) > 1:
        listing = ", ".join(f"{name} is on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"the tensors must be on one device: {listing}")


def shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...], layout: str) -> None:
    """ValueError unless `tensor` has the `expected` shape, described by `layout`."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must be {layout} = {expected}, got {tuple(tensor.shape)}")
