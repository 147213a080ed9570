"""pearson in plain PyTorch: every map is resized, centred and normalised in float64."""

from __future__ import annotations

import torch

from foveate.ops.pearson.grids import Size, resize_matrix


def resize(maps: torch.Tensor, grid: Size, resample: str) -> torch.Tensor:
    """R_h x R_w^T of maps [.., h, w] in their dtype: [.., H, W]."""
    rows = resize_matrix(maps.shape[-2], grid[0], resample).to(maps)  # [H, h]
    columns = resize_matrix(maps.shape[-1], grid[1], resample).to(maps)  # [W, w]
    return rows @ maps @ columns.mT


def constant_units(native: torch.Tensor, resized: torch.Tensor) -> torch.Tensor:
    """Units [c] whose resized values [n, c, H, W] are all equal."""
    found = torch.zeros(native.shape[1], dtype=torch.bool, device=native.device)
    for maps in (native, resized):
        values = maps.detach().transpose(0, 1).flatten(1)  # [c, K]
        found = found | (values.amax(1) == values.amin(1))
    return found


def pearson_matrix(
    a: torch.Tensor,
    b: torch.Tensor,
    same: bool,
    grid: Size,
    resample: str,
    constant: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """r [c1, c2] of maps [n, c, h, w]; a constant unit's own gradient is NaN, or 0 for "zero"."""
    sides, undefined, poison = [], [], []
    for maps in (a, b):
        x = resize(maps.double(), grid, resample)  # [n, c, H, W]
        x = x.transpose(0, 1).flatten(1)  # [c, K]
        still = constant_units(maps, x.unflatten(1, (maps.shape[0], -1)).transpose(0, 1))
        broken = ~maps.detach().isfinite().transpose(0, 1).flatten(1).all(1)
        nan = still & (constant == "nan") | broken
        bad = still | broken
        touched = (maps[:, nan].double() * float("nan")).sum((0, 2, 3))  # its gradient is NaN
        zeros = torch.zeros_like(nan, dtype=torch.float64)
        poison.append(zeros.masked_scatter(nan, touched))
        undefined.append(bad)
        x = torch.where(bad[:, None], 0.0, x)
        x = x - x.mean(1, keepdim=True)
        largest = torch.where(bad[:, None], 1.0, x.detach().abs().amax(1, keepdim=True))
        x = x / torch.exp2(largest.log2().floor())  # squares stay in range
        square = (x * x).sum(1, keepdim=True)
        sides.append(x / torch.where(bad[:, None], 1.0, square).sqrt())
    r = sides[0] @ sides[1].mT  # [c1, c2]
    r = r + (r.clamp(-1, 1) - r).detach()
    if same:
        r = r.triu(1) + r.triu(1).mT + torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    policy = poison[0][:, None] + poison[1][None, :]
    masked = torch.where(undefined[0][:, None] | undefined[1][None, :], policy, r)
    return masked.to(dtype)
