"""Sampler steps and weights of instances: csrc/cpu/analog_bits_step.cpp, _weights.cpp."""

from __future__ import annotations

import math

import torch

from foveate._native import DTYPE_CODES, native
from foveate.ops.analog_bits.cpu.codec import threads_for
from foveate.ops.analog_bits.cpu.noise import bits_noise
from foveate.ops.analog_bits.layout import require_known
from foveate.ops.analog_bits.steps import Step

_cpu = native("_cpu")


def _by_sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor if each sample of axis 0 lies contiguous in it, as halves of a buffer do."""
    if tensor.is_contiguous() or (len(tensor) > 0 and tensor[0].is_contiguous()):
        return tensor
    return None


def bits_step(
    x_t: torch.Tensor,
    pred: torch.Tensor,
    uncond: torch.Tensor | None,
    noise: torch.Tensor | None,
    sigma: torch.Tensor | None,
    coefficients: torch.Tensor,
    *step: object,
    out: torch.Tensor,
    x0_out: torch.Tensor | None,
) -> None:
    s = Step(*step)  # type: ignore[arg-type]
    if s.draws:
        noise = torch.empty_like(x_t, memory_format=torch.contiguous_format)
        bits_noise(noise, s.dim, s.seed_tensor, s.seed, s.offset)
    source = _by_sample(x_t)
    source = x_t.contiguous() if source is None else source
    target = _by_sample(out)
    target = torch.empty_like(source).contiguous() if target is None else target
    start = x0_out if x0_out is None else _by_sample(x0_out)
    if x0_out is not None and start is None:
        start = torch.empty_like(source).contiguous()
    given = pred.contiguous()
    other = None if uncond is None else uncond.to(pred.dtype).contiguous()
    noise = None if noise is None else noise.contiguous()
    sigma = None if sigma is None else sigma.contiguous()
    coefficients = coefficients.contiguous()
    _cpu.bits_step(
        source.data_ptr(),
        DTYPE_CODES[x_t.dtype],
        source.stride(0),
        given.data_ptr(),
        DTYPE_CODES[pred.dtype],
        0 if other is None else other.data_ptr(),
        0 if noise is None else noise.data_ptr(),
        0 if sigma is None else sigma.data_ptr(),
        len(x_t),
        math.prod(x_t.shape[1:]),
        coefficients.data_ptr(),
        len(coefficients) > 1,
        s.kind,
        s.guidance,
        s.clip,
        s.scale,
        threads_for(x_t.numel()),
        target.stride(0),
        0 if start is None else start.stride(0),
        target.data_ptr(),
        0 if start is None else start.data_ptr(),
    )
    if target is not out:
        out.copy_(target)
    if x0_out is not None and start is not None and start is not x0_out:
        x0_out.copy_(start)


def instance_weights(ids: torch.Tensor, n_ids: int, power: float, check: bool) -> torch.Tensor:
    samples, pixels = len(ids), math.prod(ids.shape[1:])
    flat = ids.reshape(samples, pixels)
    out = ids.new_empty(ids.shape, dtype=torch.float32)
    work = ids.new_empty((samples, 5 * (n_ids + 1)), dtype=torch.int32)
    outside = _cpu.instance_weights(
        flat.data_ptr(),
        DTYPE_CODES[ids.dtype],
        *flat.stride(),
        samples,
        pixels,
        n_ids,
        power,
        threads_for(ids.numel()),
        work.data_ptr(),
        out.data_ptr(),
    )
    if check and outside:
        require_known(ids, n_ids)
    return out
