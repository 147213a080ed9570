"""open_clip's contrastive losses under their names, and a context in which they are ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from foveate.nn import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss", "patched"]

_OURS = {"ClipLoss": ClipLoss, "SigLipLoss": SigLipLoss}


@contextmanager
def patched() -> Iterator[None]:
    """Inside, `SigLipLoss` and `ClipLoss` of every imported open_clip module are foveate's.

    Attributes that are the original classes are replaced and return on exit, also after an
    exception. Subclasses that exist already (CoCa, distillation) keep their base.

    Raises:
        ImportError: open_clip cannot be imported.
    """
    try:
        loss = importlib.import_module("open_clip.loss")
    except ImportError as error:
        raise ImportError(
            f"patched() needs open_clip (pip install open_clip_torch): {error}"
        ) from error
    originals = {name: getattr(loss, name) for name in _OURS}
    replaced = []
    for name, module in list(sys.modules.items()):
        if name == "open_clip" or name.startswith("open_clip."):
            for attribute, original in originals.items():
                if vars(module).get(attribute) is original:
                    replaced.append((module, attribute, original))
    try:
        for module, attribute, _ in replaced:
            setattr(module, attribute, _OURS[attribute])
        yield
    finally:
        for module, attribute, original in replaced:
            setattr(module, attribute, original)
