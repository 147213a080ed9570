"""The noise stream, and noisy bits without the bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import FLOATING, one_of, same_device
from foveate._dispatch import register, select
from foveate.ops.analog_bits.layout import (
    bit_widths,
    ids_with_map_axis,
    is_msb,
    normalize_dim,
)
from foveate.ops.analog_bits.seeds import noise_key, per_sample

_FAMILY = "analog_bits"


def require_floating_dtype(dtype: torch.dtype) -> None:
    """TypeError unless results can be of `dtype`."""
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")


def _output(
    out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """`out` after its checks, or a fresh tensor."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {shape}, got {tuple(out.shape)}")
    if out.dtype != dtype:
        raise TypeError(f"out must have dtype {dtype}, got {out.dtype}")
    if out.device != device:
        raise ValueError(f"out must be on {device}, got {out.device}")
    return out


def bits_noise(
    shape: Sequence[int],
    seed: int | torch.Tensor,
    *,
    offset: int = 0,
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Standard normal noise that depends on (seed, offset, pixel, channel) alone.

    Philox4x32-10 (Salmon et al., SC 2011) with key (seed low, seed high) and counter (pixel low,
    pixel high, channel div 4, offset); its words give four normals by Box-Muller in one fixed
    float32 sequence. Equal on every backend, layout, dtype (up to its rounding) and thread count.

    Args:
        shape: shape of the result; pixels are all axes but `dim`, in row-major order.
        seed: int in [0, 2^63), or a one-element int64 tensor on the device.
        offset: int in [0, 2^32); one for each draw under a seed.
        dim: axis of the channels.
        dtype: float32, float64, bfloat16 or float16.
        device: of the result; None is the device of `out` or of a seed tensor, else the CPU.
        out: tensor of `shape` and `dtype` to write to.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        `shape` of `dtype`, or `out`.

    Raises:
        ValueError: seed, offset or shape outside its range.
        TypeError: `dtype` is not floating.
        NotImplementedError: the named backend cannot run this.
    """
    require_floating_dtype(dtype)
    sizes = tuple(int(size) for size in shape)
    if not sizes:
        raise ValueError("shape must have an axis of channels, got ()")
    dim = normalize_dim(dim, len(sizes))
    if device is None:
        given = out if out is not None else seed
        device = given.device if isinstance(given, torch.Tensor) else "cpu"
    out = _output(out, sizes, dtype, torch.device(device))
    if not isinstance(seed, torch.Tensor):
        seed = int(seed) if hasattr(seed, "__index__") and not isinstance(seed, bool) else seed
    key = noise_key(seed, offset, None, out.device)
    name = select(_FAMILY, "bits_noise", backend, out.device.type, sizes[dim])
    _noise_out(out, dim, *key, name)
    return out


def bits_q_sample(
    x: Any,
    n_bits: int | Sequence[int],
    gamma: Any,
    *,
    scale: float = 1.0,
    noise: Any = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    return_noise: bool = False,
    bit_order: str = "lsb",
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
    out: Any = None,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """The bits of ids at noise level gamma: sqrt(gamma) s + sqrt(1 - gamma) e, s = +-scale.

    Neither the bits nor (with a seed) the noise exists in memory.
    Source: Ho et al., DDPM (2020), eq. 4; Chen et al., "Analog Bits" (ICLR 2023), Algorithm 1.

    Args:
        x: ids as in `bits_encode`; not differentiable.
        n_bits: bits of an id, 1..63; a tuple gives the bits of each of K maps at `dim`.
        gamma: float, or `[b]` float32 or float64, one for each sample of axis 0; in [0, 1]. Its
            roots are taken in float64 and rounded once.
        scale: value of a set bit; a clear one is -scale.
        noise: e, floating, of the result's shape.
        seed, offset: e is the stream of `bits_noise`; seed an int or a one-element int64 tensor.
        generator: CPU generator from which a seed is drawn (eager mode); without noise, seed and
            generator one is drawn from torch's default generator.
        return_noise: also return e, as it was added: float32, for a float64 result float64.
        bit_order: "lsb" or "msb", the bit that comes first.
        dim: axis of the channels in the result.
        dtype: dtype of the result: float32, float64, bfloat16 or float16.
        out: tensor of the result's shape and dtype to write to.
        check: whether ids and gamma are checked. None: on CPU yes, on CUDA no.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        `[.., N, ..]` of `dtype`, or (result, noise).

    Raises:
        TypeError: ids are not integers, noise or dtype not floating.
        ValueError: gamma outside [0, 1], noise of another shape, two sources of noise, an id out of
            range.
        NotImplementedError: the named backend cannot run this.
    """
    (x, gamma, noise, out), back = as_tensors(x=x, gamma=gamma, noise=noise, out=out)
    widths = bit_widths(n_bits)
    msb = is_msb(bit_order)
    ids, dim = ids_with_map_axis(x, widths, dim)
    require_floating_dtype(dtype)
    one_of("check", check, (None, True, False))
    shape = (*ids.shape[:dim], widths.channels, *ids.shape[dim + 1 :])
    if check is None:
        check = x.device.type == "cpu"
    levels = per_sample("gamma", gamma, torch.Size(shape), dim, check).to(x.device)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    key: tuple[torch.Tensor | None, int, int] = (None, 0, 0)
    if noise is None:
        key = noise_key(seed, offset, generator, x.device)
    else:
        if seed is not None or generator is not None:
            raise ValueError("noise, seed and generator exclude each other, got noise and another")
        noise = given_noise(noise, shape, work)
        same_device(x=x, noise=noise)
    out = _output(out, shape, dtype, x.device)
    added = torch.empty(shape, dtype=work, device=x.device) if return_noise else None
    name = select(_FAMILY, "bits_q_sample", backend, x.device.type, widths.channels)
    high = float(scale)
    _q_sample_out(
        ids, widths.n_bits, high, -high, msb, dim, levels, noise, *key, check, name,
        out=out, noise_out=added,
    )  # fmt: skip
    return back((out, added)) if return_noise else back(out)


def given_noise(noise: torch.Tensor, shape: tuple[int, ...], work: torch.dtype) -> torch.Tensor:
    """The caller's noise after its checks, contiguous, in the dtype of the arithmetic."""
    if noise.dtype not in FLOATING:
        raise TypeError(f"noise must be floating, got {noise.dtype}")
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise must have shape {shape}, got {tuple(noise.shape)}")
    return noise.detach().to(work).contiguous()


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_noise_out = register(
    _FAMILY,
    "bits_noise_out(Tensor(a!) out, int dim, Tensor? seed_tensor, int seed, int offset, "
    "str backend) -> ()",
    _nothing,
)
_q_sample_out = register(
    _FAMILY,
    "bits_q_sample_out(Tensor x, int[] n_bits, float high, float low, bool msb, int dim, "
    "Tensor gamma, Tensor? noise, Tensor? seed_tensor, int seed, int offset, bool check, "
    "str backend, *, Tensor(a!) out, Tensor(b!)? noise_out) -> ()",
    _nothing,
)
