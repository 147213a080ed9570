"""Panoptic maps: (class, instance) of each pixel as analog bits and back, and past frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate._arrays import as_tensors
from foveate._checks import integer
from foveate.ops.analog_bits.layout import ID_DTYPES, bit_widths, normalize_dim, require_known


def _pair_of_widths(n_bits: Sequence[int]) -> tuple[int, int]:
    widths = bit_widths(n_bits)
    if widths.single or len(widths.n_bits) != 2:
        raise ValueError(f"n_bits must be two ints, of class and instance, got {n_bits!r}")
    return widths.n_bits[0], widths.n_bits[1]


def panoptic_encode(
    panoptic: Any,
    *,
    n_bits: tuple[int, int] = (8, 8),
    scale: float = 0.1,
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The analog bits of class and instance, least significant bit first.

    Source: Pix2Seq-D (ICCV 2023), section 3.1.

    Args:
        panoptic: integer ids with (class, instance) at axis `dim`, e.g. `[b, h, w, 2]`.
        n_bits: bits of class and instance.
        scale: value of a set bit.
        dim: axis of the channels.
        dtype: dtype of the result.

    Returns:
        `[.., sum(n_bits), ..]` of `dtype`.

    Raises:
        TypeError, ValueError: as `foveate.bits_encode`; n_bits is not two ints.
    """
    return foveate.bits_encode(panoptic, _pair_of_widths(n_bits), scale=scale, dim=dim, dtype=dtype)


def panoptic_decode(
    bits: Any,
    *,
    n_classes: int,
    n_instances: int,
    n_bits: tuple[int, int] = (8, 8),
    dim: int = -1,
    dtype: torch.dtype = torch.int32,
) -> Any:
    """(class, instance) of each pixel, clamped to n_classes - 1 and n_instances - 1.

    Args:
        bits: `[.., sum(n_bits), ..]` floating, channels at `dim`.
        n_classes, n_instances: number of ids, at least 1.
        n_bits: bits of class and instance.
        dim: axis of the channels.
        dtype: integer dtype of the ids.

    Returns:
        `[.., 2, ..]` of `dtype`.

    Raises:
        TypeError, ValueError: as `foveate.bits_decode`; a number of ids below 1.
    """
    limits = (integer("n_classes", n_classes, 1) - 1, integer("n_instances", n_instances, 1) - 1)
    return foveate.bits_decode(
        bits, n_bits=_pair_of_widths(n_bits), max_value=limits, dim=dim, dtype=dtype
    )


def panoptic_merge(
    semantic: Any,
    instance: Any,
    *,
    n_instances: int,
    min_pixels: int = 40,
    n_classes: int = 300,
) -> tuple[Any, Any]:
    """One class for each instance: its most frequent one, the smallest of several.

    Each instance id, 0 too, takes that class; an instance below `min_pixels` takes class 0; where
    the class is 0 the instance is 0.

    Args:
        semantic: `[b, h, w]` or `[h, w]` integer classes.
        instance: integer instances of the same shape.
        n_instances: instances are in [0, n_instances).
        min_pixels: the fewest pixels of an instance that is kept.
        n_classes: classes are in [0, n_classes).

    Returns:
        (semantic, instance) of the dtypes and shape given.

    Raises:
        TypeError: a map holds no integers.
        ValueError: maps of different or other shapes, ids outside their range.
    """
    (semantic, instance), back = as_tensors(semantic=semantic, instance=instance)
    for name, ids in (("semantic", semantic), ("instance", instance)):
        if ids.dtype not in ID_DTYPES:
            raise TypeError(f"{name}: expected integer ids, got {ids.dtype}")
        if ids.ndim not in (2, 3):
            raise ValueError(f"{name} must be [b, h, w] or [h, w], got {tuple(ids.shape)}")
    if semantic.shape != instance.shape:
        raise ValueError(
            f"semantic and instance must have one shape, got {tuple(semantic.shape)} and "
            f"{tuple(instance.shape)}"
        )
    n_instances = integer("n_instances", n_instances, 1)
    n_classes = integer("n_classes", n_classes, 1)
    min_pixels = integer("min_pixels", min_pixels, 0)
    for ids, count in ((semantic, n_classes), (instance, n_instances)):
        if bool(((ids < 0) | (ids >= count)).any()):
            require_known(ids, count)
    samples = semantic.shape[0] if semantic.ndim == 3 else 1
    classes = semantic.reshape(samples, -1).long()  # [b, p]
    owners = instance.reshape(samples, -1).long()  # [b, p]
    first = torch.arange(samples, device=owners.device)[:, None] * n_instances
    votes = torch.bincount(
        ((owners + first) * n_classes + classes).flatten(),
        minlength=samples * n_instances * n_classes,
    ).view(samples, n_instances, n_classes)
    # Equal counts rank by class: an argmax alone may return any of them.
    rank = votes * n_classes + torch.arange(n_classes - 1, -1, -1, device=votes.device)
    winner = rank.argmax(-1)  # [b, n_instances]
    winner = torch.where(votes.sum(-1) < min_pixels, 0, winner)
    merged = winner.gather(1, owners)  # [b, p]
    kept = torch.where(merged == 0, 0, owners)
    return (
        back(merged.view(semantic.shape).to(semantic.dtype)),
        back(kept.view(instance.shape).to(instance.dtype)),
    )


