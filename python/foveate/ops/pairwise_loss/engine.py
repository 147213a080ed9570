"""Tiles of logits, the products around them, and the sums over them: shared by cpu and triton."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Rows and columns of a tile by backend; a working set of 16 MiB on the CPU.
TILE = {"cpu": (1024, 4096), "triton": (4096, 2048)}
# Bytes of logits up to which a whole InfoNCE matrix stays in memory between its two passes.
RESIDENT = {"cpu": 32 << 20, "triton": 256 << 20}


def fits_one_tile(x: torch.Tensor, columns: int, backend: str) -> bool:
    """Whether all logits stay in memory between the two passes of InfoNCE."""
    itemsize = 8 if x.dtype == torch.float64 else 4
    return x.shape[0] * columns * itemsize <= RESIDENT[backend]


def sweep(
    x: torch.Tensor,
    y: torch.Tensor,
    tile: tuple[int, int],
    needs: list[bool],
    epilogue: Callable[[torch.Tensor, int, int], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """G y and G^T x, where `epilogue` turns each tile of x y^T into that of G, in place.

    The tiles' order and shape depend on the sizes alone, so the sums have the same bits every time.

    Args:
        x: `[n, d]`, contiguous.
        y: `[m, d]`, contiguous, the same dtype.
        tile: rows and columns of a tile at most.
        needs: whether G y and G^T x are wanted; one that is not has no rows.
        epilogue: (tile, its first row, its first column).
    """
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    tile_rows, tile_columns = min(n, tile[0]), min(m, tile[1])
    room = x.new_empty(tile_rows * tile_columns)
    dx, dy = x.new_empty(n if needs[0] else 0, d), x.new_empty(m if needs[1] else 0, d)
    for r in range(0, n, tile_rows):
        rows = x[r : r + tile_rows]
        for k in range(0, m, tile_columns):
            columns = y[k : k + tile_columns]
            part = room[: len(rows) * len(columns)].view(len(rows), len(columns))
            torch.mm(rows, columns.T, out=part)
            epilogue(part, r, k)
            if needs[0]:
                dx[r : r + tile_rows].addmm_(part, columns, beta=0 if k == 0 else 1)
            if needs[1]:
                dy[k : k + tile_columns].addmm_(part.T, rows, beta=0 if r == 0 else 1)
    return dx, dy
