"""ncut on CPU tensors: csrc/cpu/ncut_*.cpp."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from foveate._native import native
from foveate.ops.ncut import partition, reference
from foveate.ops.ncut.gradient import ncut_affinity_bwd as ncut_affinity_bwd
from foveate.ops.ncut.results import NCutResult
from foveate.ops.ncut.values import (
    refuse_affinity_value,
    refuse_asymmetry,
    refuse_negative,
    require_degrees,
    require_finite,
)

_cpu = native("_cpu")

_ON_REJECT = ("retry", "stop", "skip")  # csrc/cpu/ncut_partition.cpp


def unsupported(_op: str, *_args: Any) -> str | None:
    return None


class _Matrix(NamedTuple):
    """One graph for the solver: bits or weights, and degrees."""

    n: int
    operand: torch.Tensor
    kind: int  # ncut_solve.cpp
    degrees: torch.Tensor


def _unit(
    image: torch.Tensor, masked: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Normalised rows, which are zero (uint8), and the first row that is not finite or -1."""
    work = torch.float64 if image.dtype == torch.float64 else torch.float32
    rows = image.to(work).contiguous()
    n, c = rows.shape
    unit, zero = torch.empty_like(rows), torch.empty(n, dtype=torch.uint8)
    given = None if masked is None else masked.to(torch.uint8).contiguous()
    bad = _cpu.ncut_normalize(
        rows.data_ptr(),
        int(work == torch.float64),
        0 if given is None else given.data_ptr(),
        n,
        c,
        torch.get_num_threads(),
        unit.data_ptr(),
        zero.data_ptr(),
    )
    return unit, zero, bad


