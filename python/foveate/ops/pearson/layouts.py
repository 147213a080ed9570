"""Arrays as maps [n, c, h, w] in strides that the kernels read."""

from __future__ import annotations

import torch


def readable(maps: torch.Tensor, last: bool | None = None) -> tuple[torch.Tensor, bool]:
    """`maps` in memory of unit stride along w, or along c: then the second value is True.

    `last` asks for one of them; None takes what the memory offers. Copies only what has neither.
    """
    _, c, h, w = maps.shape
    along_c = maps.stride(1) == 1 or c == 1
    along_w = maps.stride(3) == 1 or w == 1
    if last is None:
        last = along_c if h * w == 1 else along_c and not along_w
        last = last or (h * w == 1)
    if last:
        if not along_c:
            maps = maps.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    elif not along_w:
        maps = maps.contiguous()
    return maps, last
