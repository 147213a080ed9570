"""The losses over the columns of a process group: what is exchanged, and in which order it adds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from foveate.ops.pairwise_loss.checks import accumulator
from foveate.ops.pairwise_loss.pairs import Pairs, dense_targets

Call = TypeVar("Call")


class Place(NamedTuple):
    """This process's rank in a group of `world` processes."""

    group: Any
    rank: int
    world: int


def place(group: Any) -> Place:
    """Where this process stands in the group.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: this process is not in the group.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise RuntimeError(
            "a group needs torch.distributed, which is not initialised: "
            "call torch.distributed.init_process_group first"
        )
    rank = torch.distributed.get_rank(group)
    if rank < 0:
        raise ValueError("group must contain this process, got a group without it")
    return Place(group, rank, torch.distributed.get_world_size(group))


def agree(
    where: Place, check: Any, prepare: Callable[[], Call], describe: Callable[[Call], Any]
) -> Call:
    """`prepare()`, after every rank has said that it may go on and described its call.

    A rank whose arguments are refused tells the others before it raises, so that nobody waits for
    it.

    Raises:
        ValueError: another rank's arguments are refused, or the descriptions differ.
    """
    if check is False:
        return prepare()
    refused: Exception | None = None
    call: Call | None = None
    try:
        call = prepare()
        mine: tuple[str | None, Any] = (None, describe(call))
    except (TypeError, ValueError, NotImplementedError) as error:
        refused, mine = error, (f"{type(error).__name__}: {error}", None)
    every: list[Any] = [None] * where.world
    torch.distributed.all_gather_object(every, mine, group=where.group)
    if refused is not None:
        raise refused
    for rank, (reason, _) in enumerate(every):
        if reason is not None:
            raise ValueError(f"the arguments of rank {rank} are refused: {reason}")
    if any(found != every[0] for found in every):
        listing = "; ".join(f"rank {rank}: {found}" for rank, (_, found) in enumerate(every))
        raise ValueError(f"n, m, d, dtype and options must be equal on all ranks, got {listing}")
    assert call is not None
    return call


class _Gather(torch.autograd.Function):
    """Every rank's rows under one another; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, where: Place) -> torch.Tensor:
        ctx.where = where
        parts = [torch.empty_like(tensor) for _ in range(where.world)]
        torch.distributed.all_gather(parts, tensor, group=where.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return _Collect.apply(upstream, ctx.where), None


class _Collect(torch.autograd.Function):
    """The sum of what every rank has for this one, added in the order rank, rank + 1, ..."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, where: Place) -> torch.Tensor:
        ctx.where = where
        parts = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        torch.distributed.all_to_all_single(parts, tensor.contiguous(), group=where.group)
        parts = parts.view(where.world, -1, *tensor.shape[1:])
        total = parts[where.rank].clone()
        for step in range(1, where.world):
            total = total + parts[(where.rank + step) % where.world]
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return _Gather.apply(upstream.contiguous(), ctx.where), None


class _Scaled(torch.autograd.Function):
    """The tensor itself, with its gradient multiplied."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return upstream * ctx.factor, None


class _MeanGradient(torch.autograd.Function):
    """The tensor itself, with its gradient averaged over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, where: Place) -> torch.Tensor:
        ctx.where = where
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        total = upstream.clone()
        torch.distributed.all_reduce(total, group=ctx.where.group)
        return total / ctx.where.world, None


def gather(tensor: torch.Tensor, where: Place) -> torch.Tensor:
    """The rows of all ranks, `[W n, ...]`; a gradient sums over the ranks."""
    gathered: torch.Tensor = _Gather.apply(tensor.contiguous(), where)
    return gathered


def gather_features(x: torch.Tensor, where: Place) -> torch.Tensor:
    """The same in the logits' dtype: they travel in their own, their gradients in the wide one."""
    if not x.requires_grad:
        return gather(x, where).to(accumulator(x.dtype))
    # The wide copy carries the gradient; what travels forward stays narrow.
    wide = x.to(accumulator(x.dtype))
    return wide_gather(wide, x.detach(), where)


class _WideGather(torch.autograd.Function):
    """`narrow` of every rank in the dtype of `wide`, which gets the gradient."""

    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor, narrow: torch.Tensor, where: Place) -> torch.Tensor:
        ctx.where = where
        return gather(narrow, where).to(wide.dtype)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        return _Collect.apply(upstream, ctx.where), None, None


def wide_gather(wide: torch.Tensor, narrow: torch.Tensor, where: Place) -> torch.Tensor:
    """`narrow` of every rank, with a gradient in the dtype of `wide`, its copy."""
    gathered: torch.Tensor = _WideGather.apply(wide, narrow, where)
    return gathered


def scaled_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """x, whose gradient is multiplied by `factor`."""
    found: torch.Tensor = _Scaled.apply(x, factor)
    return found


def mean_gradient(x: torch.Tensor, where: Place) -> torch.Tensor:
    """x, whose gradient is the mean over the ranks."""
    found: torch.Tensor = _MeanGradient.apply(x, where)
    return found


def mean_value(loss: torch.Tensor, where: Place) -> torch.Tensor:
    """The mean of the ranks' losses, with the gradient of this rank's."""
    total = loss.detach().clone()
    torch.distributed.all_reduce(total, group=where.group)
    return loss + (total / where.world - loss).detach()


def _gathered(tensor: torch.Tensor | None, where: Place) -> torch.Tensor | None:
    return None if tensor is None else gather(tensor, where)


def pairs_of_all_columns(pairs: Pairs, m: int, where: Place) -> Pairs:
    """The pairs of this rank's rows and the columns of all ranks."""
    ids = pairs.form == "ids"
    return pairs._replace(
        diagonal=where.rank * m,
        b=_gathered(pairs.b, where) if ids else pairs.b,
        all_rows=_gathered(pairs.a, where) if ids and pairs.share == "both" else None,
        ignore_y=_gathered(pairs.ignore_y, where),
        col_weight=_gathered(pairs.col_weight, where),
    )


def pairs_of_all_rows(pairs: Pairs, m: int, like: torch.Tensor, where: Place) -> Pairs:
    """The pairs of all ranks' rows and this rank's columns, without weights: for statistics."""
    form, a = pairs.form, pairs.a
    first = where.rank * m
    if form in ("dense", "sparse"):
        targets = dense_targets(pairs, like.shape[0], where.world * m, like)
        form, a = "dense", gather(targets, where)[:, first : first + m].contiguous()
    elif a is not None:
        a = gather(a, where)
        if form == "index":
            a = a.long() - first
            a = a.where((a >= 0) & (a < m), -1)
    return pairs._replace(
        form=form,
        diagonal=-first,
        a=a,
        b=pairs.b if form == "ids" else None,
        c=None,
        ignore_x=_gathered(pairs.ignore_x, where),
        share="each",
        row_weight=None,
        col_weight=None,
    )
