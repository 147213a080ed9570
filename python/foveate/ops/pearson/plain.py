"""The primitives of a stream in plain PyTorch and float64, for any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from foveate.ops.pearson.plan import Moment, Operand

COMPUTE = dict.fromkeys(("bf16", "tf32", "bf16x3", "fp32", "fp64"), torch.float64)
K_STAGE = 4096


def moments(
    maps: torch.Tensor, weights: Sequence[torch.Tensor | None], _wide: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sum, least and largest value [c] of every unit of maps [n, c, h, w]."""
    x = maps.double()
    low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    for axis, weight in zip((2, 3), weights, strict=True):
        if weight is not None:
            shape = (-1, 1) if axis == 2 else (-1,)
            x = x * weight.to(x).view(shape)
    return x.sum((0, 2, 3)), low, high


def _banded(x: torch.Tensor, matrices: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    if matrices[0] is not None:
        x = matrices[0].to(x) @ x
    if matrices[1] is not None:
        x = x @ matrices[1].to(x).mT
    return x


def stage(
    maps: torch.Tensor,
    last: bool,
    pivot: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    operands: Sequence[tuple[Operand, torch.Tensor | None]],
    moment_plans: Sequence[Moment],
    _dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `cpu.stage` does: writes the operands, returns S [m, c], Q [m, c] and max |d| [c]."""
    factor = (scale[0] * scale[1]).view(-1, 1, 1)
    d = (maps.double() - pivot.view(-1, 1, 1)) * factor  # [n, c, h, w]
    v = torch.ones(len(d), dtype=torch.float64, device=d.device) if weight is None else weight
    for operand, target in operands:
        if target is not None:
            y = _banded(d, (operand.along_h, operand.along_w)) * v.sqrt().view(-1, 1, 1, 1)
            rows = y.permute(0, 2, 3, 1).flatten(0, 2)  # [n g, c]
            target.copy_(rows if last else rows.T)
    sums, squares = [], []
    for plan in moment_plans:
        z = _banded(d, plan.shrink)
        line = z
        for axis, one in zip((2, 3), plan.weights, strict=True):
            if one is not None:
                line = line * one.to(z).view((-1, 1) if axis == 2 else (-1,))
        sums.append((line.sum((2, 3)) * v[:, None]).sum(0))
        squares.append(((z * _banded(z, plan.gram)).sum((2, 3)) * v[:, None]).sum(0))
    largest = d.abs().amax((0, 2, 3)) if d.numel() else d.new_zeros(d.shape[1])
    if not sums:
        return d.new_empty(0, d.shape[1]), d.new_empty(0, d.shape[1]), largest
    return torch.stack(sums), torch.stack(squares), largest


def multiply(
    x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, accumulate: bool, _precision: str
) -> None:
    """out (+)= x y^T."""
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
    acc.copy_(acc.double() + product.double() - torch.outer(u1, v1) + torch.outer(u2, v2))


def finalize(
    acc: torch.Tensor,
    side_a: torch.Tensor,
    side_b: torch.Tensor,
    _symmetric: bool,
    out: torch.Tensor,
) -> None:
    """out = clip(acc / (root_a root_b)), from inverse roots (float32 out) or squares (float64)."""
    factors = torch.outer(side_a, side_b)
    r = acc.double() / factors.sqrt() if out.dtype == torch.float64 else acc.double() * factors
    out.copy_(r.clamp(-1, 1))


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
    """What `cpu.topk` does, by two stable sorts of the whole matrix."""
    r = acc.double()
    if sides is not None:
        columns = torch.arange(r.shape[1], device=r.device)
        block = torch.bucketize(columns, block_start.to(r.device)[1:], right=True)
        factors = sides[0][block].T * sides[1][row_block.long()]
        r = r / factors.sqrt() if dtype == torch.float64 else r * factors
        r = r.clamp(-1, 1)
    r = r.to(dtype)
    out: list[torch.Tensor] = []
    for matrix, kk, offset in ((r, k[0], offsets[1]), (r.T, k[1], offsets[0])):
        key = matrix.abs() if by_abs else matrix
        key = torch.where(matrix.isnan(), float("-inf"), key)
        order = key.sort(dim=1, descending=True, stable=True)[1][:, :kk]
        missing = kk - order.shape[1]
        values = matrix.gather(1, order)
        index = torch.where(values.isnan(), -1, order + offset)
        values = torch.nn.functional.pad(values, (0, missing), value=float("nan"))
        out += [values, torch.nn.functional.pad(index, (0, missing), value=-1)]
    return out[0], out[1], out[2], out[3]
