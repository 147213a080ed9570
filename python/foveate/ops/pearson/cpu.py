"""pearson on CPU tensors: csrc/cpu/pearson*.cpp, products by torch.mm."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from foveate._native import DTYPE_CODES, native
from foveate.ops.pearson import matrix
from foveate.ops.pearson.layouts import readable
from foveate.ops.pearson.plan import Moment, Operand

_cpu = native("_cpu")
_SELF = sys.modules[__name__]
_SERIAL = 1 << 15  # elements below which a second thread costs more than it brings

# What products of a precision are computed in.
COMPUTE = {"bf16": torch.float32, "tf32": torch.float32, "bf16x3": torch.float32}
COMPUTE |= {"fp32": torch.float32, "fp64": torch.float64}
K_STAGE = 4096  # samples of one product


def unsupported(_op: str, *_args: Any) -> str | None:
    return None


def _threads(elements: int) -> int:
    return 1 if elements < _SERIAL else torch.get_num_threads()


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 in float32, whatever torch.set_float32_matmul_precision says."""
    if torch.get_float32_matmul_precision() == "highest":
        yield
        return
    with torch.backends.mkldnn.flags(enabled=False):
        yield


class _Band(NamedTuple):
    """Rows of a matrix whose nonzeros are consecutive, padded to one width."""

    first: torch.Tensor  # [rows] int32
    weights: torch.Tensor  # [rows, width]


@functools.lru_cache(maxsize=512)
def _band_of(rows: int, columns: int, values: bytes, dtype: torch.dtype) -> _Band:
    matrix = torch.frombuffer(bytearray(values), dtype=torch.float64).view(rows, columns)
    used = matrix != 0
    first = used.int().argmax(1)
    last = columns - used.flip(1).int().argmax(1)  # exclusive
    width = max(int((last - first).max()), 1)
    first = torch.minimum(first, torch.tensor(columns - width))
    index = first[:, None] + torch.arange(width)
    return _Band(first.int().contiguous(), matrix.gather(1, index).to(dtype).contiguous())


def _band(matrix: torch.Tensor, dtype: torch.dtype) -> _Band:
    return _band_of(*matrix.shape, matrix.contiguous().numpy().tobytes(), dtype)


def _axis_words(matrix: torch.Tensor | None, size: int, dtype: torch.dtype) -> list[int]:
    if matrix is None:
        return [size, 0, 0, 0]
    band = _band(matrix, dtype)
    return [
        matrix.shape[0],
        band.weights.shape[1],
        band.first.data_ptr(),
        band.weights.data_ptr(),
    ]


def _diagonals(gram: torch.Tensor) -> torch.Tensor:
    """Diagonal and upper diagonal of a tridiagonal matrix, interleaved [size, 2]."""
    upper = torch.cat([gram.diagonal(1), gram.new_zeros(1)])
    return torch.stack([gram.diagonal(), upper], 1).contiguous()


