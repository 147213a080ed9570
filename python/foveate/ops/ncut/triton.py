"""ncut on CUDA tensors: bits and mat-vecs by Triton kernels under a batched block Lanczos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from foveate.ops.ncut import batched_lanczos as lanczos
from foveate.ops.ncut import batched_partition as partition
from foveate.ops.ncut import triton_affinity, triton_matvec
from foveate.ops.ncut.batched_lanczos import DEGENERATE, Graph
from foveate.ops.ncut.gradient import ncut_affinity_bwd as ncut_affinity_bwd
from foveate.ops.ncut.results import MaskStatus
from foveate.ops.ncut.values import (
    require_affinity,
    require_degrees,
    require_finite,
    warn_not_converged,
)


def unsupported(_op: str, *_args: Any) -> str | None:
    return None


class _Batch(NamedTuple):
    """Groups of images as one batch, padded with zero tokens and zero channels."""

    features: torch.Tensor  # [b, n, c]
    tokens: torch.Tensor  # [b] int64
    mask: torch.Tensor | None  # [b, n] bool


class Vectors(NamedTuple):
    """What the raw ops return of the eigenpairs, eigenvectors 0 at padding."""

    eigenvalues: torch.Tensor  # [b, k]
    eigenvectors: torch.Tensor  # [b, k, n]
    residual: torch.Tensor  # [b, k]
    gap: torch.Tensor  # [b]
    iterations: torch.Tensor  # [b] int64
    converged: torch.Tensor  # [b] bool
    degenerate: torch.Tensor  # [b] bool
    uncertain: torch.Tensor  # [b] int64


class Solver(NamedTuple):
    """How graphs of a batch are described, and their first pairs found."""

    two_valued: Callable[..., Any]  # words [b, ceil(n / 32), n], tokens, low, high [b] -> a graph
    weighted: Callable[..., Any]  # affinity [b, n, n], 0 at padding, tokens [b] -> a graph
    pairs: Callable[..., Vectors]  # a graph, k, tol, max_iter -> its pairs


def _batch(groups: list[torch.Tensor], masks: list[torch.Tensor]) -> _Batch:
    if len(groups) == 1:  # without a copy from the host
        (group,) = groups
        tokens = group.new_full(group.shape[:1], group.shape[1], dtype=torch.int64)
        return _Batch(group, tokens, masks[0] if masks else None)
    counts = [group.shape[1] for group in groups for _ in range(group.shape[0])]
    tokens = torch.tensor(counts, dtype=torch.int64, device=groups[0].device)
    n, c = max(g.shape[1] for g in groups), max(g.shape[2] for g in groups)
    features = groups[0].new_zeros(len(counts), n, c)
    mask = features.new_zeros((len(counts), n), dtype=torch.bool) if masks else None
    first = 0
    for index, group in enumerate(groups):
        images = slice(first, first + group.shape[0])
        features[images, : group.shape[1], : group.shape[2]] = group
        if mask is not None:
            mask[images, : group.shape[1]] = masks[index]
        first = images.stop
    return _Batch(features, tokens, mask)


def _two_valued(
    words: torch.Tensor, tokens: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> Graph:
    """The graph W = low + (high - low) B of bits `[b, ceil(n / 32), n]`; low, high `[b]`."""
    n = words.shape[2]
    place = torch.arange(n, device=words.device)
    inside = place < tokens[:, None]
    joined = triton_matvec.popcount(words)
    itself = (words[:, place // 32, place] >> (place % 32)) & 1
    count, step = tokens.double(), high - low
    degree = (low * count)[:, None] + step[:, None] * joined
    label = torch.where((joined == 1) & (itself != 0), 1, 0)
    label = torch.where(joined == 0, 2, label)
    label = torch.where(joined == tokens[:, None], 3, label)
    zero = torch.zeros_like(low)

    def apply(x: torch.Tensor) -> torch.Tensor:
        constant = low[:, None, None] * x.sum(2, keepdim=True)
        return step[:, None, None] * triton_matvec.bits_matvec(words, x) + constant

    return Graph(
        apply,
        torch.where(inside, degree, 1.0),
        inside,
        tokens,
        torch.where(inside, label, 0),
        torch.stack([step / (low * count + step), zero, zero], 1),
    )


def _weighted(affinity: torch.Tensor, tokens: torch.Tensor) -> Graph:
    """The graph of dense weights `[b, n, n]`, 0 at padding."""
    b, n, _ = affinity.shape
    inside = torch.arange(n, device=affinity.device) < tokens[:, None]
    ones = torch.ones((b, 1, n), dtype=torch.float64, device=affinity.device)
    degree = triton_matvec.dense_matvec(affinity, ones)[:, 0]
    return Graph(
        lambda x: triton_matvec.dense_matvec(affinity, x),
        torch.where(inside, degree, 1.0),
        inside,
        tokens,
        torch.zeros_like(inside, dtype=torch.int64),
        torch.zeros((b, 3), dtype=torch.float64, device=affinity.device),
    )


def _vectors(graph: Graph, k: int, tol: float, max_iter: int) -> Vectors:
    pairs = lanczos.solve(graph, k, tol, max_iter)
    x = pairs.y * (graph.degree.rsqrt() * graph.inside)[:, None]
    x = lanczos.signed(x)
    uncertain = lanczos.uncertain_tokens(
        graph, x[:, 0], pairs.residual[:, 0], pairs.first_gap, pairs.certain_gap
    )
    return Vectors(
        1 - pairs.mu,
        x,
        pairs.residual,
        pairs.gap,
        pairs.passes,
        (pairs.residual <= tol).all(1),
        pairs.gap <= DEGENERATE,
        uncertain,
    )


TRITON = Solver(_two_valued, _weighted, _vectors)


def _painted(
    words: torch.Tensor, painted: torch.Tensor, tokens: torch.Tensor, bit: bool
) -> torch.Tensor:
    """The bits with the rows and columns of painted tokens `[b, n]` those of zero tokens."""
    rows = _packed(painted)
    if not bit:
        return torch.where(painted[:, None], 0, words & ~rows)
    inside = _packed(torch.arange(words.shape[2], device=words.device) < tokens[:, None])
    return torch.where(painted[:, None], inside, words | rows)


def _packed(flags: torch.Tensor) -> torch.Tensor:
    """Flags `[b, n]` as words `[b, ceil(n / 32), 1]` int32."""
    b, n = flags.shape
    groups = -(-n // 32)
    padded = torch.nn.functional.pad(flags.to(torch.int32), (0, 32 * groups - n))
    shift = torch.arange(32, dtype=torch.int32, device=flags.device)
    return (padded.view(b, groups, 32) << shift).sum(2, keepdim=True, dtype=torch.int32)


def _constant(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full(like.shape, value, dtype=torch.float64, device=like.device)


def ncut_fwd(
    features: list[torch.Tensor],
    mask: list[torch.Tensor],
    tau: float,
    eps: float,
    k: int,
    tol: float,
    max_iter: int,
    check: bool,
    solver: Solver = TRITON,
) -> tuple[torch.Tensor, ...]:
    if check:
        require_finite(features)
    batch = _batch(features, mask)
    if batch.tokens.shape[0] == 0:
        return _nothing(features[0], _pair_shapes(k, batch.features.shape[1]), _PAIRS)
    bits = triton_affinity.affinity_pack(batch.features, batch.tokens, batch.mask, tau)
    graph = solver.two_valued(
        bits.words, batch.tokens, _constant(eps, batch.tokens), _constant(1.0, batch.tokens)
    )
    found = solver.pairs(graph, k, tol, max_iter)
    if check:
        warn_not_converged(found.converged, found.iterations, found.residual, tol)
    return tuple(found)


def ncut_affinity_fwd(
    affinity: torch.Tensor,
    k: int,
    tol: float,
    max_iter: int,
    check: bool,
    solver: Solver = TRITON,
) -> tuple[torch.Tensor, ...]:
    if check:
        require_affinity(affinity)
    b, n, _ = affinity.shape
    if b == 0:
        return _nothing(affinity, _pair_shapes(k, n), _PAIRS)
    low, high = affinity.amin((1, 2)), affinity.amax((1, 2))
    either = (affinity == low[:, None, None]) | (affinity == high[:, None, None])
    packs = either.flatten(1).all(1)
    found: list[torch.Tensor] | None = None
    for chosen in (packs, ~packs):
        images = chosen.nonzero().flatten()
        if images.shape[0] == 0:
            continue
        part = affinity if images.shape[0] == b else affinity[images]
        tokens = torch.full_like(images, n)
        if chosen is packs:
            low64, high64 = low[images].double(), high[images].double()
            graph = solver.two_valued(triton_matvec.dense_pack(part, high64), tokens, low64, high64)
        else:
            graph = solver.weighted(part, tokens)
        values = solver.pairs(graph, k, tol, max_iter)
        if found is None:
            found = [value.new_empty((b, *value.shape[1:])) for value in values]
        for target, value in zip(found, values, strict=True):
            target[images] = value
    assert found is not None
    outputs = Vectors(*found)
    if check:
        warn_not_converged(outputs.converged, outputs.iterations, outputs.residual, tol)
    return tuple(outputs)


_F64, _I64, _BOOL = torch.float64, torch.int64, torch.bool
_PAIRS = (_F64, _F64, _F64, _F64, _I64, _BOOL, _BOOL, _I64)
_STAGES = (_BOOL, _I64, _BOOL, _I64, _F64, _F64, _F64, _I64, _BOOL, _BOOL, _F64)
_OBJECT = (_BOOL, _I64, _I64, _F64, _BOOL, _F64, _F64, _F64, _I64, _BOOL, _BOOL)


def _pair_shapes(k: int, n: int) -> tuple[tuple[int, ...], ...]:
    return (k,), (k, n), (k,), (), (), (), (), ()


def _grids(batch: _Batch, groups: list[torch.Tensor], grid: list[int]) -> partition.Grids:
    sizes = [
        (grid[2 * index], grid[2 * index + 1])
        for index, group in enumerate(groups)
        for _ in range(group.shape[0])
    ]
    cells = torch.tensor(sizes, dtype=torch.int64, device=batch.tokens.device)
    return partition.grids(cells[:, 0], cells[:, 1], batch.features.shape[1])


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
    solver: Solver = TRITON,
) -> tuple[torch.Tensor, ...]:
    if check:
        require_finite(features)
    batch = _batch(features, [])
    b, n = batch.features.shape[:2]
    if b == 0:
        m = n_masks
        shapes = ((m, n), (m,), (m, n), *[(m,)] * 7, (m, n))
        return _nothing(batch.features, shapes, _STAGES)
    bits = triton_affinity.affinity_pack(batch.features, batch.tokens, None, tau)
    low, high = _constant(eps, batch.tokens), _constant(1.0, batch.tokens)
    grids = _grids(batch, features, grid)
    blank = torch.zeros_like(grids.inside)
    progress = partition.Progress(blank, blank, blank, torch.zeros_like(batch.tokens) > 0)
    solved_for: torch.Tensor | None = None  # the painting the vectors belong to
    vectors: Vectors | None = None
    stages, results = [], []
    for stage in range(n_masks):
        stopped = progress.stopped
        if vectors is None or solved_for is None:
            stale = torch.ones_like(stopped)
        else:
            stale = (progress.painted != solved_for).any(1) & ~stopped
        if bool(stale.any()):
            words = _painted(bits.words, progress.painted, batch.tokens, tau < 0)
            fresh = solver.pairs(
                solver.two_valued(words, batch.tokens, low, high), 1, tol, max_iter
            )
            vectors = fresh if vectors is None else _replaced(vectors, fresh, stale)
            solved_for = progress.painted
        assert vectors is not None
        found, progress = partition.maskcut_stage(
            vectors.eigenvectors[:, 0],
            vectors.degenerate,
            grids,
            progress,
            first=stage == 0,
            iou_threshold=iou_threshold,
            min_area=min_area,
            corners=corners,
            on_reject=on_reject,
        )
        stages.append(found)
        results.append(_replaced(vectors, Vectors(*map(torch.zeros_like, vectors)), stopped))
    status = torch.stack([s.status for s in stages], 1)
    vectors = Vectors(*(torch.stack(values, 1) for values in zip(*results, strict=True)))
    if check:
        settled = vectors.converged | (status == int(MaskStatus.STOPPED))
        warn_not_converged(settled, vectors.iterations, vectors.residual[:, :, 0], tol)
    return (
        torch.stack([s.mask for s in stages], 1),
        status,
        torch.stack([s.candidate for s in stages], 1),
        torch.stack([s.seed for s in stages], 1),
        vectors.eigenvalues[:, :, 0],
        vectors.gap,
        vectors.residual[:, :, 0],
        vectors.uncertain,
        vectors.degenerate,
        vectors.converged,
        vectors.eigenvectors[:, :, 0],
    )


def _replaced(old: Vectors, new: Vectors, where: torch.Tensor) -> Vectors:
    """`new` for the images `where` [b], `old` for the others."""
    return Vectors(
        *(
            torch.where(where.view(-1, *[1] * (a.ndim - 1)), b, a)
            for a, b in zip(old, new, strict=True)
        )
    )


def _nothing(
    like: torch.Tensor, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...]
) -> tuple[torch.Tensor, ...]:
    return tuple(
        like.new_empty((0, *shape), dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )


def tokencut_fwd(
    features: list[torch.Tensor],
    grid: list[int],
    tau: float,
    eps: float,
    binary: bool,
    tol: float,
    max_iter: int,
    check: bool,
    solver: Solver = TRITON,
) -> tuple[torch.Tensor, ...]:
    if check:
        require_finite(features)
    batch = _batch(features, [])
    b, n = batch.features.shape[:2]
    if b == 0:
        shapes = ((n,), (4,), (), (n,), (n,), *[()] * 6)
        return _nothing(batch.features, shapes, _OBJECT)
    if binary:
        words = triton_affinity.affinity_pack(batch.features, batch.tokens, None, tau).words
        graph = solver.two_valued(
            words, batch.tokens, _constant(eps, batch.tokens), _constant(1.0, batch.tokens)
        )
    else:
        weights = triton_affinity.affinity_weights(batch.features, batch.tokens, tau, eps)
        graph = solver.weighted(weights, batch.tokens)
        for entry in range(b):
            require_degrees(graph.degree[entry], entry, f"tau={tau} with binary=False")
    vectors = solver.pairs(graph, 1, tol, max_iter)
    if check:
        warn_not_converged(vectors.converged, vectors.iterations, vectors.residual, tol)
    grids = _grids(batch, features, grid)
    x, lost = vectors.eigenvectors[:, 0], vectors.degenerate
    side = partition.side_of_mean(x, grids) & ~lost[:, None]
    seed = partition.largest_entry(x.abs(), grids.inside)
    mask = partition.component(side, seed, grids)
    return (
        mask,
        partition.bounding_boxes(mask, grids),
        torch.where(lost, -1, seed),
        x,
        side,
        vectors.eigenvalues[:, 0],
        vectors.gap,
        vectors.residual[:, 0],
        vectors.uncertain,
        lost,
        vectors.converged,
    )
