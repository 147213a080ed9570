"""The definition of analog bits in plain PyTorch. Ids carry their K maps at axis `dim`."""

from __future__ import annotations

import torch

from foveate.ops.analog_bits.layout import require_in_range


def _shifts(n_bits: int, msb: bool, trailing: int, device: torch.device) -> torch.Tensor:
    shift = torch.arange(n_bits, device=device)
    return (shift.flip(0) if msb else shift).view(-1, *[1] * trailing)


def bits_encode(
    x: torch.Tensor,
    n_bits: list[int],
    high: float,
    low: float,
    msb: bool,
    dim: int,
    dtype: torch.dtype,
    check: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """bit(p, c) = (x_k[p] >> j) & 1, written as high or low (Analog Bits, Alg. 1)."""
    if check:
        require_in_range(x, n_bits, dim)
    maps = x.long().unbind(dim)  # K x [*outer, *inner]
    bits = torch.cat(
        [
            (ids.unsqueeze(dim) >> _shifts(n, msb, x.ndim - 1 - dim, x.device)) & 1
            for ids, n in zip(maps, n_bits, strict=True)
        ],
        dim,
    )  # [*outer, N, *inner]
    result = torch.where(
        bits.bool(),
        torch.full((), high, dtype=dtype, device=x.device),
        torch.full((), low, dtype=dtype, device=x.device),
    ).contiguous()
    return result if out is None else out.copy_(result)


def bits_decode(
    bits: torch.Tensor,
    n_bits: list[int],
    max_value: list[int],
    msb: bool,
    dim: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The id whose bits are (value > 0), per map; ids above max_value[k] >= 0 become it."""
    maps = []
    for part, n, most in zip(bits.split(n_bits, dim), n_bits, max_value, strict=True):
        shift = _shifts(n, msb, bits.ndim - 1 - dim, bits.device)
        ids = ((part > 0).long() << shift).sum(dim)  # [*outer, *inner]
        maps.append(ids.clamp(max=most) if most >= 0 else ids)
    return torch.stack(maps, dim).to(dtype)  # [*outer, K, *inner]
