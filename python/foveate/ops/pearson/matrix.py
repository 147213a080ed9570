"""The correlation matrix of one pair of layers and its gradient, on any backend's primitives."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch

from foveate.ops.pearson.grids import Size, gram_matrix
from foveate.ops.pearson.layouts import readable
from foveate.ops.pearson.plan import Moment, Operand, exponents, pair_plan, power_scales
from foveate.ops.pearson.policies import checked_images

_TILES = 8  # row tiles of a product with itself: (8 + 1) / 16 of the work
_EXACT_CHUNKS = 16  # products summed in the compute precision before float64 takes over


class Side(NamedTuple):
    """One side, ready to be staged."""

    maps: torch.Tensor
    last: bool
    operand: Operand
    moment: Moment
    pivot: torch.Tensor  # [c] float64, exact in the compute precision
    scale: torch.Tensor  # [2, c]
    exponent: torch.Tensor  # [c] int32
    constant: torch.Tensor  # [c] bool
    broken: torch.Tensor  # [c] bool: a value is not finite, also one that no resized point reads


def _side(
    backend: ModuleType,
    maps: torch.Tensor,
    operand: Operand,
    moment: Moment,
    joint: Size,
    dtype: torch.dtype,
) -> Side:
    maps, last = readable(maps)
    samples = maps.shape[0] * joint[0] * joint[1]
    weights = tuple(
        matrix.sum(0) if matrix is not None else weight
        for matrix, weight in zip(moment.shrink, moment.weights, strict=True)
    )
    total, low, high = backend.moments(maps, weights, dtype == torch.float64)
    overflow = total.isinf() & low.isfinite() & high.isfinite()
    if bool(overflow.any()):
        total, low, high = backend.moments(maps, weights, True)
    constant = low == high
    if moment.shrink != (None, None):
        # A shrinking axis skips values: only what the joint grid reads may set the scale.
        small = Operand(*moment.shrink, joint, ())
        read = _apply(maps.double(), small).transpose(0, 1).flatten(1)  # [c, K]
        low, high = read.amin(1), read.amax(1)
        constant = constant | (low == high)
    mean = torch.where(constant, low, total / samples)
    pivot = torch.where(mean.isfinite(), mean, 0.0).to(dtype).double()
    exponent = exponents(torch.maximum(high - pivot, pivot - low))
    scale = power_scales(exponent).factors
    return Side(maps, last, operand, moment, pivot, scale, exponent, constant, ~total.isfinite())


def forward(
    backend: ModuleType,
    a: torch.Tensor,
    b: torch.Tensor,
    same: bool,
    precision: str,
    joint: Size,
    resample: str,
    nan_policy: str,
    constant: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """r [c1, c2], (mean, root of the sum of squares) [2, c] of each side, and images kept [n]."""
    keep = checked_images(a, b, nan_policy)
    if nan_policy == "omit" and not bool(keep.all()):
        a, b = a[keep], b[keep]
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    compute = backend.COMPUTE[precision]
    plan = pair_plan(tuple(a.shape[2:]), tuple(b.shape[2:]), joint, resample)
    n = a.shape[0]
    c1, c2 = a.shape[1], b.shape[1]
    samples = n * joint[0] * joint[1]
    sides = [_side(backend, a, plan.a, plan.moment_a, joint, compute)]
    if not same:
        sides.append(_side(backend, b, plan.b, plan.moment_b, joint, compute))
    cells = plan.grid[0] * plan.grid[1]
    images = max(1, backend.K_STAGE // cells)
    buffers = [
        side.maps.new_empty(
            (min(images, n) * cells, side.maps.shape[1])
            if side.last
            else (side.maps.shape[1], min(images, n) * cells),
            dtype=compute,
        )
        for side in sides
    ]
    product = a.new_empty((c1, c2), dtype=compute)
    acc: torch.Tensor | None = None
    sums = [torch.zeros(2, s.maps.shape[1], dtype=torch.float64, device=a.device) for s in sides]
    pending = 0
    for begin in range(0, n, images):
        count = min(images, n - begin)
        operands = []
        for side, buffer, total in zip(sides, buffers, sums, strict=True):
            dst = buffer[: count * cells] if side.last else buffer[:, : count * cells]
            s, q, _ = backend.stage(
                side.maps[begin : begin + count],
                side.last,
                side.pivot,
                side.scale,
                None,
                [(side.operand, dst)],
                [side.moment],
                compute,
            )
            total += torch.stack([s[0], q[0]])
            operands.append(dst.T if side.last else dst)
        _product(backend, operands[0], operands[-1], product, pending > 0, same, precision)
        pending += 1
        if pending == _EXACT_CHUNKS and begin + count < n:
            acc = _added(acc, product)
            pending = 0
    if acc is not None:
        product = _added(acc, product)
    statistics, scaled = [], []
    for side, total in zip(sides, sums, strict=True):
        mean = side.pivot + torch.ldexp(total[0] / samples, -side.exponent)
        square = total[1] - total[0] ** 2 / samples
        # What rounding leaves of a unit that is constant on the joint grid alone.
        still = side.constant | (square <= 1e-10 * total[1]) | (samples == 1)
        square = torch.where(still & square.isfinite(), 0.0, square)
        broken = side.broken | ~square.isfinite()
        square = torch.where(broken, float("nan"), square)
        mean = torch.where(broken, float("nan"), mean)
        statistics.append(torch.stack([mean, torch.ldexp(square.sqrt(), -side.exponent)]))
        scaled.append((square, total[0]))
    shifts = [_largest(s.abs() / (q * samples).sqrt()) for q, s in scaled]
    if shifts[0] * shifts[-1] > 1e-9:
        zeros = torch.zeros(max(c1, c2), dtype=torch.float64, device=a.device)
        corrected = torch.zeros((c1, c2), dtype=torch.float64, device=a.device)
        first, second = scaled[0][1] / samples, scaled[-1][1].contiguous()
        backend.fold(corrected, product, first, second, zeros, zeros)
        product = corrected
    factors = [side_factors(q, constant, dtype) for q, _ in scaled]
    r = a.new_empty((c1, c2), dtype=dtype)
    backend.finalize(product, factors[0], factors[-1], same, r)
    return r, statistics[0], statistics[-1].clone() if same else statistics[1], keep


def _largest(values: torch.Tensor) -> float:
    values = values[values.isfinite()]
    return float(values.max()) if values.numel() else 0.0


def _added(acc: torch.Tensor | None, product: torch.Tensor) -> torch.Tensor:
    return product.double() if acc is None else acc.add_(product)


def _product(
    backend: ModuleType,
    x: torch.Tensor,
    y: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
    same: bool,
    precision: str,
) -> None:
    c = x.shape[0]
    if not same or c < 2 * _TILES:
        backend.multiply(x, y, out, accumulate, precision)
        return
    step = -(-c // _TILES)
    for i in range(0, c, step):
        backend.multiply(x[i : i + step], y[i:], out[i : i + step, i:], accumulate, precision)


def side_factors(square: torch.Tensor, constant: str, dtype: torch.dtype) -> torch.Tensor:
    """What finalize takes for sums of squares: inverse roots, or for float64 the squares.

    A unit without variance gets what makes its r NaN, or 0 for "zero"; NaN stays.
    """
    still = square == 0
    if dtype == torch.float64:
        return torch.where(still, float("inf") if constant == "zero" else float("nan"), square)
    inverse = square.rsqrt()
    return torch.where(still, 0.0 if constant == "zero" else float("nan"), inverse)


def backward(
    grad: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    r: torch.Tensor,
    side_a: torch.Tensor,
    side_b: torch.Tensor,
    keep: torch.Tensor,
    joint: Size,
    resample: str,
    constant: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dL/da and dL/db: one product each on the small grid, and one adjoint of its result.

    dL/da_i = [R_a^T R_b sum_j g_ij y_j - (sum_j g_ij r_ij) R_a^T R_a x_i] / alpha_i with x, y
    centred and of norm 1. A unit without variance has its own gradient NaN or 0 and adds nothing.
    """
    plan = pair_plan(tuple(a.shape[2:]), tuple(b.shape[2:]), joint, resample)
    usable = [(side[1] > 0) & side[1].isfinite() for side in (side_a, side_b)]
    live = usable[0][:, None] & usable[1][None, :]
    g = torch.where(live, grad, 0.0).to(dtype)
    weighted = torch.where(live, grad * r, 0.0).double()
    units, small = [], []
    for maps, side, ok, operand in (
        (a, side_a, usable[0], plan.a),
        (b, side_b, usable[1], plan.b),
    ):
        mean, root = (torch.where(ok, s, 1.0).view(-1, 1, 1) for s in side)
        counted = ok.view(-1, 1, 1) & keep.view(-1, 1, 1, 1)
        x = torch.where(counted, (maps.double() - mean) / root, 0.0).to(dtype)
        units.append(x)  # [n, c, h, w]
        small.append(_apply(x, operand))  # [n, c, g_h, g_w]
    gradients = []
    for index, (maps, operand) in enumerate(((a, plan.a), (b, plan.b))):
        other = small[1 - index]
        weights = g if index == 0 else g.T  # [c, c of the other side]
        mixed = torch.matmul(weights, other.flatten(2)).unflatten(2, plan.grid)
        mixed = _apply_adjoint(mixed, operand)  # [n, c, h, w]
        own = weighted.sum(1 - index)  # [c]
        gram = _gram(units[index], (maps.shape[2], maps.shape[3]), joint, resample)
        side, ok = (side_a, side_b)[index], usable[index]
        change = mixed.double() - own.view(-1, 1, 1) * gram.double()
        result = change / torch.where(ok, side[1], 1.0).view(-1, 1, 1)
        undefined = side[1].isnan() | ((side[1] == 0) & (constant == "nan"))
        result = torch.where(undefined.view(-1, 1, 1), float("nan"), result)
        result = torch.where(keep.view(-1, 1, 1, 1), result, 0.0)  # omitted images
        gradients.append(result.to(maps.dtype))
    return gradients[0], gradients[1]


def _apply(x: torch.Tensor, operand: Operand) -> torch.Tensor:
    if operand.along_h is not None:
        x = operand.along_h.to(x) @ x
    if operand.along_w is not None:
        x = x @ operand.along_w.to(x).mT
    return x


def _apply_adjoint(x: torch.Tensor, operand: Operand) -> torch.Tensor:
    if operand.along_h is not None:
        x = operand.along_h.to(x).mT @ x
    if operand.along_w is not None:
        x = x @ operand.along_w.to(x)
    return x


def _gram(x: torch.Tensor, size: Size, joint: Size, resample: str) -> torch.Tensor:
    """R^T R x of maps [n, c, h, w]."""
    rows, columns = (gram_matrix(*axis, resample) for axis in zip(size, joint, strict=True))
    if joint[0] != size[0]:
        x = rows.to(x) @ x
    if joint[1] != size[1]:
        x = x @ columns.to(x)
    return x
