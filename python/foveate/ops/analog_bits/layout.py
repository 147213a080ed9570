"""Where the bits of an id lie: the checks of `n_bits`, `bit_order` and `dim` that all ops share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from foveate._checks import one_of

ID_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class BitWidths(NamedTuple):
    """Bits of each map; `single` if one integer was given, whose ids have no map axis."""

    n_bits: tuple[int, ...]
    single: bool

    @property
    def channels(self) -> int:
        return sum(self.n_bits)


def bit_widths(n_bits: int | Sequence[int]) -> BitWidths:
    """The widths that `n_bits` states: one int in 1..63, or a tuple of them, one per map."""
    if type(n_bits) is int and 1 <= n_bits <= 63:
        return BitWidths((n_bits,), True)
    single = not isinstance(n_bits, (tuple, list))
    widths: tuple[Any, ...] = (n_bits,) if single else tuple(n_bits)  # type: ignore[arg-type]
    if not widths:
        raise ValueError("n_bits must name at least one map, got ()")
    for width in widths:
        if isinstance(width, bool) or not hasattr(width, "__index__"):
            raise TypeError(
                f"n_bits must be an int or a tuple of ints, got {type(width).__name__} {width!r}"
            )
        if not 1 <= int(width) <= 63:
            raise ValueError(f"n_bits must be in 1..63, got {int(width)}")
    return BitWidths(tuple(int(width) for width in widths), single)


def is_msb(bit_order: str) -> bool:
    """True for "msb", False for "lsb", else a ValueError."""
    one_of("bit_order", bit_order, ("lsb", "msb"))
    return bit_order == "msb"


def normalize_dim(dim: int, ndim: int) -> int:
    """`dim` counted from the front of a bits tensor of `ndim` axes."""
    if isinstance(dim, bool) or not hasattr(dim, "__index__"):
        raise TypeError(f"dim must be an int, got {type(dim).__name__} {dim!r}")
    if not -ndim <= dim < ndim:
        raise ValueError(
            f"dim must be in {-ndim}..{ndim - 1} for bits of {ndim} axes, got {int(dim)}"
        )
    return int(dim) % ndim


def ids_with_map_axis(x: torch.Tensor, widths: BitWidths, dim: int) -> tuple[torch.Tensor, int]:
    """Ids with their K maps at axis `dim` (inserted for a single map), and `dim` from the front."""
    if x.dtype not in ID_DTYPES:
        raise TypeError(f"x: expected integer ids, got {x.dtype}")
    if x.dtype == torch.bool and any(width != 1 for width in widths.n_bits):
        raise TypeError(f"x: bool ids need n_bits=1, got n_bits={widths.n_bits}")
    if widths.single:
        dim = normalize_dim(dim, x.ndim + 1)
        return x.unsqueeze(dim), dim
    if x.ndim == 0:
        raise ValueError(f"x needs an axis of {len(widths.n_bits)} maps at dim, got a scalar")
    dim = normalize_dim(dim, x.ndim)
    if x.shape[dim] != len(widths.n_bits):
        raise ValueError(
            f"n_bits has {len(widths.n_bits)} maps, but x has {x.shape[dim]} at dim {dim} "
            f"of shape {tuple(x.shape)}"
        )
    return x, dim


def split_at(shape: Sequence[int], dim: int) -> tuple[int, int]:
    """Positions before and after axis `dim`: the outer and inner of [outer, channels, inner]."""
    return math.prod(shape[:dim]), math.prod(shape[dim + 1 :])


def require_in_range(x: torch.Tensor, n_bits: Sequence[int], dim: int) -> None:
    """ValueError naming the extremes of the first map with an id outside [0, 2^n_bits)."""
    for ids, width in zip(x.unbind(dim), n_bits, strict=True):
        if ids.numel() == 0 or ids.dtype == torch.bool:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= 1 << width:
            raise ValueError(
                f"ids must be in [0, {1 << width}), got min {low}, max {high}; "
                "map ignore labels first"
            )


def require_known(ids: torch.Tensor, n_ids: int) -> None:
    """ValueError naming the extremes of ids outside [0, n_ids)."""
    low, high = int(ids.min()), int(ids.max())
    raise ValueError(f"ids must be in [0, {n_ids}), got min {low}, max {high}")


# csrc/cpu/analog_bits_loss.cpp, enum Kind.
LOSS_KINDS = {"x": 0, "eps": 1, "v": 2, "sigmoid": 3}
REDUCTIONS = ("mean", "sum", "none")


class LossTarget(NamedTuple):
    """What a loss compares the prediction with; the order is that of the raw ops' arguments."""

    x: torch.Tensor  # ids with K maps at dim
    n_bits: list[int]
    msb: bool
    dim: int
    kind: int
    scale: float
    eps: float
    gamma: torch.Tensor | None  # [b] or [1] float64
    noise: torch.Tensor | None  # like pred, in the dtype of the arithmetic
    seed_tensor: torch.Tensor | None
    seed: int
    offset: int
    weight: torch.Tensor | None  # [*pixel] or [b], in the dtype of the arithmetic
    reduction: str


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic on predictions of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pixel_shape(shape: Sequence[int], dim: int) -> tuple[int, ...]:
    """`shape` without its channels."""
    return (*shape[:dim], *shape[dim + 1 :])


def pixel_weight(
    weight: torch.Tensor | None, pixels: tuple[int, ...], work: torch.dtype
) -> torch.Tensor | None:
    """The caller's weight after its checks: `[*pixel]` or `[b]`, contiguous, of dtype `work`."""
    if weight is None:
        return None
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError("weight gets no gradient, but requires grad; pass weight.detach()")
    shape = tuple(weight.shape)
    if shape != pixels and not (pixels and shape == pixels[:1]):
        raise ValueError(f"weight must be [*pixel] = {pixels} or [b] = {pixels[:1]}, got {shape}")
    return weight.to(work).contiguous()


def pixels_per_weight(weight: torch.Tensor, pixels: int) -> int:
    """Pixels that share an entry of `weight`."""
    return max(pixels // weight.numel(), 1) if weight.numel() else 1


def mean_divisor(reduction: str, pixels: int, terms: int) -> float:
    """What a loss of `pixels` pixels of `terms` terms is divided by; nan for a mean of none."""
    if reduction == "sum":
        return 1.0
    if reduction == "none":
        return float(terms)
    return float(pixels * terms) if pixels * terms else math.nan
