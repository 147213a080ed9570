"""From eigenvectors to masks for many images at once, in tensor operations.

The same rules as partition.py, which states them for one image. Vectors are `[b, n]`; an image with
fewer tokens than n is padded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from foveate.ops.ncut.results import MaskStatus

TIE = 1e-9  # entries that differ by less, relative to the largest, are tied
_LOOK_EVERY = 4  # sweeps of the component search between two looks at whether it has ended


class Grids(NamedTuple):
    """The token grids of b images, and the two orders in which a component is swept."""

    height: torch.Tensor  # [b] int64
    width: torch.Tensor  # [b] int64
    tokens: torch.Tensor  # [b] int64, height * width
    inside: torch.Tensor  # [b, n] bool, False at padding
    starts_row: torch.Tensor  # [b, n] bool, a token that begins a row
    starts_column: torch.Tensor  # [b, n] bool, the same in column-major order
    to_columns: torch.Tensor  # [b, n] int64, token of each column-major place
    to_rows: torch.Tensor  # [b, n] int64, column-major place of each token


def grids(height: torch.Tensor, width: torch.Tensor, n: int) -> Grids:
    """The grids of `[b]` heights and widths, padded to n tokens."""
    place = torch.arange(n, device=height.device)[None]
    h, w, tokens = height[:, None], width[:, None], (height * width)[:, None]
    inside = place < tokens
    return Grids(
        height,
        width,
        tokens[:, 0],
        inside,
        place % w == 0,
        place % h == 0,
        torch.where(inside, place % h * w + place // h, place),
        torch.where(inside, place % w * h + place // w, place),
    )


def largest_entry(score: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Index of the largest entry of each `[b, n]`, `[b]`; of tied ones the lowest."""
    score = torch.where(inside, score, -torch.inf)
    top = score.amax(1, keepdim=True)
    return (score >= top - TIE * top.abs()).to(torch.uint8).argmax(1)


def side_of_mean(x: torch.Tensor, grid: Grids) -> torch.Tensor:
    """x > mean(x), bool `[b, n]`, False at padding."""
    mean = (x * grid.inside).sum(1, keepdim=True) / grid.tokens[:, None]
    return (x > mean) & grid.inside


def component(side: torch.Tensor, seed: torch.Tensor, grid: Grids) -> torch.Tensor:
    """The 4-connected component of `side` [b, n] that holds `seed` [b]."""
    found = torch.zeros_like(side)
    found.scatter_(1, seed[:, None], side.gather(1, seed[:, None]))
    turned = side.gather(1, grid.to_columns)
    while True:
        before = found
        for _ in range(_LOOK_EVERY):
            found = _along_runs(found, side, grid.starts_row)
            columns = _along_runs(found.gather(1, grid.to_columns), turned, grid.starts_column)
            found = columns.gather(1, grid.to_rows)
        if torch.equal(before, found):
            return found


