"""The originals' function names and argument orders over foveate's ops, one module per original.

Each submodule loads on first use (`foveate.compat.cutler`).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any


def __getattr__(name: str) -> Any:
    path = f"{__name__}.{name}"
    if not name.startswith("_") and importlib.util.find_spec(path) is not None:
        return importlib.import_module(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