def affinity_pack(
    image: torch.Tensor, tau: float, masked: torch.Tensor | None
) -> tuple[torch.Tensor, int]:
    """Bits `[ceil(n / 32), n]` of `[n, c]`, and the first row that is not finite or -1."""
    unit, zero, bad = _unit(image, masked)
    n = unit.shape[0]
    bits = torch.empty((n + 31) // 32, n, dtype=torch.int32)
    _cpu.ncut_pack(
        unit.data_ptr(),
        int(unit.dtype == torch.float64),
        zero.data_ptr(),
        n,
        unit.shape[1],
        tau,
        int(tau < 0),
        torch.get_num_threads(),
        bits.data_ptr(),
    )
    return bits, bad


def _bit_matrix(bits: torch.Tensor) -> _Matrix:
    n = bits.shape[1]
    degrees = torch.empty(n, dtype=torch.int32)
    _cpu.ncut_degrees(bits.data_ptr(), n, degrees.data_ptr())
    return _Matrix(n, bits, 0, degrees)


def ncut_lanczos(
    matrices: list[_Matrix],
    eps: float,
    k: int,
    tol: float,
    max_iter: int,
    starts: list[torch.Tensor | None] | None = None,
) -> tuple[list[NCutResult], list[torch.Tensor]]:
    """Unbatched results of graphs, and their last two vectors y `[2, n]` to start another from."""
    count = len(matrices)
    values = torch.empty(count, k, dtype=torch.float64)
    residual = torch.empty(count, k, dtype=torch.float64)
    gap = torch.empty(count, dtype=torch.float64)
    integers = torch.empty(count, 4, dtype=torch.int64)
    vectors = [torch.empty(k, matrix.n, dtype=torch.float64) for matrix in matrices]
    last = [torch.empty(2, matrix.n, dtype=torch.float64) for matrix in matrices]
    table = []
    for i, matrix in enumerate(matrices):
        start = None if starts is None else starts[i]
        table.append(
            [
                matrix.n,
                matrix.operand.data_ptr(),
                matrix.kind,
                matrix.degrees.data_ptr(),
                0 if start is None else start.data_ptr(),
                values[i].data_ptr(),
                vectors[i].data_ptr(),
                residual[i].data_ptr(),
                gap[i].data_ptr(),
                integers[i].data_ptr(),
                last[i].data_ptr(),
                0,
            ]
        )
    jobs = torch.tensor(table, dtype=torch.int64).reshape(count, 12)
    _cpu.ncut_lanczos(
        jobs.data_ptr(), count, eps, k, tol, min(max_iter, 1 << 30), torch.get_num_threads()
    )
    results = [
        NCutResult(
            values[i],
            vectors[i],
            residual[i],
            gap[i],
            integers[i, 0],
            integers[i, 1] != 0,
            integers[i, 2] != 0,
            integers[i, 3],
        )
        for i in range(count)
    ]
    return results, last


def _packed(
    features: list[torch.Tensor], mask: list[torch.Tensor], tau: float, check: bool
) -> Iterator[_Matrix]:
    for i, group in enumerate(features):
        for j, image in enumerate(group):
            bits, bad = affinity_pack(image, tau, mask[i][j] if mask else None)
            if check and bad >= 0:
                require_finite(features)
            yield _bit_matrix(bits)


def ncut_fwd(
    features: list[torch.Tensor],
    mask: list[torch.Tensor],
    tau: float,
    eps: float,
    k: int,
    tol: float,
    max_iter: int,
    check: bool,
) -> tuple[torch.Tensor, ...]:
    matrices = list(_packed(features, mask, tau, check))
    results, _ = ncut_lanczos(matrices, eps, k, tol, max_iter)
    return reference.pair_outputs(results, features, k, tol, check)


def _affinity_matrix(matrix: torch.Tensor, entry: int, check: bool) -> tuple[_Matrix, float, float]:
    """The graph of `[n, n]`, with eps and the factor W was divided by."""
    work = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    matrix = matrix.to(work).contiguous()
    n = matrix.shape[0]
    double, threads = int(work == torch.float64), torch.get_num_threads()
    report = torch.empty(5, dtype=torch.float64)
    _cpu.ncut_scan(matrix.data_ptr(), double, n, threads, report.data_ptr())
    low, high, difference, bad, negative = report.tolist()
    if check:
        if bad >= 0:
            row = matrix[int(bad)]
            refuse_affinity_value(entry, int(bad), float(row[~torch.isfinite(row)][0]))
        refuse_asymmetry(entry, difference, high)
        if negative >= 0:
            refuse_negative(entry, int(negative), float(matrix[int(negative)].min()))
    if bad < 0 and high > 0:
        bits = torch.empty((n + 31) // 32, n, dtype=torch.int32)
        if _cpu.ncut_pack_values(matrix.data_ptr(), double, n, low, high, threads, bits.data_ptr()):
            if low == high:
                low = 0.0
            packed = _bit_matrix(bits)
            if check:
                degrees = low * n + (high - low) * packed.degrees.double()
                require_degrees(degrees, entry, "affinity")
            return packed, low / high, high
    degrees = torch.empty(n, dtype=torch.float64)
    _cpu.ncut_row_sums(matrix.data_ptr(), double, n, threads, degrees.data_ptr())
    if check:
        require_degrees(degrees, entry, "affinity")
    return _Matrix(n, matrix, 1 + double, degrees), 0.0, 1.0


def ncut_affinity_fwd(
    affinity: torch.Tensor, k: int, tol: float, max_iter: int, check: bool
) -> tuple[torch.Tensor, ...]:
    results = []
    for entry, matrix in enumerate(affinity):
        graph, eps, factor = _affinity_matrix(matrix, entry, check)
        (result,), _ = ncut_lanczos([graph], eps, k, tol, max_iter)
        results.append(result._replace(eigenvectors=result.eigenvectors / math.sqrt(factor)))
    return reference.pair_outputs(results, [affinity], k, tol, check)


def maskcut_fwd(
    features: list[torch.Tensor],
    grid: list[int],
    n_masks: int,
    tau: float,
    eps: float,
    iou_threshold: float,
    min_area: float,
    corners: int,
    on_reject: str,
    tol: float,
    max_iter: int,
    check: bool,
) -> tuple[torch.Tensor, ...]:
    wholes, cells = [], []
    for i, group in enumerate(features):
        for image in group:
            bits, bad = affinity_pack(image, tau, None)
            if check and bad >= 0:
                require_finite(features)
            wholes.append(bits)
            cells.append((grid[2 * i], grid[2 * i + 1]))
    table, outputs = [], []
    for bits, (h, w) in zip(wholes, cells, strict=True):
        n = h * w
        masks, candidates = (torch.empty(n_masks, n, dtype=torch.bool) for _ in range(2))
        status, seeds = (torch.empty(n_masks, dtype=torch.int64) for _ in range(2))
        reals = torch.empty(3, n_masks, dtype=torch.float64)
        integers = torch.empty(n_masks, 4, dtype=torch.int64)
        vectors = torch.empty(n_masks, n, dtype=torch.float64)
        outputs.append((masks, status, candidates, seeds, *reals, integers, vectors))
        table.append([h, w, bits.data_ptr(), *(out.data_ptr() for out in outputs[-1])])
    jobs = torch.tensor(table, dtype=torch.int64).reshape(len(table), 12)
    _cpu.ncut_maskcut(
        *(jobs.data_ptr(), len(table), n_masks, eps, int(tau < 0), iou_threshold, min_area),
        *(corners, _ON_REJECT.index(on_reject), tol, min(max_iter, 1 << 30)),
        torch.get_num_threads(),
    )
    results = []
    for masks, status, candidates, seeds, *values, integers, vectors in outputs:
        passes, converged, degenerate, uncertain = integers.unbind(1)
        results.append(
            partition.Stages(
                *(masks, status, candidates, seeds),
                *(values[0], values[1], values[2], uncertain),
                *(degenerate != 0, converged != 0, vectors, passes),
            )
        )
    return reference.stage_outputs(results, features, n_masks, tol, check)


def _component(side: torch.Tensor, seed: int, grid: tuple[int, int]) -> torch.Tensor:
    cells = side.to(torch.uint8).contiguous()
    found = torch.empty_like(cells)
    _cpu.ncut_component(cells.data_ptr(), seed, *grid, found.data_ptr())
    return found.bool()


def tokencut_fwd(
    features: list[torch.Tensor],
    grid: list[int],
    tau: float,
    eps: float,
    binary: bool,
    tol: float,
    max_iter: int,
    check: bool,
) -> tuple[torch.Tensor, ...]:
    if binary:
        matrices = list(_packed(features, [], tau, check))
    else:
        if check:
            require_finite(features)
        matrices = []
        for image in (image for group in features for image in group):
            weights = reference.weights(image, tau, eps, len(matrices))
            matrices.append(_Matrix(image.shape[0], weights, 2, weights.sum(1)))
    pairs, _ = ncut_lanczos(matrices, eps, 1, tol, max_iter)
    grids = [(grid[2 * i], grid[2 * i + 1]) for i, group in enumerate(features) for _ in group]
    return reference.object_outputs(pairs, grids, features, tol, check, _component)
