"""From an eigenvector to masks: sign, seed, side, corners, component; the stages of MaskCut.

Plain PyTorch for one image, on any device; it looks at values. Backends whose kernels do not
partition use it as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from foveate.ops.ncut.results import MaskStatus, NCutResult

TIE = 1e-9  # entries that differ by less, relative to the largest, are tied


def largest_entry(x: torch.Tensor) -> int:
    """Index of the largest entry of `[n]`; of tied ones (to 1e-9, relative) the lowest."""
    top = x.max()
    return int((x >= top - TIE * top.abs()).nonzero()[0])


def with_sign(x: torch.Tensor) -> torch.Tensor:
    """`x` or `-x`, such that its entry largest in magnitude is positive."""
    return -x if float(x[largest_entry(x.abs())]) < 0 else x


def component(side: torch.Tensor, seed: int, grid: tuple[int, int]) -> torch.Tensor:
    """The 4-connected component of `side` `[n]` that holds `seed`, bool `[n]`."""
    h, w = grid
    side = side.view(h, w)
    found = torch.zeros_like(side)
    found[seed // w, seed % w] = True
    while True:
        grown = found.clone()
        grown[1:] |= found[:-1]
        grown[:-1] |= found[1:]
        grown[:, 1:] |= found[:, :-1]
        grown[:, :-1] |= found[:, 1:]
        grown &= side
        if torch.equal(grown, found):
            return found.flatten()
        found = grown


def corners_held(side: torch.Tensor, grid: tuple[int, int]) -> int:
    """How many of the grid's four corners `side` `[n]` holds; a corner of a line counts twice."""
    h, w = grid
    return int(side[[0, w - 1, (h - 1) * w, h * w - 1]].sum())


