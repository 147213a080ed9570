"""The state of a stream: means, variances and co-moments of two sides, in central form.

Consecutive layers of one grid form a block, the unit of products and of the state. Each unit has a
power-of-two scale 2^e, chosen when it first varies, so that squares of any magnitude stay in range.
Means and variances depend on the grid of the comparison: they are kept per block and grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

from foveate.ops.pearson.grids import Size, joint_grid
from foveate.ops.pearson.layouts import readable
from foveate.ops.pearson.matrix import side_factors
from foveate.ops.pearson.plan import exponents, moment_plan, pair_plan, power_scales

_DRIFT = 32  # binary orders by which a unit may outgrow its scale


class Block(NamedTuple):
    """Units start .. start + channels of one side, whose maps share a grid."""

    start: int
    channels: int
    grid: Size

    @property
    def units(self) -> slice:
        return slice(self.start, self.start + self.channels)


@dataclass
class SideState:
    """Units of one side; `mean` and `square` are rows [c] by block and grid, 0 where unused."""

    blocks: list[Block]
    grids: list[list[Size]]  # by block, those of its partners
    exponent: torch.Tensor  # [c] int32
    varied: torch.Tensor  # [c] bool: `exponent` is chosen
    broken: torch.Tensor  # [c] bool: a value was not finite
    mean: torch.Tensor  # [grids, c] float64
    square: torch.Tensor  # [grids, c] float64, scaled by 2^(2 e)


@dataclass
class CoMoment:
    """Co-moments of two sides; in iccv2023 the sum of the batches' scores."""

    a: SideState
    b: SideState
    acc: torch.Tensor  # [c1, c2], scaled by 2^(e_a + e_b)
    grid: Any
    resample: str
    weight: float = 0.0  # sum of the images' weights
    batches: int = 0


class _Staged(NamedTuple):
    maps: list[torch.Tensor]
    last: bool
    pivot: torch.Tensor  # [c] float64, exact in the compute precision
    scale: torch.Tensor  # [2, c]
    constant: torch.Tensor  # [c] bool, in this batch


def empty_comoment(
    blocks_a: list[Block],
    blocks_b: list[Block],
    grid: Any,
    resample: str,
    acc_dtype: torch.dtype,
    device: torch.device,
) -> CoMoment:
    """A state of no images."""
    sides = []
    for blocks, others, flip in ((blocks_a, blocks_b, False), (blocks_b, blocks_a, True)):
        grids = []
        for block in blocks:
            sizes = [(o.grid, block.grid) if flip else (block.grid, o.grid) for o in others]
            grids.append(sorted({joint_grid(grid, *pair) for pair in sizes}))
        c = blocks[-1].start + blocks[-1].channels
        depth = max(len(found) for found in grids)
        sides.append(
            SideState(
                blocks,
                grids,
                torch.zeros(c, dtype=torch.int32, device=device),
                torch.zeros(c, dtype=torch.bool, device=device),
                torch.zeros(c, dtype=torch.bool, device=device),
                torch.zeros(depth, c, dtype=torch.float64, device=device),
                torch.zeros(depth, c, dtype=torch.float64, device=device),
            )
        )
    shape = (sides[0].exponent.numel(), sides[1].exponent.numel())
    acc = torch.zeros(shape, dtype=acc_dtype, device=device)
    return CoMoment(sides[0], sides[1], acc, grid, resample)