def _along_runs(found: torch.Tensor, side: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """`found` extended over each run of `side` that it touches; a run ends before `starts`."""
    ends = torch.nn.functional.pad(starts[:, 1:], (0, 1), value=True)
    forward = _onward(found, side, starts)
    backward = _onward(found.flip(1), side.flip(1), ends.flip(1)).flip(1)
    return forward | backward


def _onward(found: torch.Tensor, side: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    place = 2 * torch.arange(side.shape[1], device=side.device)
    barrier = torch.where(side, torch.where(starts, place - 1, -1), place + 1)
    reached = torch.where(found, place, -2)
    return side & (torch.cummax(reached, 1).values > torch.cummax(barrier, 1).values)


def corners_held(side: torch.Tensor, grid: Grids) -> torch.Tensor:
    """How many of its grid's four corners each `side` [b, n] holds, `[b]`."""
    last_row = (grid.height - 1) * grid.width
    at = torch.stack([torch.zeros_like(last_row), grid.width - 1, last_row, grid.tokens - 1], 1)
    return side.gather(1, at).sum(1)


def candidate_masks(
    x: torch.Tensor, grid: Grids, corners: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """MaskCut's candidates [b, n] and their seeds [b] (CutLER, CVPR 2023, section 3.2)."""
    side = side_of_mean(x, grid)
    seed = largest_entry(x.abs(), grid.inside)
    if corners:
        reversed_ = corners_held(side, grid) >= corners
        side = (side ^ reversed_[:, None]) & grid.inside
        seed = torch.where(reversed_, largest_entry(-x, grid.inside), seed)
    return component(side, seed, grid), seed


def bounding_boxes(mask: torch.Tensor, grid: Grids) -> torch.Tensor:
    """(x0, y0, x1, y1) of each mask [b, n] in tokens, half-open; zeros for an empty one."""
    place = torch.arange(mask.shape[1], device=mask.device)[None]
    x, y = place % grid.width[:, None], place // grid.width[:, None]
    far = mask.shape[1]
    box = torch.stack(
        [
            torch.where(mask, x, far).amin(1),
            torch.where(mask, y, far).amin(1),
            torch.where(mask, x, -1).amax(1) + 1,
            torch.where(mask, y, -1).amax(1) + 1,
        ],
        1,
    )
    return torch.where(mask.any(1)[:, None], box, 0)


class Progress(NamedTuple):
    """What MaskCut's next stage depends on."""

    painted: torch.Tensor  # [b, n] bool, tokens of accepted candidates
    previous: torch.Tensor  # [b, n] bool, the candidate the next one must not overlap
    used: torch.Tensor  # [b, n] bool, tokens of earlier masks
    stopped: torch.Tensor  # [b] bool


class Stage(NamedTuple):
    """One MaskCut stage of b images."""

    mask: torch.Tensor  # [b, n] bool
    status: torch.Tensor  # [b] int64
    candidate: torch.Tensor  # [b, n] bool
    seed: torch.Tensor  # [b] int64


def maskcut_stage(
    x: torch.Tensor,
    degenerate: torch.Tensor,
    grid: Grids,
    progress: Progress,
    *,
    first: bool,
    iou_threshold: float,
    min_area: float,
    corners: int,
    on_reject: str,
) -> tuple[Stage, Progress]:
    """What one stage makes of the eigenvectors `x` [b, n], and the state it leaves.

    Args:
        x: `[b, n]` with canonical sign.
        degenerate: `[b]`.
        grid: the token grids.
        progress: the state before the stage.
        first: whether it is stage 0, which has neither of the two tests.
        iou_threshold: a candidate that overlaps the one before it by more is rejected.
        min_area: a candidate whose fraction of the tokens is at most this is rejected.
        corners: number of foreground corners that reverses a partition; 0: never.
        on_reject: "retry", "stop" or "skip".
    """
    painted, previous, used, stopped = progress
    nothing = degenerate | stopped
    candidate, seed = candidate_masks(x, grid, corners)
    candidate = candidate & ~nothing[:, None]
    seed = torch.where(nothing, -1, seed)
    overlap, small = torch.zeros_like(stopped), torch.zeros_like(stopped)
    if not first:
        union = (previous | candidate).sum(1)
        common = (previous & candidate).sum(1).double()
        overlap = (union > 0) & (common / union.clamp_min(1) > iou_threshold)
        small = candidate.sum(1).double() / grid.tokens <= min_area
    mask = candidate & ~used
    status = torch.where(mask.any(1), int(MaskStatus.OK), int(MaskStatus.COVERED))
    status = torch.where(small, int(MaskStatus.SMALL), status)
    status = torch.where(overlap, int(MaskStatus.OVERLAP), status)
    status = torch.where(degenerate, int(MaskStatus.DEGENERATE), status)
    status = torch.where(stopped, int(MaskStatus.STOPPED), status)
    accepted = (status == int(MaskStatus.OK)) | (status == int(MaskStatus.COVERED))
    taken = candidate & accepted[:, None]
    stage = Stage(mask & accepted[:, None], status, candidate, seed)
    used = used | taken
    if on_reject == "skip":
        return stage, Progress(painted | candidate, candidate, used, stopped)
    if on_reject == "stop":
        stopped = stopped | ~accepted
    return stage, Progress(painted | taken, taken, used, stopped)
