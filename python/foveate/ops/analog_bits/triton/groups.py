"""Tiles of [rows, values of a group]; a row is a group of bits of a pixel.

Groups above 12 bits are read in chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

_VALUES = 4096  # of a tile
_FIRST_PIXELS = 16  # of a tile at least, channels first: neighbours in memory


class Tile(NamedTuple):
    """Sizes of a tile, all powers of two: pixels, groups of a pixel, bits of a chunk of a group."""

    pixels: int
    groups: int
    bits: int


def tile_of(groups: int, bits: int, channels_last: bool) -> Tile:
    """The tile of about 4096 values for groups of `bits` bits."""
    if not channels_last:
        chunk = min(bits, (_VALUES // _FIRST_PIXELS).bit_length() - 1)
        return Tile(_VALUES >> chunk, 1, chunk)
    chunk = min(bits, _VALUES.bit_length() - 1)
    rows = _VALUES >> chunk
    together = min(rows, triton.next_power_of_2(groups))
    return Tile(rows // together, together, chunk)


@triton.jit
def load_rows(logits, stride, inside, C: tl.constexpr, DOUBLE: tl.constexpr):
    """[rows, 2^C] logits in the dtype of the arithmetic."""
    k = tl.arange(0, 1 << C)
    value = tl.load(logits[:, None] + k[None, :] * stride, mask=inside[:, None], other=0.0)
    return value.to(tl.float64 if DOUBLE else tl.float32)


@triton.jit
def place_rows(
    pixel, tile, outer_stride, inner, inner_stride, G_TILE: tl.constexpr,
):  # fmt: skip
    """Group and address of the pixel's values for each row of a tile."""
    row = tl.arange(0, pixel.shape[0])
    group = tile * G_TILE + row % G_TILE
    return group, (pixel // inner) * outer_stride + (pixel % inner) * inner_stride
