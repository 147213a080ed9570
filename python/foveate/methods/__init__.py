"""Whole methods assembled from the ops: from files and models to results on disk.

Each submodule loads on first use (`foveate.methods.maskcut`); the optional packages they need are
the extra `foveate[methods]`.
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