def bounding_box(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(x0, y0, x1, y1) of `mask` `[n]` in tokens, half-open, int64; zeros for an empty mask."""
    cells = mask.view(grid).nonzero()  # [area, 2]
    if cells.shape[0] == 0:
        return torch.zeros(4, dtype=torch.int64, device=mask.device)
    low, high = cells.amin(0), cells.amax(0) + 1
    return torch.stack([low[1], low[0], high[1], high[0]])


class Stages(NamedTuple):
    """MaskCut of one image, fields `[n_masks, ..]` as the raw op maskcut_fwd returns them."""

    masks: torch.Tensor
    status: torch.Tensor
    candidates: torch.Tensor
    seeds: torch.Tensor
    eigenvalues: torch.Tensor
    gap: torch.Tensor
    residual: torch.Tensor
    uncertain: torch.Tensor
    degenerate: torch.Tensor
    converged: torch.Tensor
    eigenvectors: torch.Tensor
    iterations: torch.Tensor


def candidate_mask(
    x: torch.Tensor,
    grid: tuple[int, int],
    corners: int,
    connected: Callable[[torch.Tensor, int, tuple[int, int]], torch.Tensor] = component,
) -> tuple[torch.Tensor, int]:
    """MaskCut's candidate `[n]` and its seed: a component of the side that avoids the corners.

    Source: CutLER (CVPR 2023), section 3.2; the sign is canonical, see the page of the family.
    """
    side = x > x.mean()
    seed = largest_entry(x.abs())
    if corners and corners_held(side, grid) >= corners:
        side, seed = ~side, largest_entry(-x)
    return connected(side, seed, grid), seed


def maskcut_stages(
    solve: Callable[[torch.Tensor], NCutResult],
    grid: tuple[int, int],
    n_masks: int,
    iou_threshold: float,
    min_area: float,
    corners: int,
    on_reject: str,
    device: torch.device,
    connected: Callable[[torch.Tensor, int, tuple[int, int]], torch.Tensor] = component,
) -> Stages:
    """The stages of MaskCut on one image.

    Args:
        solve: from the painted tokens, bool `[n]`, to the unbatched result with k = 1.
        grid: (h, w).
        n_masks: number of stages.
        iou_threshold: a candidate that overlaps the one before it by more is rejected.
        min_area: a candidate whose fraction of the tokens is at most this is rejected.
        corners: number of foreground corners that reverses a partition; 0: never.
        on_reject: "retry", "stop" or "skip".
        device: where the image is.
        connected: `component`, or a backend's own.
    """
    n = grid[0] * grid[1]
    nothing = torch.zeros(n, dtype=torch.bool, device=device)
    painted = previous = used = nothing
    masks, candidates, statuses, seeds, results = [], [], [], [], []
    result: NCutResult | None = None
    for stage in range(n_masks):
        result = solve(painted) if result is None else result
        candidate, seed = nothing, -1
        if bool(result.degenerate):
            status = MaskStatus.DEGENERATE
        else:
            candidate, seed = candidate_mask(result.eigenvectors[0], grid, corners, connected)
            status = MaskStatus.OK
            union = int((previous | candidate).sum())
            common = int((previous & candidate).sum())
            if stage > 0 and union > 0 and common / union > iou_threshold:
                status = MaskStatus.OVERLAP
            elif stage > 0 and int(candidate.sum()) / n <= min_area:
                status = MaskStatus.SMALL
        mask = nothing
        results.append(result)
        if status == MaskStatus.OK:
            mask = candidate & ~used
            if not bool(mask.any()):
                status = MaskStatus.COVERED
            used = used | candidate
        masks.append(mask)
        candidates.append(candidate)
        statuses.append(status)
        seeds.append(seed)
        rejected = status not in (MaskStatus.OK, MaskStatus.COVERED)
        if rejected and on_reject == "stop":
            break
        if rejected and on_reject == "retry":
            previous = nothing
        else:
            repainted = painted | candidate
            if not torch.equal(repainted, painted):
                painted, result = repainted, None
            previous = candidate
    left = n_masks - len(results)
    return Stages(
        torch.stack(masks + [nothing] * left),
        torch.tensor([*map(int, statuses)] + [int(MaskStatus.STOPPED)] * left, device=device),
        torch.stack(candidates + [nothing] * left),
        torch.tensor(seeds + [-1] * left, device=device),
        _stage_values([r.eigenvalues[0] for r in results], left),
        _stage_values([r.gap for r in results], left),
        _stage_values([r.residual[0] for r in results], left),
        _stage_values([r.uncertain for r in results], left),
        _stage_values([r.degenerate for r in results], left),
        _stage_values([r.converged for r in results], left),
        _stage_values([r.eigenvectors[0] for r in results], left),
        _stage_values([r.iterations for r in results], left),
    )


def _stage_values(values: list[torch.Tensor], left: int) -> torch.Tensor:
    """`values` stacked, then zeros for the `left` stages that were not tried."""
    return torch.stack(values + [torch.zeros_like(values[0])] * left)


class Object(NamedTuple):
    """TokenCut of one image, fields as the raw op tokencut_fwd returns them, without b."""

    foreground: torch.Tensor
    mask: torch.Tensor
    box: torch.Tensor
    seed: torch.Tensor


def tokencut_object(
    result: NCutResult,
    grid: tuple[int, int],
    connected: Callable[[torch.Tensor, int, tuple[int, int]], torch.Tensor] = component,
) -> Object:
    """The side of the mean that holds the seed, and the seed's component of it.

    `connected` is `component`, or a backend's own. Source: TokenCut (CVPR 2022), section 3.
    """
    x = result.eigenvectors[0]
    if bool(result.degenerate):
        nothing = torch.zeros_like(x, dtype=torch.bool)
        box = torch.zeros(4, dtype=torch.int64, device=x.device)
        return Object(nothing, nothing, box, torch.tensor(-1, device=x.device))
    side = x > x.mean()
    seed = largest_entry(x.abs())
    mask = connected(side, seed, grid)
    return Object(side, mask, bounding_box(mask, grid), torch.tensor(seed, device=x.device))
