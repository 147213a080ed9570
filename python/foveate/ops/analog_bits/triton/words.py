"""Code words: a pixel's ids as 64-bit words; bit c % 64 of word c // 64 is channel c."""

from __future__ import annotations

import struct

import triton
import triton.language as tl


@triton.jit
def reverse_bits(ids, N: tl.constexpr):
    """The lowest N bits in reverse order, the others clear."""
    reversed_ids = ids & 0
    for j in range(N):
        reversed_ids |= ((ids >> j) & 1) << (N - 1 - j)
    return reversed_ids


@triton.jit
def _add_map(word, x, inside, BEGIN: tl.constexpr, N: tl.constexpr, MSB: tl.constexpr):
    # BEGIN: first channel of the map, relative to the word; outside 0..63 it straddles.
    if BEGIN < 64 and BEGIN + N > 0:
        ids = tl.load(x, mask=inside, other=0).to(tl.int64)
        ids = ids & ((1 << N) - 1)
        if MSB:
            ids = reverse_bits(ids, N)
        if BEGIN >= 0:
            word |= ids << BEGIN
        else:
            word |= ids >> (-BEGIN)
    return word


@triton.jit
def code_word(
    x,  # [PIXELS] addresses of the first map
    map_stride,
    inside,
    N_BITS: tl.constexpr,
    MSB: tl.constexpr,
    WORD: tl.constexpr,
):
    """Word WORD of each pixel, int64; its bits beyond the last channel are clear."""
    word = tl.zeros(x.shape, tl.int64)
    channel = 0
    for k in tl.static_range(len(N_BITS)):
        word = _add_map(word, x + k * map_stride, inside, channel - 64 * WORD, N_BITS[k], MSB)
        channel += N_BITS[k]
    return word


@triton.jit
def float64_of(pattern):
    """The float64 of a pattern, which arrives as int32 where it is small: 0.0 does."""
    return tl.cast(pattern.to(tl.int64), tl.float64, bitcast=True)


def float64_pattern(value: float) -> int:
    """The bits of a float64 as an int64: a float argument of a kernel is rounded to float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
