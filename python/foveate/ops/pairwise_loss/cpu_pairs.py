"""Pairs and their statistics as the C++ kernels take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from foveate._native import native
from foveate.ops.pairwise_loss.pairs import Pairs, shares
from foveate.ops.pairwise_loss.statistics import Statistics

_cpu = native("_cpu")
_FORMS = ("none", "diagonal", "index", "ids", "dense", "sparse")
_SERIAL = 1 << 15  # logits of a tile below which a second thread costs more than it brings


def type_code(dtype: torch.dtype) -> int:
    return 1 if dtype == torch.float64 else 0


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def threads_for(tile: torch.Tensor) -> int:
    return 1 if tile.numel() < _SERIAL else torch.get_num_threads()


def _int32_ids(ids_x: torch.Tensor, ids_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids in 32 bits, equal where they were; -1 becomes -1 in x and -2 in y."""
    both = torch.cat([ids_x.long(), ids_y.long()])
    coded = torch.unique(both, return_inverse=True)[1].to(torch.int32)
    coded_x, coded_y = coded.split([len(ids_x), len(ids_y)])
    return coded_x.masked_fill(ids_x == -1, -1), coded_y.masked_fill(ids_y == -1, -2)


class WirePairs(NamedTuple):
    """`Pairs` in the dtypes of the kernels; targets stay as they came, a tile at a time."""

    form: str
    diagonal: int
    a: torch.Tensor | None
    b: torch.Tensor | None
    c: torch.Tensor | None
    ignore_x: torch.Tensor | None
    ignore_y: torch.Tensor | None
    row_share: torch.Tensor | None
    col_share: torch.Tensor | None
    row_weight: torch.Tensor | None
    col_weight: torch.Tensor | None

    def on_tile(self, tile: torch.Tensor, r: int, k: int) -> tuple[Any, tuple[int, ...]]:
        """What must stay alive during the kernel, and its arguments from `form` to `ignore_y`."""
        a = self.a
        if self.form == "dense" and a is not None:
            part = a[r : r + tile.shape[0], k : k + tile.shape[1]]
            a = part.to(tile.dtype).contiguous()
        head = (
            _FORMS.index(self.form),
            self.diagonal,
            pointer(a),
            pointer(self.b),
            pointer(self.c),
            pointer(self.ignore_x),
            pointer(self.ignore_y),
        )
        return a, head


def wire_pairs(pairs: Pairs, dtype: torch.dtype) -> WirePairs:
    a, b, c = pairs.a, pairs.b, pairs.c
    if pairs.form == "index" and a is not None:
        a = a.to(torch.int32).contiguous()
    elif pairs.form == "ids" and a is not None and b is not None:
        a, b = _int32_ids(a, b)
    elif pairs.form == "sparse" and a is not None and b is not None and c is not None:
        a, b, c = a.contiguous(), b.contiguous(), c.to(dtype).contiguous()
    ignore_x, ignore_y = pairs.ignore_x, pairs.ignore_y
    if ignore_x is not None and ignore_y is not None:
        ignore_x, ignore_y = _int32_ids(ignore_x, ignore_y)
    weights = (
        None if w is None else w.to(dtype).contiguous()
        for w in (pairs.row_weight, pairs.col_weight)
    )
    return WirePairs(
        pairs.form,
        pairs.diagonal,
        a,
        b,
        c,
        ignore_x,
        ignore_y,
        *shares(pairs, dtype),
        *weights,
    )


class CpuStatistics(Statistics):
    """Statistics that the C++ kernel collects."""

    def add(
        self, tile: torch.Tensor, r: int, k: int, scale: float, bias: float, head: tuple[int, ...]
    ) -> None:
        """One tile of products, before anything else is done to it."""
        _cpu.pair_stats(
            tile.data_ptr(),
            type_code(tile.dtype),
            tile.shape[1],
            *tile.shape,
            r,
            k,
            scale,
            bias,
            *head,
            self.count.shape[1],
            self.col_count.shape[0],
            threads_for(tile),
            self.count.data_ptr(),
            self.sum.data_ptr(),
            self.low.data_ptr(),
            self.high.data_ptr(),
            self.col_count.data_ptr(),
            self.col_high.data_ptr(),
        )
