"""Pix2Seq-D's bit functions under the names and argument orders of its repository (ICCV 2023).

Torch tensors stand for TensorFlow's; maps are channels last, the least significant bit first.
The training and sampling loops have their counterpart in `foveate.methods.bit_diffusion`.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

import foveate
from foveate._checks import FLOATING, integer
from foveate.methods.bit_diffusion import schedules
from foveate.methods.bit_diffusion.panoptic import panoptic_decode, panoptic_merge


def int2bits(x: Tensor, n: int, out_dtype: torch.dtype | None = None) -> Tensor:
    """The `n` bits of integers x `[*]` as `[*, n]` of 0 and 1, the least significant first.

    Args:
        out_dtype: dtype of the bits; None is that of x.

    Raises:
        TypeError: x holds no integers.
        ValueError: an id outside [0, 2^n), n outside 1..63.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    dtype = out_dtype if out_dtype in FLOATING else torch.float32
    bits: Tensor = foveate.bits_encode(x, n, scale=1.0, low=0.0, dtype=dtype)
    return bits.to(out_dtype)


def bits2int(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The integers that bits x `[*, n]` of 0 and 1 spell, `[*]` of `out_dtype`.

    x is cast to `out_dtype` and summed with the weights 2^j.
    """
    weights = 2 ** torch.arange(x.shape[-1], device=x.device)
    return (x.to(out_dtype) * weights.to(out_dtype)).sum(-1, dtype=out_dtype)


def integer_map_to_bits(
    integer_map: Tensor, n_bits_label: int, b_scale: float, num_channels: int = 2
) -> Tensor:
    """Analog bits +-b_scale of the first `num_channels` of the last axis, float32.

    Args:
        integer_map: `[b, h, w, >= num_channels]` integers.
        n_bits_label: bits of all channels together.

    Returns:
        `[b, h, w, n_bits_label]`.

    Raises:
        TypeError: integer_map holds no integers.
        ValueError: num_channels does not divide n_bits_label; an id outside its range.
    """
    widths = (_channel_bits(n_bits_label, num_channels),) * num_channels
    bits: Tensor = foveate.bits_encode(integer_map[..., :num_channels], widths, scale=b_scale)
    return bits


def bits_to_panoptic_map(
    bits: Tensor, n_bits_label: int, num_classes: int, max_instances_per_image: int
) -> Tensor:
    """(class, instance) int32 `[b, h, w, 2]` of bits `[b, h, w, n_bits_label]`.

    Classes are clamped to num_classes - 1, instances to max_instances_per_image - 1.

    Raises:
        TypeError: bits are not floating.
        ValueError: n_bits_label is odd or not the last axis of bits.
    """
    n = _channel_bits(n_bits_label, 2)
    ids: Tensor = panoptic_decode(
        bits, n_classes=num_classes, n_instances=max_instances_per_image, n_bits=(n, n)
    )
    return ids


def _channel_bits(n_bits_label: int, num_channels: int) -> int:
    n_bits_label = integer("n_bits_label", n_bits_label, 1)
    num_channels = integer("num_channels", num_channels, 1)
    if n_bits_label % num_channels:
        raise ValueError(
            f"num_channels={num_channels} must divide n_bits_label, got {n_bits_label}"
        )
    return n_bits_label // num_channels


def get_normalized_weight(id_map: Tensor, total_num_ids: int, p: float = 1.0) -> Tensor:
    """Weights of pixels by the size of their instance, of mean 1 in each sample; float32.

    `foveate.instance_weights` without a check of the ids.
    """
    weights: Tensor = foveate.instance_weights(id_map, total_num_ids, power=p, check=False)
    return weights


def majority_vote_postprocess(
    semantic_map: NDArray[Any],
    identity_map: NDArray[Any],
    min_pixels: int,
    max_instances_per_image: int,
    max_classes: int = 300,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """(semantic, identity) with one class for each instance; NumPy in, NumPy out.

    See `foveate.methods.bit_diffusion.panoptic_merge`.
    """
    return panoptic_merge(
        semantic_map,
        identity_map,
        n_instances=max_instances_per_image,
        min_pixels=min_pixels,
        n_classes=max_classes,
    )


def _times(t: Any) -> Tensor:
    """Times as a tensor: a floating one in its dtype, all else in float32."""
    times = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float32)
    return times if times.is_floating_point() else times.float()


def cosine_schedule_simple(t: Any, ns: float = 0.0002, ds: float = 0.00025) -> Tensor:
    """cos^2(((t + ns) / (1 + ds)) pi / 2)."""
    return schedules.cosine_simple(_times(t), ns, ds)


def cosine_schedule(
    t: Any, start: float = 0.0, end: float = 0.5, tau: float = 1.0, clip_min: float = 1e-9
) -> Tensor:
    """The power 2 tau of a cosine between two of its points, rescaled and clipped."""
    return schedules.cosine(_times(t), start, end, tau, clip_min)


def sigmoid_schedule(
    t: Any, start: float = -3.0, end: float = 3.0, tau: float = 1.0, clip_min: float = 1e-9
) -> Tensor:
    """A sigmoid between two of its points, rescaled and clipped."""
    return schedules.sigmoid(_times(t), start, end, tau, clip_min)


def log_schedule(t: Any, start: float = 1.0, end: float = 100.0, reverse: bool = False) -> Tensor:
    """A logarithm between two points, rescaled to [0, 1]; the points swapped if reverse."""
    return schedules.logarithmic(_times(t), start, end, reverse)


def simple_linear_schedule(t: Any, clip_min: float = 1e-9) -> Tensor:
    """1 - t, clipped."""
    return schedules.linear(_times(t), clip_min)
