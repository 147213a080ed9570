"""What keys the noise stream: checks of seed, offset and generator, and of gamma."""

from __future__ import annotations

import math
from typing import Any

import torch

from foveate._checks import integer


def noise_key(
    seed: int | torch.Tensor | None,
    offset: int,
    generator: torch.Generator | None,
    device: torch.device,
) -> tuple[torch.Tensor | None, int, int]:
    """(seed tensor or None, seed as an int where there is no tensor, offset).

    Without `seed` one is drawn: from `generator`, which lives on the CPU, or from torch's default
    generator of `device`.
    """
    offset = integer("offset", offset, 0, 2**32 - 1)
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other, got both")
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed must be an int or a one-element int64 tensor on {device}, "
                f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            )
        return seed.reshape(1), 0, offset
    if seed is not None:
        return None, integer("seed", seed, 0, 2**63 - 1), offset
    if generator is not None:
        if generator.device.type != "cpu":
            raise ValueError(f"generator must be a CPU generator, got one on {generator.device}")
        drawn = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, generator=generator)
        return (drawn, 0, offset) if device.type == "cpu" else (None, int(drawn), offset)
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device), 0, offset


def seed_value(seed_tensor: torch.Tensor | None, seed: int) -> int:
    """The seed on the host; a tensor must be on the CPU."""
    return seed if seed_tensor is None else int(seed_tensor)


def per_sample(name: str, gamma: Any, shape: torch.Size, dim: int, check: bool) -> torch.Tensor:
    """gamma as float64, `[b]` for the b samples of `shape`'s axis 0, or `[1]` for all of them."""
    if not isinstance(gamma, torch.Tensor):
        value = float(gamma)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
        return torch.full((1,), value, dtype=torch.float64)
    if gamma.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float or float32 or float64, got {gamma.dtype}")
    if gamma.requires_grad:
        raise ValueError(f"{name} gets no gradient, but requires grad; pass {name}.detach()")
    if dim == 0:
        raise ValueError(f"{name} per sample needs a batch at axis 0, but dim=0 holds the bits")
    if gamma.ndim != 1 or gamma.shape[0] != shape[0]:
        raise ValueError(
            f"{name} must be a float or [b] = ({shape[0]},), got shape {tuple(gamma.shape)}"
        )
    if check and not torch.compiler.is_compiling():
        require_unit_interval(name, gamma)
    return gamma.double()


def require_unit_interval(name: str, gamma: torch.Tensor) -> None:
    """ValueError naming the first value outside [0, 1], or NaN."""
    wrong = ~((gamma >= 0) & (gamma <= 1))
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{name} must be in [0, 1], got {float(gamma[at])} at sample {at}")


def pixels_per_sample(gamma: torch.Tensor, shape: torch.Size, dim: int) -> int:
    """Pixels that share an entry of `gamma` ([b] or [1]) in bits of `shape`."""
    pixels = math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
    return max(pixels // gamma.shape[0] if gamma.shape[0] else 0, 1)
