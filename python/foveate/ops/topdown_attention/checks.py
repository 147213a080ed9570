"""The contract that the functions of this family share: kinds, dtypes, devices, masks, stacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import floating, same_device, same_dtype

FAMILY = "topdown_attention"


def autocast_dtype(x: Any) -> torch.dtype | None:
    """The dtype that autocast gives to a matrix product of `x` at this place, or None."""
    if not isinstance(x, torch.Tensor):
        return None
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in `dtype`, as autocast does: float64 and everything else stay."""
    if isinstance(value, torch.Tensor):
        eligible = value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if eligible else value
    if isinstance(value, (tuple, list)):
        return [cast(item, dtype) for item in value]
    return value


def require_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor or a NumPy or CuPy array, got {type(value).__name__}"
        )


def require_one_kind(**tensors: torch.Tensor | None) -> None:
    """TypeError or ValueError unless all are floating tensors of one dtype on one device."""
    for name, value in tensors.items():
        if value is not None:
            require_tensor(name, value)
    floating(**tensors)
    same_dtype(**tensors)
    same_device(**tensors)


def require_axes(name: str, tensor: torch.Tensor, layout: str, ndim: int) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must be {layout}, got {tuple(tensor.shape)}")


def require_mask(
    mask: Any, expected: tuple[int, int, int, int], is_causal: bool, device: torch.device
) -> None:
    """TypeError or ValueError unless `mask` is None or may be added to scores `expected`."""
    if mask is None:
        return
    require_tensor("attn_mask", mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool or floating, got {mask.dtype}")
    if is_causal:
        raise ValueError("attn_mask and is_causal=True cannot be given together")
    fits = mask.ndim <= 4 and all(
        size in (1, full)
        for size, full in zip(reversed(mask.shape), reversed(expected), strict=False)
    )
    if not fits:
        raise ValueError(
            f"attn_mask must be broadcastable to [b, h, queries, keys] = {expected}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != device:
        raise ValueError(f"attn_mask must be on {device}, got {mask.device}")


def mask_is_differentiated(mask: torch.Tensor | None) -> bool:
    return mask is not None and mask.requires_grad and torch.is_grad_enabled()


def scale_of(scale: Any, width: int) -> float:
    """The factor of the scores: `width^-0.5` unless a number is given."""
    if scale is None:
        return float(width) ** -0.5 if width else 1.0
    if isinstance(scale, (bool, str, torch.Tensor)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    try:
        return float(scale)
    except (TypeError, ValueError) as error:
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}") from error


def named_matrices(name: str, value: Any) -> dict[str, Any]:
    """The items of a stack `[L, ..]` or of a sequence of L, under "name[i]"."""
    if isinstance(value, (tuple, list)):
        items: Sequence[Any] = value
    elif hasattr(value, "ndim"):
        if value.ndim != 3:
            raise ValueError(
                f"{name} must be a stack [L, rows, columns] or a sequence of L matrices, "
                f"got shape {tuple(value.shape)}"
            )
        items = value.unbind(0) if isinstance(value, torch.Tensor) else list(value)
    else:
        raise TypeError(
            f"{name} must be a tensor [L, rows, columns] or a sequence of L matrices, "
            f"got {type(value).__name__}"
        )
    if len(items) == 0:
        raise ValueError(f"{name} must have at least one matrix, got none")
    return {f"{name}[{index}]": item for index, item in enumerate(items)}


def require_length(name: str, matrices: dict[str, Any], expected: int, of: str) -> None:
    if len(matrices) != expected:
        raise ValueError(f"{name} must have {expected} matrices, as {of}, got {len(matrices)}")


def tensors_and_stacks(
    tensors: dict[str, Any], stacks: dict[str, dict[str, Any]]
) -> tuple[list[Any], list[list[torch.Tensor]], Callable[[Any], Any]]:
    """Everything as tensors of one kind, dtype and device, and what gives results back."""
    flat = dict(tensors)
    for stack in stacks.values():
        flat.update(stack)
    values, back = as_tensors(**flat)
    named = dict(zip(flat, values, strict=True))
    require_one_kind(**named)
    return (
        [named[name] for name in tensors],
        [[named[name] for name in stack] for stack in stacks.values()],
        back,
    )
