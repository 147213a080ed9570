"""topdown_attention on CUDA tensors."""

from __future__ import annotations

from typing import Any

import torch

from foveate.ops.topdown_attention.triton.select import prompt_select_bwd, prompt_select_fwd

__all__ = ["prompt_select_bwd", "prompt_select_fwd", "unsupported"]


def unsupported(_op: str, dtype: torch.dtype, *_args: Any) -> str | None:
    if dtype == torch.float64:
        return "float64 tensors are computed by the reference"
    return None
