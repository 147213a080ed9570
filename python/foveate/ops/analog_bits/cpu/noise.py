"""The noise stream and noisy bits: csrc/cpu/analog_bits_noise.cpp."""

from __future__ import annotations

import torch

from foveate._native import DTYPE_CODES, native
from foveate.ops.analog_bits.cpu.codec import int32_table, threads_for
from foveate.ops.analog_bits.layout import require_in_range, split_at
from foveate.ops.analog_bits.seeds import pixels_per_sample, seed_value

_cpu = native("_cpu")


def bits_noise(
    out: torch.Tensor, dim: int, seed_tensor: torch.Tensor | None, seed: int, offset: int
) -> None:
    outer, inner = split_at(out.shape, dim)
    target = out if out.is_contiguous() else torch.empty_like(out).contiguous()
    _cpu.bits_noise(
        outer,
        out.shape[dim],
        inner,
        seed_value(seed_tensor, seed),
        offset,
        DTYPE_CODES[out.dtype],
        threads_for(out.numel()),
        target.data_ptr(),
    )
    if target is not out:
        out.copy_(target)


def bits_q_sample(
    x: torch.Tensor,
    n_bits: list[int],
    high: float,
    low: float,
    msb: bool,
    dim: int,
    gamma: torch.Tensor,
    noise: torch.Tensor | None,
    seed_tensor: torch.Tensor | None,
    seed: int,
    offset: int,
    check: bool,
    *,
    out: torch.Tensor,
    noise_out: torch.Tensor | None,
) -> None:
    outer, inner = split_at(x.shape, dim)
    ids = x.reshape(outer, len(n_bits), inner)
    target = out if out.is_contiguous() else torch.empty_like(out).contiguous()
    gamma = gamma.contiguous()
    excess = _cpu.bits_q_sample(
        ids.data_ptr(),
        DTYPE_CODES[ids.dtype],
        *ids.stride(),
        int32_table(tuple(n_bits)).buffer_info()[0],
        len(n_bits),
        outer,
        inner,
        msb,
        high,
        low,
        gamma.data_ptr(),
        pixels_per_sample(gamma, out.shape, dim),
        0 if noise is None else noise.data_ptr(),
        seed_value(seed_tensor, seed),
        offset,
        DTYPE_CODES[out.dtype],
        threads_for(out.numel()),
        target.data_ptr(),
        0 if noise_out is None else noise_out.data_ptr(),
    )
    if check and excess:
        require_in_range(x, n_bits, dim)
    if target is not out:
        out.copy_(target)
