"""Tiles of logits, the products around them, and the sums over them: shared by cpu and triton."""

from __future__ import annotations

from collections.abc import Callable

import torch

from foveate.ops.pairwise_loss.checks import accumulator

_ALIGNMENT = 64  # BLAS picks its kernels by the operands' alignment

# Rows and columns of a tile by backend; a working set of 16 MiB on the CPU.
TILE = {"cpu": (1024, 4096), "triton": (4096, 2048)}
# Bytes of logits up to which a whole InfoNCE matrix stays in memory between its two passes.
RESIDENT = {"cpu": 32 << 20, "triton": 256 << 20}


def fits_one_tile(x: torch.Tensor, columns: int, backend: str) -> bool:
    """Whether all logits stay in memory between the two passes of InfoNCE."""
    itemsize = 8 if x.dtype == torch.float64 else 4
    return x.shape[0] * columns * itemsize <= RESIDENT[backend]


def operand(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Contiguous, aligned, in `dtype`."""
    found = tensor.to(dtype).contiguous()
    return found if found.data_ptr() % _ALIGNMENT == 0 else found.clone()


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, first: bool) -> None:
    """out = a b, or out += a b, summed in out's dtype."""
    if first:
        _product(a, b, out)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))


def sweep(
    x: torch.Tensor,
    y: torch.Tensor,
    tile: tuple[int, int],
    needs: list[bool],
    epilogue: Callable[[torch.Tensor, torch.Tensor, int, int], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """G y and G^T x, where `epilogue` turns each tile of x y^T into that of G.

    The tiles' order and shape depend on the sizes alone, so the sums have the same bits every time.

    Args:
        x: `[n, d]`, contiguous. For half precision the products are float32 and G is not.
        y: `[m, d]`, contiguous, the same dtype.
        tile: rows and columns of a tile at most.
        needs: whether G y and G^T x are wanted; one that is not has no rows.
        epilogue: (tile of products, where its G goes, its first row, its first column). In full
            precision G takes the products' place.
    """
    n, m, d = x.shape[0], y.shape[0], x.shape[1]
    wide = accumulator(x.dtype)
    tile_rows, tile_columns = min(n, tile[0]), min(m, tile[1])
    room = x.new_empty(tile_rows * tile_columns, dtype=wide)
    narrow = (
        room if x.dtype == wide or True not in needs[:2] else torch.empty_like(room, dtype=x.dtype)
    )
    dx = x.new_empty(n if needs[0] else 0, d, dtype=wide)
    dy = x.new_empty(m if needs[1] else 0, d, dtype=wide)
    for r in range(0, n, tile_rows):
        rows = x[r : r + tile_rows]
        for k in range(0, m, tile_columns):
            columns = y[k : k + tile_columns]
            size = len(rows) * len(columns)
            part = room[:size].view(len(rows), len(columns))
            slope = narrow[:size].view(len(rows), len(columns))
            _product(rows, columns.T, part)
            epilogue(part, slope, r, k)
            if needs[0]:
                _add_product(slope, columns, dx[r : r + tile_rows], k == 0)
            if needs[1]:
                _add_product(slope.T, rows, dy[k : k + tile_columns], r == 0)
    return dx, dy
