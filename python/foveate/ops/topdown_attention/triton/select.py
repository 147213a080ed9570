"""Selection of tokens by a prompt on CUDA tensors. Sums are float64, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 4  # of a program, which reads them twice: the second time from the cache
_MOST_COLUMNS = 1024  # of a step along the channels
_SUMMED_ROWS = 64  # of a partial sum of the prompt's gradient
_SUMMED_COLUMNS = 64


@triton.jit
def _unit_prompt_kernel(
    prompt,  # [prompts, c]
    c,
    eps,
    # outputs
    unit,  # [prompts, c + 1] float64: p / max(|p|, eps), then |p|
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, c, BLOCK):
        k = start + tl.arange(0, BLOCK)
        p = tl.load(prompt + image * c + k, mask=k < c, other=0).to(tl.float64)
        total += p * p
    length = tl.sqrt(tl.sum(total, 0))
    divisor = tl.where(length < eps, eps, length)
    for start in range(0, c, BLOCK):
        k = start + tl.arange(0, BLOCK)
        p = tl.load(prompt + image * c + k, mask=k < c, other=0).to(tl.float64)
        tl.store(unit + image * (c + 1) + k, p / divisor, mask=k < c)
    tl.store(unit + image * (c + 1) + c, length)


@triton.jit
def _clamped(cosine):  # NaN stays NaN
    return tl.where(cosine <= 0, 0.0, tl.where(cosine >= 1, 1.0, cosine))


@triton.jit
def _prompt_select_fwd_kernel(
    x,  # [b, n, c]
    unit,  # [prompts, c + 1]
    n,
    c,
    unit_stride,  # c + 1, or 0 for one prompt of all images
    eps,
    # outputs
    z,  # [b, n, c]
    mask,  # [b, n]
    cosine,  # [b, n]
    length,  # [b, n]
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = image * n + within
    inside = within < n
    dot = tl.zeros([ROWS, BLOCK], tl.float64)
    total = tl.zeros([ROWS, BLOCK], tl.float64)
    for start in range(0, c, BLOCK):
        k = start + tl.arange(0, BLOCK)
        both = inside[:, None] & (k < c)[None, :]
        value = tl.load(x + row[:, None] * c + k[None, :], mask=both, other=0).to(tl.float64)
        p = tl.load(unit + image * unit_stride + k, mask=k < c, other=0)
        dot += value * p[None, :]
        total += value * value
    norm = tl.sqrt(tl.sum(total, 1))
    cos = tl.sum(dot, 1) / tl.where(norm < eps, eps, norm)
    m = _clamped(cos).to(tl.float32)
    tl.store(cosine + row, cos, mask=inside)
    tl.store(length + row, norm, mask=inside)
    tl.store(mask + row, m, mask=inside)
    for start in range(0, c, BLOCK):
        k = start + tl.arange(0, BLOCK)
        both = inside[:, None] & (k < c)[None, :]
        value = tl.load(x + row[:, None] * c + k[None, :], mask=both, other=0).to(tl.float32)
        tl.store(z + row[:, None] * c + k[None, :], m[:, None] * value, mask=both)


@triton.jit
def _prompt_select_bwd_kernel(
    x,  # [b, n, c]
    unit,  # [prompts, c + 1]
    cosine,  # [b, n]
    length,  # [b, n]
    z_slope,  # [b, n, c]
    mask_slope,  # [b, n], read if HAS_MASK
    n,
    c,
    unit_stride,
    eps,
    # outputs
    x_slope,  # [b, n, c], written if FOR_X
    along,  # [b, n] float64: what the prompt's gradient counts the row, over |p|
    turn,  # [b, n] float64: the cosine's slope times the cosine
    HAS_MASK: tl.constexpr,
    FOR_X: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    within = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = image * n + within
    inside = within < n
    dot = tl.zeros([ROWS, BLOCK], tl.float64)
    for start in range(0, c, BLOCK):
        k = start + tl.arange(0, BLOCK)
        both = inside[:, None] & (k < c)[None, :]
        place = row[:, None] * c + k[None, :]
        value = tl.load(x + place, mask=both, other=0).to(tl.float64)
        dot += value * tl.load(z_slope + place, mask=both, other=0).to(tl.float64)
    slope = tl.sum(dot, 1)
    if HAS_MASK:
        slope += tl.load(mask_slope + row, mask=inside, other=0).to(tl.float64)
    cos = tl.load(cosine + row, mask=inside, other=0)
    norm = tl.load(length + row, mask=inside, other=1)
    slope = tl.where((cos <= 0) | (cos >= 1), 0.0, slope)
    short = norm < eps
    divisor = tl.where(short, eps, norm)
    ahead = slope / divisor
    tl.store(along + row, ahead, mask=inside)
    tl.store(turn + row, slope * cos, mask=inside)
    if FOR_X:
        back = tl.where(short, 0.0, slope * cos / (divisor * divisor))
        m = _clamped(cos)
        for start in range(0, c, BLOCK):
            k = start + tl.arange(0, BLOCK)
            both = inside[:, None] & (k < c)[None, :]
            place = row[:, None] * c + k[None, :]
            value = tl.load(x + place, mask=both, other=0).to(tl.float64)
            given = tl.load(z_slope + place, mask=both, other=0).to(tl.float64)
            p = tl.load(unit + image * unit_stride + k, mask=k < c, other=0)
            wanted = m[:, None] * given + ahead[:, None] * p[None, :] - back[:, None] * value
            tl.store(x_slope + place, wanted.to(tl.float32), mask=both)


@triton.jit
def _prompt_sums_kernel(
    x,  # [b, n, c]
    along,  # [b, n]
    n,
    c,
    blocks,
    # outputs
    partial,  # [b, blocks, c] float64: sums of along x over the rows of a block
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([STEP, COLUMNS], tl.float64)
    for start in range(0, ROWS, STEP):
        within = block * ROWS + start + tl.arange(0, STEP)
        row = image * n + within
        both = (within < n)[:, None] & (k < c)[None, :]
        value = tl.load(x + row[:, None] * c + k[None, :], mask=both, other=0).to(tl.float64)
        weight = tl.load(along + row, mask=within < n, other=0)[:, None]
        total += tl.where(weight == 0, 0.0, weight * value)
    tl.store(partial + (image * blocks + block) * c + k, tl.sum(total, 0), mask=k < c)


def _columns(c: int) -> int:
    return min(triton.next_power_of_2(max(c, 1)), _MOST_COLUMNS)


def prompt_select_fwd(
    x: torch.Tensor, prompt: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    b, n, c = x.shape
    x, prompt = x.contiguous(), prompt.contiguous()
    prompts = b if prompt.ndim == 2 else 1
    z, mask = x.new_empty(b, n, c), x.new_empty(b, n, 1)
    unit = x.new_empty(prompts, c + 1, dtype=torch.float64)
    cosine, length = (x.new_empty(b, n, dtype=torch.float64) for _ in range(2))
    block = _columns(c)
    if prompts > 0:
        _unit_prompt_kernel[(prompts,)](
            prompt, c, eps, unit, BLOCK=block, num_warps=4, enable_fp_fusion=True
        )
    if b * n > 0:
        _prompt_select_fwd_kernel[(triton.cdiv(n, _ROWS), b)](
            x,
            unit,
            n,
            c,
            c + 1 if prompt.ndim == 2 else 0,
            eps,
            z,
            mask,
            cosine,
            length,
            ROWS=_ROWS,
            BLOCK=block,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return z, mask, unit, cosine, length


def prompt_select_bwd(
    x: torch.Tensor,
    unit: torch.Tensor,
    cosine: torch.Tensor,
    length: torch.Tensor,
    eps: float,
    z_slope: torch.Tensor,
    mask_slope: torch.Tensor | None,
    per_image: bool,
    for_x: bool,
    for_prompt: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, n, c = x.shape
    x, z_slope = x.contiguous(), z_slope.contiguous()
    given = z_slope if mask_slope is None else mask_slope.contiguous()
    x_slope = x.new_empty((b, n, c) if for_x else (0,))
    along, turn = (x.new_empty(b, n, dtype=torch.float64) for _ in range(2))
    if b * n > 0:
        _prompt_select_bwd_kernel[(triton.cdiv(n, _ROWS), b)](
            x,
            unit,
            cosine,
            length,
            z_slope,
            given,
            n,
            c,
            c + 1 if per_image else 0,
            eps,
            x_slope,
            along,
            turn,
            HAS_MASK=mask_slope is not None,
            FOR_X=for_x,
            ROWS=_ROWS,
            BLOCK=_columns(c),
            num_warps=8,
            enable_fp_fusion=True,
        )
    if not for_prompt:
        return x_slope, x.new_empty(0)
    blocks = triton.cdiv(n, _SUMMED_ROWS)
    partial = x.new_empty(b, blocks, c, dtype=torch.float64)
    if partial.numel() > 0:
        _prompt_sums_kernel[(triton.cdiv(c, _SUMMED_COLUMNS), blocks, b)](
            x,
            along,
            n,
            c,
            blocks,
            partial,
            ROWS=_SUMMED_ROWS,
            STEP=8,
            COLUMNS=_SUMMED_COLUMNS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    slope = _prompt_slope(partial, turn, unit, eps, per_image)
    return x_slope, slope.to(x.dtype).view((b, c) if per_image else (c,))


def _prompt_slope(
    partial: torch.Tensor, turn: torch.Tensor, unit: torch.Tensor, eps: float, per_image: bool
) -> torch.Tensor:
    """`[prompts, c]`: d cos / d p = x / (|x| |p|) - cos p / |p|^2, the latter only above eps."""
    axes = (1,) if per_image else (0, 1)
    sums = partial.sum(axes).view(-1, partial.shape[2])
    cosines = turn.sum(axes).view(-1, 1)
    p, norm = unit[:, :-1], unit[:, -1:]
    short = norm < eps
    value = (sums - torch.where(short, 0.0, cosines * p)) / torch.where(short, eps, norm)
    return value + 0.0 * norm  # NaN throughout if a value of p is not finite
