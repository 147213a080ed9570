"""The compiled modules, and how torch's values cross to them."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# csrc/cpu/dtypes.h, enum DType.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.bool: 4,
    torch.uint8: 5,
    torch.int8: 6,
    torch.int16: 7,
    torch.int32: 8,
    torch.int64: 9,
}


@functools.cache
def load_native(name: str) -> ModuleType | str:
    """The compiled module `foveate.<name>` ("_cpu", "_cuda"), or why it cannot be loaded."""
    try:
        return importlib.import_module(f"foveate.{name}")
    except ImportError as error:
        if error.name == f"foveate.{name}":
            needs = "a C++20 compiler" if name == "_cpu" else "nvcc and FOVEATE_CUDA=ON"
            return f"foveate.{name} was not built; reinstall foveate with {needs}"
        return f"foveate.{name} does not load: {error}"


def native(name: str) -> ModuleType:
    """The compiled module, whose presence `load_native` has confirmed."""
    module = load_native(name)
    if isinstance(module, str):
        raise ImportError(module)
    return module


def can_run_cuda() -> str | None:
    """Why the CUDA C++ module cannot run here: not built, or no device; None when it can."""
    module = load_native("_cuda")
    if isinstance(module, str):
        return module
    reason: str | None = module.missing_device()
    if reason is not None:
        return reason
    return None if torch.cuda.is_available() else "torch sees no CUDA device"
