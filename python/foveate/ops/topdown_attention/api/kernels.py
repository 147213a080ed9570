"""The raw ops of attention, and what autograd keeps for their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foveate._dispatch import differentiable, load_backend, register
from foveate.ops.topdown_attention.checks import FAMILY


def _fwd_fake(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d), q.new_empty(b, h, n, dtype=torch.float32)


def _bwd_fake(q: torch.Tensor, k: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    only_v = args[-2]
    b, h, n, d = q.shape
    m = k.shape[2]
    return (
        q.new_empty((0,) if only_v else (b, n, h, d)),
        q.new_empty((0,) if only_v else (b, m, h, d)),
        q.new_empty(b, m, h, d),
    )


def _apply_fake(x: torch.Tensor, td: Any, weight: torch.Tensor, *args: Any) -> torch.Tensor:
    num_queries = args[-2]
    b, n, _ = x.shape
    return x.new_empty(b, n if num_queries is None else num_queries, weight.shape[0] // 3)


# q `[b, h, n, d]`, k, v, v_td `[b, h, m, d]`, any strides; biases `[h, d]` are added to each row of
# theirs, v_bias as it stands. Gives o `[b, n, h, d]` and what the backward needs of each row's sum.
_fwd = register(
    FAMILY,
    "topdown_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? v_td, Tensor? q_bias, "
    "Tensor? k_bias, Tensor? v_bias, Tensor? mask, bool causal, float scale, str backend) "
    "-> (Tensor, Tensor)",
    _fwd_fake,
)
# The gradients of q `[b, n, h, d]`, k and v + v_td `[b, m, h, d]` from that of o `[b, n, h, d]`.
# With only_v the first two are empty, and v, v_td and out are not read. out may be None for a
# backend whose BACKWARD_READS_OUTPUT is False.
_bwd = register(
    FAMILY,
    "topdown_attention_bwd(Tensor q, Tensor k, Tensor? v, Tensor? v_td, Tensor? q_bias, "
    "Tensor? k_bias, Tensor? v_bias, Tensor? mask, Tensor? out, Tensor lse, Tensor out_slope, "
    "bool causal, float scale, bool only_v, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd_fake,
)
# The whole op `[b, n, c]` -> `[b, num_queries or n, a]` without a record, in bounded extra memory.
attention_apply = register(
    FAMILY,
    "topdown_attention_apply(Tensor x, Tensor? td, Tensor weight, Tensor? bias, Tensor? mask, "
    "int num_heads, bool twice, bool causal, float scale, int? num_queries, str backend) -> Tensor",
    _apply_fake,
)


def _reads_output(backend: str) -> bool:
    return bool(getattr(load_backend(FAMILY, backend), "BACKWARD_READS_OUTPUT", True))


class _Sdpa(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        v_td: torch.Tensor | None,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = _fwd(q, k, v, v_td, None, None, None, mask, causal, scale, backend)
        return out, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        q, k, v, v_td, mask, ctx.causal, ctx.scale, ctx.backend = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.only_v = not any(ctx.needs_input_grad[:2])
        if ctx.only_v:
            v = v_td = out = None
        elif not _reads_output(ctx.backend):
            out = None
        ctx.save_for_backward(q, k, v, v_td, mask, out, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if slope is None:
            return (None,) * 8
        q, k, v, v_td, mask, out, lse = ctx.saved_tensors
        for_q, for_k, for_v, for_td = ctx.needs_input_grad[:4]
        dq, dk, dv = _bwd(
            q, k, v, v_td, None, None, None, mask, out, lse, slope,
            ctx.causal, ctx.scale, ctx.only_v, ctx.backend,
        )  # fmt: skip
        by_head = dv.transpose(1, 2)
        return (
            dq.transpose(1, 2) if for_q else None,
            dk.transpose(1, 2) if for_k else None,
            by_head if for_v else None,
            by_head if for_td else None,
            None,
            None,
            None,
            None,
        )


class _Attention(torch.autograd.Function):
    """Results: o, the rows' sums, and the projections `[b n, 2a]` (q, k) or two of `[.., a]`, v."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
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
        backend: str,
    ) -> tuple[torch.Tensor, ...]:
        a = weight.shape[0] // 3
        rows = x.flatten(0, 1)
        v = (rows if td is None else (x + td).flatten(0, 1)) @ weight[2 * a :].mT
        if num_queries is None:
            q, k = rows @ weight[: 2 * a].mT, rows.new_empty(0)
        else:
            q, k = x[:, :num_queries].flatten(0, 1) @ weight[:a].mT, rows @ weight[a : 2 * a].mT
        out, lse = _fwd(
            *_by_head(q, k, v, x.shape, num_queries or x.shape[1], num_heads), None,
            *_biases(bias, td is not None and twice), mask, causal, scale, backend,
        )  # fmt: skip
        return out, lse, q, k, v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, td, weight, bias, mask, ctx.heads, twice, ctx.causal, ctx.scale, *rest = inputs
        ctx.queries, ctx.backend = rest
        out, lse, q, k, v = output
        ctx.mark_non_differentiable(lse, q, k, v)
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        ctx.twice = td is not None and twice
        for_x, _, for_weight, for_bias = ctx.needs_input_grad[:4]
        ctx.only_v = not (for_x or for_weight or for_bias)
        if ctx.only_v:
            v = out = None
        elif not _reads_output(ctx.backend):
            out = None
        if not for_weight:
            x = td = None
        ctx.save_for_backward(x, td, weight, bias, mask, out, lse, q, k, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if slope is None:
            return (None,) * 11
        x, td, weight, bias, mask, out, lse, q, k, v = ctx.saved_tensors
        for_x, for_td, for_weight, for_bias = ctx.needs_input_grad[:4]
        b = ctx.shape[0]
        a = weight.shape[0] // 3
        slopes = _bwd(
            *_by_head(q, k, v, ctx.shape, ctx.queries or ctx.shape[1], ctx.heads), None,
            *_biases(bias, ctx.twice), mask, out, lse, slope,
            ctx.causal, ctx.scale, ctx.only_v, ctx.backend,
        )  # fmt: skip
        dq, dk, dv = (s if s.ndim == 1 else s.flatten(2).flatten(0, 1) for s in slopes)
        dx: torch.Tensor | None = None
        shared: Any = None
        if for_x or for_td:
            shared = dv @ weight[2 * a :]
        if for_x and ctx.queries is None:
            dx = torch.addmm(shared, dq, weight[:a]).addmm_(dk, weight[a : 2 * a])
        elif for_x:
            dx = torch.addmm(shared, dk, weight[a : 2 * a])
            asking = (dq @ weight[:a]).unflatten(0, (b, ctx.queries))
            dx.view(ctx.shape)[:, : ctx.queries] += asking
        dw = db = None
        if for_weight:
            asking = x if ctx.queries is None else x[:, : ctx.queries]
            values = x if td is None else x + td
            pairs = ((dq, asking), (dk, x), (dv, values))
            dw = torch.cat([s.mT @ rows.flatten(0, 1) for s, rows in pairs])
        if for_bias:
            of_v = dv.sum(0)
            db = torch.cat([dq.sum(0), dk.sum(0), 2 * of_v if ctx.twice else of_v])
        return (
            dx.view(ctx.shape) if dx is not None else None,
            shared.view(ctx.shape) if for_td else None,
            dw,
            db,
            *(None,) * 7,
        )


def _by_head(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, x: torch.Size, asked: int, heads: int
) -> tuple[Any, ...]:
    """Views `[b, h, n, d]` of projections of x; the first holds q and k if k is empty."""
    if k.ndim == 1:
        q, k = q.chunk(2, -1)
    b, n, _ = x
    d = q.shape[1] // heads

    def split(rows: torch.Tensor, count: int) -> torch.Tensor:
        view: torch.Tensor = rows.unflatten(0, (b, count)).unflatten(-1, (heads, d))
        return view.transpose(1, 2)

    return split(q, asked), split(k, n), None if v is None else split(v, n)


def _biases(bias: torch.Tensor | None, twice: bool) -> tuple[torch.Tensor | None, ...]:
    if bias is None:
        return None, None, None
    b_q, b_k, b_v = bias.chunk(3)
    return b_q, b_k, 2 * b_v if twice else b_v


sdpa = differentiable(_Sdpa)
attention = differentiable(_Attention)


def unrecorded(*tensors: torch.Tensor | None) -> bool:
    """Whether nobody looks on: no gradient is recorded, no transform or compiler is at work."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return False
    return not torch.is_grad_enabled() or not any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )
