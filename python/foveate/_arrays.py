"""NumPy and CuPy arrays at the edge of the public functions: tensors inside, the same kind back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch


def _kind(value: Any) -> str | None:
    if isinstance(value, torch.Tensor):
        return "torch"
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.ndarray):
        return "numpy"
    return "cupy" if type(value).__module__.partition(".")[0] == "cupy" else None


def _to_tensor(name: str, value: Any, kind: str) -> torch.Tensor:
    if kind == "cupy":
        return torch.utils.dlpack.from_dlpack(value)
    numpy = sys.modules["numpy"]
    if not value.flags.writeable or any(stride < 0 for stride in value.strides):
        value = numpy.array(value)  # torch has neither read-only tensors nor negative strides
    try:
        return torch.from_numpy(value)
    except TypeError as error:
        raise TypeError(f"{name} must have a dtype that torch has, got {value.dtype}") from error


def _to_array(value: Any, kind: str) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if kind == "numpy":
            return value.numpy()
        return sys.modules["cupy"].from_dlpack(value)
    if isinstance(value, tuple):
        items = [_to_array(item, kind) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_to_array(item, kind) for item in value]
    return value


def as_tensors(**arrays: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """The values of `arrays` as tensors, and the function that gives results back in their kind.

    Every value is a torch tensor, or every value is a NumPy array, or every value is a CuPy array;
    None, numbers and strings pass through. Arrays share their memory with the tensors, except
    read-only and negatively strided ones, which are copied.

    Raises:
        TypeError: a value is none of these, or the kinds are mixed.
    """
    values = list(arrays.values())
    for value in values:
        if value is not None and not isinstance(value, torch.Tensor):
            return _from_arrays(arrays)
    return values, _same


def _from_arrays(arrays: dict[str, Any]) -> tuple[list[Any], Callable[[Any], Any]]:
    kinds: dict[str, str] = {}
    for name, value in arrays.items():
        if value is None or isinstance(value, (bool, int, float, str)):
            continue
        kind = _kind(value)
        if kind is None:
            raise TypeError(
                f"{name} must be a torch.Tensor or a NumPy or CuPy array, "
                f"got {type(value).__name__}"
            )
        kinds[name] = kind
    if len(set(kinds.values())) > 1:
        listing = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise TypeError(f"tensors and arrays cannot be mixed: {listing}")
    if not kinds or "torch" in kinds.values():
        return list(arrays.values()), _same  # beside numbers
    kind = next(iter(kinds.values()))
    tensors = [
        _to_tensor(name, value, kind) if name in kinds else value for name, value in arrays.items()
    ]
    return tensors, lambda result: _to_array(result, kind)


def _same(result: Any) -> Any:
    return result
