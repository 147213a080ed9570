"""topdown_attention on CPU tensors: csrc/cpu/topdown_attention.cpp."""

from __future__ import annotations

from typing import Any

import torch

from foveate._native import DTYPE_CODES, native

_cpu = native("_cpu")
_SERIAL = 1 << 15  # elements below which a second thread costs more than it brings


def unsupported(_op: str, dtype: torch.dtype, *_args: Any) -> str | None:
    if dtype == torch.float64:
        return "float64 tensors are computed by the reference"
    return None


def _threads(x: torch.Tensor) -> int:
    return 1 if x.numel() < _SERIAL else torch.get_num_threads()


def prompt_select_fwd(
    x: torch.Tensor, prompt: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    b, n, c = x.shape
    per_image = prompt.ndim == 2
    x, prompt = x.contiguous(), prompt.contiguous()
    z = x.new_empty(b, n, c)
    mask = x.new_empty(b, n, 1)
    unit = x.new_empty(b if per_image else 1, c + 1, dtype=torch.float64)
    cosine = x.new_empty(b, n, dtype=torch.float64)
    length = x.new_empty(b, n, dtype=torch.float64)
    _cpu.prompt_select_fwd(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        prompt.data_ptr(),
        per_image,
        b,
        n,
        c,
        eps,
        _threads(x),
        unit.data_ptr(),
        z.data_ptr(),
        mask.data_ptr(),
        cosine.data_ptr(),
        length.data_ptr(),
    )
    return z, mask, unit, cosine, length


def prompt_select_bwd(
    x: torch.Tensor,
    unit: torch.Tensor,
    cosine: torch.Tensor,
    length: torch.Tensor,
    eps: float,
    z_slope: torch.Tensor,
    mask_slope: torch.Tensor | None,
    per_image: bool,
    for_x: bool,
    for_prompt: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, n, c = x.shape
    x, z_slope = x.contiguous(), z_slope.contiguous()
    given = None if mask_slope is None else mask_slope.contiguous()
    x_slope = x.new_empty((b, n, c) if for_x else (0,))
    prompt_slope = x.new_empty(((b, c) if per_image else (c,)) if for_prompt else (0,))
    blocks = b * _cpu.prompt_select_blocks(n) if for_prompt else 0
    partial = x.new_empty(blocks, c + 1, dtype=torch.float64)
    _cpu.prompt_select_bwd(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        unit.data_ptr(),
        cosine.data_ptr(),
        length.data_ptr(),
        per_image,
        b,
        n,
        c,
        eps,
        z_slope.data_ptr(),
        0 if given is None else given.data_ptr(),
        _threads(x),
        partial.data_ptr() if for_prompt else 0,
        x_slope.data_ptr() if for_x else 0,
        prompt_slope.data_ptr() if for_prompt else 0,
    )
    return x_slope, prompt_slope
