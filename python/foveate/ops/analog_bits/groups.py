"""Groups of bits and their logits: the checks that the softmax ops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from foveate._checks import integer
from foveate.ops.analog_bits.layout import BitWidths

MOST_BITS = 16  # of a group: 65536 logits


class SoftmaxTarget(NamedTuple):
    """What a cross entropy compares logits with; the order is that of the raw ops' arguments."""

    x: torch.Tensor  # ids with K maps at dim
    n_bits: list[int]
    msb: bool
    dim: int
    groups: int
    weight: torch.Tensor | None  # [*pixel] or [b], in the dtype of the arithmetic
    reduction: str

    @property
    def bits(self) -> int:
        """Bits of a group."""
        return sum(self.n_bits) // self.groups


def group_count(widths: BitWidths, groups: int | None) -> int:
    """G, of N / G bits each: `groups`, or one group per map."""
    if groups is None:
        if len(set(widths.n_bits)) > 1:
            raise ValueError(
                f"groups must be given for maps of unequal n_bits={widths.n_bits}, "
                f"N={widths.channels}"
            )
        groups = len(widths.n_bits)
    groups = integer("groups", groups, 1)
    if widths.channels % groups:
        raise ValueError(f"groups={groups} must divide N={widths.channels} bits")
    if widths.channels // groups > MOST_BITS:
        raise ValueError(
            f"a group must have at most {MOST_BITS} bits, got N={widths.channels} bits in "
            f"groups={groups}"
        )
    return groups


def one_axis(
    logits: torch.Tensor, pixels: Sequence[int], dim: int, groups: int, bits: int
) -> torch.Tensor:
    """Logits with one axis of `groups * 2**bits` at `dim`; two axes (G, 2^m) there are joined."""
    before, after = tuple(pixels[:dim]), tuple(pixels[dim:])
    joined = (*before, groups << bits, *after)
    if tuple(logits.shape) == joined:
        return logits
    if tuple(logits.shape) == (*before, groups, 1 << bits, *after):
        return logits.flatten(dim, dim + 1)
    raise ValueError(
        f"logits must have groups * 2**bits = {groups} * {1 << bits} = {groups << bits} values at "
        f"dim {dim}: shape {joined}, or with two axes {(*before, groups, 1 << bits, *after)}, "
        f"got {tuple(logits.shape)}"
    )