def _block_moments(
    module: ModuleType, maps: list[torch.Tensor], wide: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    means, lows, highs = [], [], []
    for x in maps:
        total, low, high = module.moments(x, (None, None), wide)
        if bool((total.isinf() & low.isfinite() & high.isfinite()).any()):
            total, low, high = module.moments(x, (None, None), True)
        means.append(total / (x.shape[0] * x.shape[2] * x.shape[3]))
        lows.append(low)
        highs.append(high)
    return torch.cat(means), torch.cat(lows), torch.cat(highs)


def _rescale(state: CoMoment, side: SideState, units: slice, change: torch.Tensor) -> None:
    """Multiply the state of `units` by 2^change, exactly."""
    if not bool(change.any()):
        return
    side.square[:, units] = torch.ldexp(side.square[:, units], 2 * change)
    if side is state.a:
        state.acc[units] = torch.ldexp(state.acc[units], change[:, None])
    else:
        state.acc[:, units] = torch.ldexp(state.acc[:, units], change)
    side.exponent[units] += change


def _stage_block(
    module: ModuleType,
    state: CoMoment,
    side: SideState,
    index: int,
    maps: list[torch.Tensor],
    compute: torch.dtype,
    fixed: torch.Tensor | None,
) -> _Staged:
    """Pivots and scales of one block's batch. `fixed` means belong to iccv2023."""
    units = side.blocks[index].units
    mean, low, high = _block_moments(module, maps, compute == torch.float64)
    broken = ~mean.isfinite()
    constant = (low == high) & ~broken
    centre = torch.where(constant, low, mean) if fixed is None else fixed[units]
    pivot = torch.where(broken, 0.0, centre).to(compute).double()
    reach = torch.maximum(high - pivot, pivot - low)
    readings = [readable(maps[0])]
    readings += [readable(x, readings[0][1]) for x in maps[1:]]
    staged, last = [x for x, _ in readings], readings[0][1]
    if fixed is not None:
        rounding = 16 * torch.finfo(compute).eps * pivot.abs()
        scale = power_scales(exponents(reach)).factors
        return _Staged(staged, last, pivot, scale, constant & (reach <= rounding))
    side.broken[units] |= broken
    if state.weight > 0:
        for row in range(len(side.grids[index])):
            reach = torch.maximum(reach, (pivot - side.mean[row, units]).abs())
    varies = (reach > 0) & reach.isfinite()
    wanted, own = exponents(reach), side.exponent[units]
    first = varies & ~side.varied[units]
    grown = varies & side.varied[units] & (wanted < own - _DRIFT)
    _rescale(state, side, units, torch.where(first | grown, wanted - own, 0).int())
    side.varied[units] |= varies
    scale = power_scales(side.exponent[units]).factors
    return _Staged(staged, last, pivot, scale, constant)


def update(
    module: ModuleType,
    state: CoMoment,
    maps_a: list[list[torch.Tensor]],
    maps_b: list[list[torch.Tensor]],
    weight: torch.Tensor | None,
    means: tuple[torch.Tensor, torch.Tensor] | None,
    precision: str,
    wide: bool,
    k_stage: int | None,
) -> None:
    """Adds one batch: by block, the layers' maps [n, c, h, w]; weight [n] float64 or None."""
    n = maps_a[0][0].shape[0]
    mass = float(n) if weight is None else float(weight.sum())
    compute = torch.float64 if wide else module.COMPUTE[precision]
    fixed = (None, None) if means is None else means
    sides = (state.a, state.b)
    staged = [
        [
            _stage_block(module, state, side, i, maps, compute, centre)
            for i, maps in enumerate(blocks)
        ]
        for side, blocks, centre in zip(sides, (maps_a, maps_b), fixed, strict=True)
    ]
    sums = _batch_moments(module, state, staged, weight, compute)
    shifts = []
    for side, blocks, found in zip(sides, staged, sums, strict=True):
        shift = torch.zeros_like(side.mean)
        for i, (block, part) in enumerate(zip(side.blocks, blocks, strict=True)):
            for row, grid in enumerate(side.grids[i]):
                samples = mass * grid[0] * grid[1]
                offset = torch.ldexp(found[i][0][row] / samples, -side.exponent[block.units])
                shift[row, block.units] = part.pivot + offset - side.mean[row, block.units]
        shifts.append(shift)
    k_stage = k_stage or module.K_STAGE
    _products(module, state, staged, sums, shifts, weight, mass, compute, precision, means, k_stage)
    state.batches += 1
    total = state.weight + mass
    if means is None:
        for side, found, shift in zip(sides, sums, shifts, strict=True):
            for i, block in enumerate(side.blocks):
                for row, grid in enumerate(side.grids[i]):
                    cells = grid[0] * grid[1]
                    s, q = found[i][0][row], found[i][1][row]
                    own = (q - s * s / (mass * cells)).clamp(min=0)
                    own = torch.where(own <= 1e-10 * q, 0.0, own)  # constant on this grid alone
                    d = torch.ldexp(shift[row, block.units], side.exponent[block.units])
                    between = cells * state.weight * mass / total * d * d
                    side.square[row, block.units] += own + between
            side.mean += shift * (mass / total)
    state.weight = total


def _batch_moments(
    module: ModuleType,
    state: CoMoment,
    staged: list[list[_Staged]],
    weight: torch.Tensor | None,
    compute: torch.dtype,
) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """S and Q [grids, c] of every block, of the scaled deviations from the pivots."""
    found = []
    for side, blocks in zip((state.a, state.b), staged, strict=True):
        rows = []
        for block, grids, part in zip(side.blocks, side.grids, blocks, strict=True):
            plans = [moment_plan(block.grid, grid, state.resample) for grid in grids]
            sums, squares, at = [], [], 0
            for x in part.maps:
                units = slice(at, at + x.shape[1])
                at = units.stop
                s, q, _ = module.stage(
                    x,
                    part.last,
                    part.pivot[units],
                    part.scale[:, units].contiguous(),
                    weight,
                    [],
                    plans,
                    compute,
                )
                sums.append(s)
                squares.append(q)
            rows.append((torch.cat(sums, 1), torch.cat(squares, 1)))
        found.append(rows)
    return found


def _products(
    module: ModuleType,
    state: CoMoment,
    staged: list[list[_Staged]],
    sums: list[list[tuple[torch.Tensor, torch.Tensor]]],
    shifts: list[torch.Tensor],
    weight: torch.Tensor | None,
    mass: float,
    compute: torch.dtype,
    precision: str,
    means: Any,
    k_stage: int,
) -> None:
    """Every pair of blocks: products of runs of images, folded into the co-moments."""
    n = staged[0][0].maps[0].shape[0]
    smallest = min(b.grid[0] * b.grid[1] for s in (state.a, state.b) for b in s.blocks)
    run = max(1, k_stage // smallest)
    share = state.weight * mass / (state.weight + mass)
    chunks = range(0, n, run)
    memory: dict[Any, torch.Tensor] = {}
    for i, block_a in enumerate(state.a.blocks):
        for j, block_b in enumerate(state.b.blocks):
            joint = joint_grid(state.grid, block_a.grid, block_b.grid)
            plan = pair_plan(block_a.grid, block_b.grid, joint, state.resample)
            product = state.acc.new_empty((block_a.channels, block_b.channels), dtype=compute)
            wide: torch.Tensor | None = None
            for begin in chunks:
                count = min(run, n - begin)
                pair = []
                for key, block, part, operand in (
                    ("a", block_a, staged[0][i], plan.a),
                    ("b", block_b, staged[1][j], plan.b),
                ):
                    at = (key, block.start, operand.key, plan.grid, begin)
                    if at not in memory:
                        memory[at] = _operand(
                            module, block, part, operand, weight, begin, count, compute
                        )
                    pair.append(memory[at])
                module.multiply(pair[0], pair[1], product, False, precision)
                if len(chunks) > 1:
                    wide = product.double() if wide is None else wide.add_(product)
            done = product if wide is None else wide
            row_a = state.a.grids[i].index(joint)
            row_b = state.b.grids[j].index(joint)
            (s_a, q_a), (s_b, q_b) = (
                (found[0][row], found[1][row])
                for found, row in ((sums[0][i], row_a), (sums[1][j], row_b))
            )
            target = state.acc[block_a.units, block_b.units]
            if means is not None:
                still = (staged[0][i].constant, staged[1][j].constant)
                target += _scores(done, q_a, q_b, still).to(target.dtype)
                continue
            cells = joint[0] * joint[1]
            d_a = torch.ldexp(shifts[0][row_a, block_a.units], state.a.exponent[block_a.units])
            d_b = torch.ldexp(shifts[1][row_b, block_b.units], state.b.exponent[block_b.units])
            module.fold(target, done, s_a / (mass * cells), s_b, d_a * (share * cells), d_b)


def _operand(
    module: ModuleType,
    block: Block,
    part: _Staged,
    operand: Any,
    weight: torch.Tensor | None,
    begin: int,
    count: int,
    compute: torch.dtype,
) -> torch.Tensor:
    """One side [c, K] of a product, whatever its memory."""
    points = count * operand.grid[0] * operand.grid[1]
    shape = (points, block.channels) if part.last else (block.channels, points)
    buffer = part.maps[0].new_empty(shape, dtype=compute)
    at = 0
    images = slice(begin, begin + count)
    for x in part.maps:
        units = slice(at, at + x.shape[1])
        at = units.stop
        module.stage(
            x[images],
            part.last,
            part.pivot[units],
            part.scale[:, units].contiguous(),
            None if weight is None else weight[images],
            [(operand, buffer[:, units] if part.last else buffer[units])],
            [],
            compute,
        )
    return buffer.T if part.last else buffer


def _scores(
    product: torch.Tensor,
    q_a: torch.Tensor,
    q_b: torch.Tensor,
    still: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """<x, y> / sqrt(<x, x> <y, y>) of one batch in float64, 0 where it is not finite."""
    factors = [
        torch.where((q > 0) & q.isfinite() & ~constant, q, float("nan")).rsqrt()
        for q, constant in ((q_a, still[0]), (q_b, still[1]))
    ]
    score = product.double() * factors[0][:, None] * factors[1]
    return torch.where(score.isfinite(), score, 0.0)


def factors(
    state: CoMoment, mode: str, constant: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """What finalize and topk take: [blocks of b, c1] and [blocks of a, c2]."""
    sides = []
    for side, others, flip in ((state.a, state.b, False), (state.b, state.a, True)):
        rows = []
        for other in others.blocks:
            values = []
            for i, block in enumerate(side.blocks):
                sizes = (other.grid, block.grid) if flip else (block.grid, other.grid)
                row = side.grids[i].index(joint_grid(state.grid, *sizes))
                values.append(side.square[row, block.units])
            square = torch.where(side.broken, float("nan"), torch.cat(values))
            if mode == "iccv2023":
                batches = float(state.batches) if not flip else 1.0
                square = torch.full_like(square, batches * batches)
            rows.append(side_factors(square, constant, dtype))
        sides.append(torch.stack(rows).contiguous())
    return sides[0], sides[1]


def finalize(
    module: ModuleType, state: CoMoment, mode: str, constant: str, out: torch.Tensor
) -> torch.Tensor:
    """r [c1, c2] into `out`."""
    side_a, side_b = factors(state, mode, constant, out.dtype)
    for i, block_a in enumerate(state.a.blocks):
        for j, block_b in enumerate(state.b.blocks):
            module.finalize(
                state.acc[block_a.units, block_b.units],
                side_a[j, block_a.units].contiguous(),
                side_b[i, block_b.units].contiguous(),
                False,
                out[block_a.units, block_b.units],
            )
    return out


def topk(
    module: ModuleType,
    state: CoMoment,
    mode: str,
    constant: str,
    k: tuple[int, int],
    by: str,
    rows: tuple[int, int],
    cols: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """The best k of both sides' units in the ranges, without the matrix."""
    side_a, side_b = factors(state, mode, constant, dtype)
    touched = [j for j, b in enumerate(state.b.blocks) if _overlaps(b, cols)]
    starts = [max(state.b.blocks[j].start, cols[0]) - cols[0] for j in touched]
    block_start = torch.tensor([*starts, cols[1] - cols[0]])
    row_block = torch.zeros(state.acc.shape[0], dtype=torch.int32)
    for i, block in enumerate(state.a.blocks):
        row_block[block.units] = i
    found: tuple[torch.Tensor, ...] = module.topk(
        state.acc[rows[0] : rows[1], cols[0] : cols[1]],
        (
            side_a[touched][:, rows[0] : rows[1]].contiguous(),
            side_b[:, cols[0] : cols[1]].contiguous(),
        ),
        block_start,
        row_block[rows[0] : rows[1]].to(state.acc.device).contiguous(),
        by == "abs",
        dtype,
        (rows[0], cols[0]),
        k,
    )
    return found


def _overlaps(block: Block, span: tuple[int, int]) -> bool:
    return block.start < span[1] and block.start + block.channels > span[0]


def merge(module: ModuleType, state: CoMoment, other: CoMoment, iccv: bool) -> None:
    """state := the state of both streams; `other` is left as it is."""
    if other.batches == 0:
        return
    state.batches += other.batches
    if iccv:
        state.acc += other.acc
        state.weight += other.weight
        return
    pairs = ((state.a, other.a), (state.b, other.b))
    for own, new in pairs:
        everything = slice(0, own.exponent.numel())
        apart = torch.zeros_like(own.varied)
        if state.weight > 0:
            apart = ((own.mean - new.mean) != 0).any(0)
        adopt = ~own.varied & (new.varied | apart)
        wanted = torch.where(new.varied, new.exponent, 0)
        gap = exponents((own.mean - new.mean).abs().amax(0))
        wanted = torch.where(apart & (~new.varied | (gap < wanted - _DRIFT)), gap, wanted)
        outgrown = own.varied & (wanted < own.exponent - _DRIFT) & (new.varied | apart)
        change = torch.where(adopt | outgrown, wanted - own.exponent, 0).int()
        _rescale(state, own, everything, change)
        own.varied |= adopt
        own.broken |= new.broken
    total = state.weight + other.weight
    moved = [own.exponent - new.exponent for own, new in pairs]
    shifted = torch.ldexp(other.acc.double(), moved[0][:, None] + moved[1])
    share = state.weight * other.weight / total
    for i, block_a in enumerate(state.a.blocks):
        for j, block_b in enumerate(state.b.blocks):
            joint = joint_grid(state.grid, block_a.grid, block_b.grid)
            d = []
            for (own, new), index, block in ((pairs[0], i, block_a), (pairs[1], j, block_b)):
                row = own.grids[index].index(joint)
                gap = new.mean[row, block.units] - own.mean[row, block.units]
                d.append(torch.ldexp(gap, own.exponent[block.units]))
            zeros = [torch.zeros_like(part) for part in d]
            module.fold(
                state.acc[block_a.units, block_b.units],
                shifted[block_a.units, block_b.units],
                *zeros,
                d[0] * (share * joint[0] * joint[1]),
                d[1],
            )
    for (own, new), change in zip(pairs, moved, strict=True):
        cells = torch.zeros_like(own.square)
        for block, grids in zip(own.blocks, own.grids, strict=True):
            for row, grid in enumerate(grids):
                cells[row, block.units] = grid[0] * grid[1]
        gap = new.mean - own.mean
        between = share * cells * torch.ldexp(gap, own.exponent) ** 2
        own.square += torch.ldexp(new.square, 2 * change) + between
        own.mean += gap * (other.weight / total)
    state.weight = total
