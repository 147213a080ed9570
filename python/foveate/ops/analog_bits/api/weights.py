"""Weights that give small instances as much say as large ones."""

from __future__ import annotations

from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import integer, one_of
from foveate._dispatch import register, select
from foveate.ops.analog_bits.layout import ID_DTYPES

_FAMILY = "analog_bits"


def instance_weights(
    ids: Any,
    n_ids: int,
    *,
    power: float = 1.0,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """Weights of pixels by the size of their instance, of mean 1 in each sample.

        c_k = pixels of id k,  u_k = (1 / (c_k + 1))^power,  w = u_id pixels / sum over pixels of u

    Source: Chen et al., Pix2Seq-D (ICCV 2023), section 3.2.

    Args:
        ids: `[b, *]` bool or integer, any strides.
        n_ids: ids are in [0, n_ids).
        power: 0 weighs all pixels alike, 1 all instances alike.
        check: whether ids are checked. None: on CPU yes, on CUDA no; unchecked ids outside weigh
            0^power.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        `[b, *]` float32.

    Raises:
        TypeError: ids are not integers.
        ValueError: fewer than two axes, an id outside, a negative power.
        NotImplementedError: the named backend cannot run this.
    """
    (ids,), back = as_tensors(ids=ids)
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"ids: expected integer ids, got {ids.dtype}")
    if ids.ndim < 2:
        raise ValueError(f"ids must be [b, *] with two or more axes, got {tuple(ids.shape)}")
    n_ids = integer("n_ids", n_ids, 1)
    power = float(power)
    if not power >= 0.0:
        raise ValueError(f"power must be at least 0, got {power}")
    one_of("check", check, (None, True, False))
    if check is None:
        check = ids.device.type == "cpu"
    name = select(_FAMILY, "instance_weights", backend, ids.device.type)
    return back(_instance_weights(ids, n_ids, power, check, name))


def _fake(ids: torch.Tensor, *args: Any) -> torch.Tensor:
    return ids.new_empty(ids.shape, dtype=torch.float32)


_instance_weights = register(
    _FAMILY,
    "instance_weights(Tensor ids, int n_ids, float power, bool check, str backend) -> Tensor",
    _fake,
)