def moments(
    maps: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    wide: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum, least and largest value [c] of every unit of maps [n, c, h, w]."""
    maps, last = readable(maps)
    n, c, h, w = maps.shape
    line_h, line_w = (
        torch.ones(size, dtype=torch.float64) if weight is None else weight
        for size, weight in zip((h, w), weights, strict=True)
    )
    out = torch.empty(3, c, dtype=torch.float64)
    _cpu.pearson_moments(
        maps.data_ptr(),
        DTYPE_CODES[maps.dtype],
        wide,
        last,
        n,
        c,
        h,
        w,
        *maps.stride(),
        line_h.data_ptr(),
        line_w.data_ptr(),
        _threads(maps.numel()),
        out[0].data_ptr(),
        out[1].data_ptr(),
        out[2].data_ptr(),
    )
    return out[0], out[1], out[2]


def stage(
    maps: torch.Tensor,
    last: bool,
    pivot: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    operands: Sequence[tuple[Operand, torch.Tensor | None]],
    moment_plans: Sequence[Moment],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centres, scales and resizes maps [n, c, h, w] into the operands' memory.

    Args:
        maps: in the memory that `readable(maps, last)` gives.
        pivot: [c] float64, exact in `dtype`.
        scale: [2, c] float64.
        weight: [n] float64, or None.
        operands: each with its destination, [c, n g] of unit stride along n g, or for `last`
            [n g, c] of unit stride along c; None: not written.
        moment_plans: grids whose S and Q are wanted.
        dtype: of the arithmetic and the destinations.

    Returns:
        S [m, c], Q [m, c] float64 of the scaled deviations, and the largest of them [c].
    """
    n, c, h, w = maps.shape
    words: list[int] = []
    for operand, dst in operands:
        words += _axis_words(operand.along_h, h, dtype) + _axis_words(operand.along_w, w, dtype)
        words += [0, 0] if dst is None else [dst.data_ptr(), dst.stride(0)]
    count = len(operands)
    sums = torch.zeros(2, len(moment_plans), c, dtype=torch.float64)
    largest = torch.zeros(c, dtype=torch.float64)
    keep: list[torch.Tensor] = []
    moment_words: list[int] = []

    def address(tensor: torch.Tensor | None) -> int:
        if tensor is None:
            return 0
        keep.append(tensor)
        return tensor.data_ptr()

    for index, moment in enumerate(moment_plans):
        target = -1
        if moment.shrink != (None, None):
            target = count
            count += 1
            words += _axis_words(moment.shrink[0], h, dtype)
            words += [*_axis_words(moment.shrink[1], w, dtype), 0, 0]
        grams = [None if g is None else _diagonals(g) for g in moment.gram]
        moment_words += [target, address(moment.weights[0]), address(moment.weights[1])]
        moment_words += [address(grams[0]), address(grams[1])]
        moment_words += [sums[0, index].data_ptr(), sums[1, index].data_ptr()]
    table = torch.tensor(words or [0], dtype=torch.int64)
    moment_table = torch.tensor(moment_words or [0], dtype=torch.int64)
    if n and c:
        _cpu.pearson_stage(
            maps.data_ptr(),
            DTYPE_CODES[maps.dtype],
            dtype == torch.float64,
            last,
            n,
            c,
            h,
            w,
            *maps.stride(),
            pivot.data_ptr(),
            scale.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            table.data_ptr(),
            count,
            moment_table.data_ptr(),
            len(moment_plans),
            _threads(maps.numel()),
            largest.data_ptr(),
        )
    return sums[0], sums[1], largest


def multiply(
    x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, accumulate: bool, _precision: str
) -> None:
    """out (+)= x y^T of operands [c, K] in any strides."""
    with exact_products():
        if accumulate:
            out.addmm_(x, y.T)
        else:
            torch.mm(x, y.T, out=out)


def fold(
    acc: torch.Tensor,
    product: torch.Tensor,
    u1: torch.Tensor,
    v1: torch.Tensor,
    u2: torch.Tensor,
    v2: torch.Tensor,
) -> None:
    """acc += product - u1 v1^T + u2 v2^T in float64."""
    if acc.numel() == 0:
        return
    _cpu.pearson_fold(
        product.data_ptr(),
        product.dtype == torch.float64,
        product.stride(0),
        *acc.shape,
        u1.data_ptr(),
        v1.data_ptr(),
        u2.data_ptr(),
        v2.data_ptr(),
        DTYPE_CODES[acc.dtype],
        acc.stride(0),
        _threads(acc.numel()),
        acc.data_ptr(),
    )


def finalize(
    acc: torch.Tensor,
    side_a: torch.Tensor,
    side_b: torch.Tensor,
    symmetric: bool,
    out: torch.Tensor,
) -> None:
    """out = clip(acc / (root_a root_b)), from inverse roots (float32 out) or squares (float64)."""
    _cpu.pearson_finalize(
        acc.data_ptr(),
        DTYPE_CODES[acc.dtype],
        acc.stride(0),
        *acc.shape,
        side_a.data_ptr(),
        side_b.data_ptr(),
        symmetric,
        _threads(acc.numel()),
        DTYPE_CODES[out.dtype],
        out.stride(0),
        out.data_ptr(),
    )


def topk(
    acc: torch.Tensor,
    sides: tuple[torch.Tensor, torch.Tensor] | None,
    block_start: torch.Tensor,
    row_block: torch.Tensor,
    by_abs: bool,
    dtype: torch.dtype,
    offsets: tuple[int, int],
    k: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The best k of the rows and columns of the finalised matrix [rows, cols].

    Args:
        acc: co-moments, or with `sides` None the matrix itself; unit stride along columns.
        sides: [blocks, rows] and [row blocks, cols]: what `finalize` takes, by the other side's
            layer.
        block_start: [blocks + 1] int64, columns of the layers of b.
        row_block: [rows] int32, layer of each row.
        by_abs: rank by |r|.
        dtype: of r.
        offsets: added to the indices of rows and columns.
        k: (k_a, k_b); 0 leaves a side out.

    Returns:
        values_a [rows, k_a], indices_a, values_b [cols, k_b], indices_b.
    """
    rows, cols = acc.shape
    values = [
        torch.empty(size, kk, dtype=torch.float64) for size, kk in zip(acc.shape, k, strict=True)
    ]
    indices = [torch.empty(v.shape, dtype=torch.int64) for v in values]
    _cpu.pearson_topk(
        acc.data_ptr(),
        DTYPE_CODES[acc.dtype],
        acc.stride(0),
        rows,
        cols,
        0 if sides is None else sides[0].data_ptr(),
        0 if sides is None else sides[1].data_ptr(),
        block_start.data_ptr(),
        block_start.numel() - 1,
        row_block.data_ptr(),
        by_abs,
        dtype == torch.float64,
        *offsets,
        *k,
        _threads(acc.numel()),
        values[0].data_ptr(),
        indices[0].data_ptr(),
        values[1].data_ptr(),
        indices[1].data_ptr(),
    )
    return values[0].to(dtype), indices[0], values[1].to(dtype), indices[1]


def pearson_matrix_fwd(
    a: torch.Tensor,
    b: torch.Tensor,
    same: bool,
    precision: str,
    grid: list[int],
    resample: str,
    nan_policy: str,
    constant: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return matrix.forward(
        _SELF, a, b, same, precision, (grid[0], grid[1]), resample, nan_policy, constant
    )


def pearson_matrix_bwd(
    grad: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    r: torch.Tensor,
    side_a: torch.Tensor,
    side_b: torch.Tensor,
    keep: torch.Tensor,
    precision: str,
    grid: list[int],
    resample: str,
    constant: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    with exact_products():
        return matrix.backward(
            grad,
            a,
            b,
            r,
            side_a,
            side_b,
            keep,
            (grid[0], grid[1]),
            resample,
            constant,
            COMPUTE[precision],
        )
