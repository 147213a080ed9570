"""The optional packages of the extra `foveate[methods]`, imported where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

_PACKAGES = {"PIL": "pillow"}  # where the package to install has another name than the module


class MissingPackageError(ImportError):
    """An optional package is not installed; the message names it and its extra."""


def optional(module: str) -> Any:
    """The imported `module`.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        package = _PACKAGES.get(top, top)
        raise MissingPackageError(
            f"{package} is needed here and cannot be imported ({error}): "
            "pip install 'foveate[methods]'"
        ) from error