def past_frames(
    history: Sequence[Tensor],
    shape: Sequence[int],
    *,
    offsets: Sequence[int] = (-2, -1),
    n_bits: int | Sequence[int] = (8, 8),
    scale: float = 0.1,
    dim: int = -1,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The analog bits of earlier maps of a video, as channels that condition the next.

    A frame before the first, or one that is dropped, is id 0: all -scale.
    Source: Pix2Seq-D (ICCV 2023), section 3.4.

    Args:
        history: decoded maps, oldest first: ids as in `foveate.bits_encode`, pixels `shape`.
        shape: pixel axes, `[b, h, w]`.
        offsets: which maps, counted back from the end: -1 is the latest.
        n_bits: bits of an id; a tuple gives the bits of each of K maps at `dim`.
        scale: value of a set bit.
        dim: axis of the channels.
        dtype: dtype of the result.
        dropout: probability with which each frame of each sample is dropped.
        generator: CPU generator of the dropout.
        device: of the result; None is that of the latest map, else the CPU.

    Returns:
        `[.., F N, ..]`: N channels for each of the F offsets, in their order.

    Raises:
        TypeError: a map holds no integers.
        ValueError: an offset at or above 0, a map of another shape, dropout outside [0, 1].
    """
    return encoded_past(
        history, shape, offsets, n_bits, scale, dim, dtype, dropout, generator, device, "lsb"
    )


def encoded_past(
    history: Sequence[Tensor],
    shape: Sequence[int],
    offsets: Sequence[int],
    n_bits: int | Sequence[int],
    scale: float,
    dim: int,
    dtype: torch.dtype,
    dropout: float,
    generator: torch.Generator | None,
    device: torch.device | str | None,
    bit_order: str,
) -> Tensor:
    """`past_frames` with a bit order."""
    pixels = tuple(integer("shape", size, 0) for size in shape)
    if not pixels:
        raise ValueError("shape must have an axis of samples, got ()")
    widths = bit_widths(n_bits)
    axis = normalize_dim(dim, len(pixels) + 1)
    back = [_offset(value) for value in offsets]
    if not back:
        raise ValueError("offsets must name at least one frame, got ()")
    dropout = float(dropout)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    maps = () if widths.single else (len(widths.n_bits),)
    expected = pixels if widths.single else (*pixels[:axis], *maps, *pixels[axis:])
    for frame in history:
        if tuple(frame.shape) != expected:
            raise ValueError(
                f"history must hold maps of shape {expected}, got {tuple(frame.shape)}"
            )
    if device is None:
        device = history[-1].device if len(history) else "cpu"
    size = (*pixels[:axis], len(back) * widths.channels, *pixels[axis:])
    result = torch.full(size, -float(scale), dtype=dtype, device=device)
    kept = None
    if dropout > 0.0:
        kept = torch.rand(len(back), pixels[0], generator=generator) >= dropout  # [F, b]
    for i, offset in enumerate(back):
        if -offset > len(history):
            continue
        ids = history[len(history) + offset].to(device)
        if kept is not None:
            keep = kept[i].to(device).view(-1, *(1,) * (len(pixels) - 1))
            keep = keep if widths.single else keep.unsqueeze(axis)
            ids = torch.where(keep, ids, torch.zeros_like(ids))
        part = result.narrow(axis, i * widths.channels, widths.channels)
        foveate.bits_encode(
            ids, n_bits, scale=scale, bit_order=bit_order, dim=axis, dtype=dtype, out=part
        )
    return result


def _offset(value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"offsets must be ints, got {type(value).__name__} {value!r}")
    if int(value) >= 0:
        raise ValueError(f"offsets must be below 0 (-1 is the latest frame), got {int(value)}")
    return int(value)
