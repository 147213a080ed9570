"""Pixels in chunks, as rows: what the linear forms loop over so that no logits exist whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from foveate.ops.analog_bits.layout import split_at

_LOGIT_BYTES = 2 << 20  # of a chunk: they stay in cache between the products and the softmax


class Chunk(NamedTuple):
    """Pixels [begin, end) in row-major order, as places in `[outer, channels, inner]`."""

    begin: int
    end: int
    samples: slice
    inner: slice

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The chunk's rows `[pixels, channels]` of `[outer, channels, inner]`."""
        part = tensor[self.samples, :, self.inner].transpose(1, 2)  # [o, i, channels]
        return part.reshape(self.end - self.begin, tensor.shape[1])

    def put(self, tensor: torch.Tensor, rows: torch.Tensor) -> None:
        """Write the chunk's rows back."""
        part = tensor[self.samples, :, self.inner].transpose(1, 2)
        part.copy_(rows.view(part.shape))


def as_rows(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """`[outer, channels, inner]` with the channels at `dim`."""
    outer, inner = split_at(tensor.shape, dim)
    return tensor.reshape(outer, tensor.shape[dim], inner)


def chunk_pixels(chunk: int | None, logits: int) -> int:
    """Pixels of a chunk: as given, or those of about 2 MiB of float32 logits."""
    return max(1, _LOGIT_BYTES // (4 * logits)) if chunk is None else chunk


def chunks(outer: int, inner: int, pixels: int) -> Iterator[Chunk]:
    """All pixels, at most `pixels` at a time: several samples, or a part of one."""
    if outer * inner == 0:
        return
    together = max(1, pixels // inner)
    for first in range(0, outer, together):
        last = min(first + together, outer)
        for start in range(0, inner, inner if together > 1 else pixels):
            stop = inner if together > 1 else min(start + pixels, inner)
            begin = first * inner + start
            count = (last - first) * (stop - start)
            yield Chunk(begin, begin + count, slice(first, last), slice(start, stop))
