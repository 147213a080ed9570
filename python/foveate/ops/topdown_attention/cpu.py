"""topdown_attention on CPU tensors: csrc/cpu/topdown_attention*.cpp."""

from __future__ import annotations

from array import array
from typing import Any

import torch

from foveate._native import DTYPE_CODES, native

_cpu = native("_cpu")
_SERIAL = 1 << 15  # elements below which a second thread costs more than it brings


_SERIAL_PAIRS = 1 << 18  # multiply-adds of scores below which one thread serves
_EXTRA = 10 << 20  # bytes of the buffers of projections where nothing is recorded
_MOST_ROWS = 1024  # of such a buffer; fewer than 700 cost 1 to 6 % on the development machine
BACKWARD_READS_OUTPUT = False


def unsupported(_op: str, dtype: torch.dtype, mask_gradient: bool = False) -> str | None:
    if dtype == torch.float64:
        return "float64 tensors are computed by the reference"
    if mask_gradient:
        return "attn_mask requires a gradient, which the reference alone gives"
    return None


def _threads(x: torch.Tensor) -> int:
    return 1 if x.numel() < _SERIAL else torch.get_num_threads()


def prompt_select_fwd(
    x: torch.Tensor, prompt: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    b, n, c = x.shape
    per_image = prompt.ndim == 2
    x, prompt = x.contiguous(), prompt.contiguous()
    z = x.new_empty(b, n, c)
    mask = x.new_empty(b, n, 1)
    unit = x.new_empty(b if per_image else 1, c + 1, dtype=torch.float64)
    cosine = x.new_empty(b, n, dtype=torch.float64)
    length = x.new_empty(b, n, dtype=torch.float64)
    _cpu.prompt_select_fwd(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        prompt.data_ptr(),
        per_image,
        b,
        n,
        c,
        eps,
        _threads(x),
        unit.data_ptr(),
        z.data_ptr(),
        mask.data_ptr(),
        cosine.data_ptr(),
        length.data_ptr(),
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
    given = None if mask_slope is None else mask_slope.contiguous()
    x_slope = x.new_empty((b, n, c) if for_x else (0,))
    prompt_slope = x.new_empty(((b, c) if per_image else (c,)) if for_prompt else (0,))
    blocks = b * _cpu.prompt_select_blocks(n) if for_prompt else 0
    partial = x.new_empty(blocks, c + 1, dtype=torch.float64)
    _cpu.prompt_select_bwd(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        unit.data_ptr(),
        cosine.data_ptr(),
        length.data_ptr(),
        per_image,
        b,
        n,
        c,
        eps,
        z_slope.data_ptr(),
        0 if given is None else given.data_ptr(),
        _threads(x),
        partial.data_ptr() if for_prompt else 0,
        x_slope.data_ptr() if for_x else 0,
        prompt_slope.data_ptr() if for_prompt else 0,
    )
    return x_slope, prompt_slope


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _together(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with an innermost axis that lies together."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else _together(tensor)


def _expanded(mask: torch.Tensor | None, *sizes: int) -> tuple[torch.Tensor | None, int]:
    """The mask as `[b, h, n, m]`, bool or float32, keys at stride 0 or 1, and its kind."""
    if mask is None:
        return None, 0
    kind = 1
    if mask.dtype != torch.bool:
        kind, mask = 2, mask.to(torch.float32)
    full = mask.expand(sizes)
    return (full if full.stride(3) in (0, 1) else mask.contiguous().expand(sizes)), kind


def _layout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    v_td: torch.Tensor | None,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> Any:
    """struct Layout of csrc/cpu/topdown_tile.h; `out` is `[b, n, h, d]`."""
    b, h, n, d = q.shape
    strides: list[int] = []
    for tensor in (q, k, v, v_td):
        strides += (0, 0, 0) if tensor is None else tensor.stride()[:3]
    strides += (0, 0, 0, 0) if mask is None else mask.stride()
    image, row, head, _ = out.stride()
    return array("q", (b, h, n, k.shape[2], d, *strides, image, head, row))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    v_td: torch.Tensor | None,
    biases: tuple[torch.Tensor | None, ...],
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    b, h, n, d = q.shape
    m = k.shape[2]
    if out.numel() == 0:
        return
    mask, kind = _expanded(mask, b, h, n, m)
    threads = _heads_threads(b * h, n * m * d)
    layout = _layout(q, k, v, v_td, mask, out)
    work = q.new_empty(threads * _cpu.topdown_attention_fwd_work(n, m, d), dtype=torch.float32)
    _cpu.topdown_attention_fwd(
        layout.buffer_info()[0],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        _address(v_td),
        *map(_address, biases),
        _address(mask),
        kind,
        DTYPE_CODES[q.dtype],
        causal,
        scale,
        threads,
        work.data_ptr(),
        out.data_ptr(),
        _address(lse),
    )


def _heads_threads(heads: int, products: int) -> int:
    return 1 if heads * products < _SERIAL_PAIRS else min(heads, torch.get_num_threads())


def topdown_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    v_td: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    v_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, n, d = q.shape
    out, lse = q.new_empty(b, n, h, d), q.new_empty(b, h, n, dtype=torch.float32)
    q, k, v = _together(q), _together(k), _together(v)
    v_td = _rows(v_td)
    biases = tuple(_rows(bias) for bias in (q_bias, k_bias, v_bias))
    _attend(q, k, v, v_td, biases, mask, causal, scale, out, lse)
    return out, lse


def topdown_attention_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    v_td: torch.Tensor | None,
    q_bias: torch.Tensor | None,
    k_bias: torch.Tensor | None,
    v_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    _out: torch.Tensor | None,
    lse: torch.Tensor,
    out_slope: torch.Tensor,
    causal: bool,
    scale: float,
    only_v: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    b, h, n, d = q.shape
    m = k.shape[2]
    q_slope = q.new_empty((0,) if only_v else (b, n, h, d))
    k_slope = q.new_empty((0,) if only_v else (b, m, h, d))
    v_slope = q.new_empty(b, m, h, d)
    q, k = _together(q), _together(k)
    out_slope = _together(out_slope)
    v, v_td = (_rows(None if only_v else tensor) for tensor in (v, v_td))
    biases = tuple(_rows(bias) for bias in (q_bias, k_bias, v_bias))
    mask, kind = _expanded(mask, b, h, n, m)
    lse = lse.contiguous()
    threads = _heads_threads(b * h, 3 * n * m * d)
    layout = _layout(q, k, v, v_td, mask, out_slope)
    floats = _cpu.topdown_attention_bwd_work(n, m, d, only_v)
    work = q.new_empty(threads * floats, dtype=torch.float32)
    _cpu.topdown_attention_bwd(
        layout.buffer_info()[0],
        q.data_ptr(),
        k.data_ptr(),
        _address(v),
        _address(v_td),
        *map(_address, biases),
        _address(mask),
        kind,
        lse.data_ptr(),
        out_slope.data_ptr(),
        DTYPE_CODES[q.dtype],
        causal,
        scale,
        only_v,
        threads,
        work.data_ptr(),
        0 if only_v else q_slope.data_ptr(),
        0 if only_v else k_slope.data_ptr(),
        v_slope.data_ptr(),
    )
    return q_slope, k_slope, v_slope


def topdown_attention_apply(
    x: torch.Tensor,
    td: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    num_heads: int,
    twice: bool,
    causal: bool,
    scale: float,
    num_queries: int | None,
) -> torch.Tensor:
    """Image by image, or several at once if they are short, through reused buffers.

    The values are projected into the memory of the result where it has their size: the kernel has
    read a head's values before it writes the head. Images of more rows than a buffer holds go
    through it a few heads at a time.
    """
    b, n, c = x.shape
    a = weight.shape[0] // 3
    d = a // num_heads
    asked = n if num_queries is None else num_queries
    out = x.new_empty(b, asked, a)
    if out.numel() == 0:
        return out
    w_q, w_k, w_v = weight.mT.split(a, 1)
    biases: tuple[torch.Tensor | None, ...] = (None, None, None)
    if bias is not None:
        b_q, b_k, b_v = bias.contiguous().split(a)
        biases = (b_q, b_k, 2 * b_v if twice and td is not None else b_v)
    most = max(1, min(_MOST_ROWS, _EXTRA // ((2 * a + c) * x.element_size())))
    images = min(b, max(1, most // n))
    group = num_heads if n <= most else max(1, num_heads * most // n)
    keyed = x.new_empty(images * n, min(group, num_heads) * d)
    asking = x.new_empty(images * asked, keyed.shape[1])
    summed = None if td is None else x.new_empty(min(images * n, most), c)
    spare = x.new_empty(images * n, a) if asked < n else None
    if mask is not None:
        mask = mask.expand(b, num_heads, asked, n)
    for first in range(0, b, images):
        last = min(first + images, b)
        here = x[first:last]
        rows = here.reshape(-1, c)
        queries = rows if asked == n else here[:, :asked].reshape(-1, c)
        result = out[first:last].view(last - first, asked, num_heads, d)
        values = result.view(-1, a) if spare is None else spare[: rows.shape[0]]
        signal = None if td is None else td[first:last].reshape(-1, c)
        for start in range(0, rows.shape[0], most):
            part = rows[start : start + most]
            if signal is not None and summed is not None:
                part = torch.add(part, signal[start : start + most], out=summed[: part.shape[0]])
            torch.mm(part, w_v, out=values[start : start + most])
        v = values.view(last - first, n, num_heads, d).transpose(1, 2)
        for head in range(0, num_heads, group):
            end = min(head + group, num_heads)
            columns = slice(head * d, end * d)
            q = asking[: queries.shape[0], : (end - head) * d]
            k = keyed[: rows.shape[0], : (end - head) * d]
            torch.mm(queries, w_q[:, columns], out=q)
            torch.mm(rows, w_k[:, columns], out=k)
            _attend(
                q.view(last - first, asked, end - head, d).transpose(1, 2),
                k.view(last - first, n, end - head, d).transpose(1, 2),
                v[:, head:end],
                None,
                tuple(None if vector is None else vector[columns] for vector in biases),
                None if mask is None else mask[first:last, head:end],
                causal,
                scale,
                result[:, :, head:end],
                None,
            )
    return out
