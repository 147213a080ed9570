"""Tiles of logits, the products around them, and the sums over them: shared by cpu and triton."""

from __future__ import annotations

import torch

# Rows and columns of a tile by backend; a working set of 16 MiB on the CPU.
TILE = {"cpu": (1024, 4096), "triton": (4096, 2048)}
# Bytes of logits up to which a whole InfoNCE matrix stays in memory between its two passes.
RESIDENT = {"cpu": 32 << 20, "triton": 256 << 20}


def fits_one_tile(x: torch.Tensor, columns: int, backend: str) -> bool:
    """Whether all logits stay in memory between the two passes of InfoNCE."""
    itemsize = 8 if x.dtype == torch.float64 else 4
    return x.shape[0] * columns * itemsize <= RESIDENT[backend]
