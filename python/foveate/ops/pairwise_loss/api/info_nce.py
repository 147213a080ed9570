"""The softmax (CLIP, InfoNCE) loss over all pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from foveate._checks import one_of
from foveate._dispatch import select
from foveate.ops.pairwise_loss import checks, distributed, engine, reference
from foveate.ops.pairwise_loss.api import raw
from foveate.ops.pairwise_loss.pairs import Pairs, PairStats, check_values


def info_nce_loss(
    x: Any,
    y: Any,
    logit_scale: Any,
    *,
    logit_bias: Any = None,
    symmetric: bool = True,
    positives: Any = "diagonal",
    ignore: Any = None,
    reduction: str = "mean",
    return_stats: bool = False,
    group: Any = None,
    dist: str = "auto",
    local_loss: bool = True,
    gather_with_grad: bool = True,
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """The cross-entropy of each row's positive among all columns and, if symmetric, the reverse.

    z_ij = s <x_i, y_j>, r_i = log sum_j e^z_ij, c_j = log sum_i e^z_ij, positive j = pi(i):
    L = 1/n sum_i [(r_i + c_i)/2 - z_ii]; one-sided: 1/n sum_i [r_i - z_i,pi(i)].
    Source: CLIP (2103.00020, figure 3); InfoNCE: van den Oord et al. (1807.03748), equation 4.

    Logits and loss are float32 whatever the features' dtype (float64 for float64), also under
    autocast. NumPy and CuPy arrays are taken and given back. With y = x, `positives=partner`,
    `ignore=(i, i)` and `symmetric=False` this is SimCLR's NT-Xent.

    Args:
        x: `[n, d]`, float16, bfloat16, float32 or float64, any strides, not normalised here.
        y: `[m, d]`, the same dtype and device. Inside autocast both are cast to its dtype first.
        logit_scale: s, a number or a floating tensor of one element, exponentiated by the caller.
        logit_bias: likewise, or None. It cancels: the value is unchanged, its gradient exactly 0.
        symmetric: whether columns are classified too.
        positives: "diagonal" (n = m if symmetric, else n <= m: further columns are negatives) |
            int32 or int64 `[n]`, the column of each row, with symmetric=False.
        ignore: (ids_x `[n]`, ids_y `[m]`): pairs of equal id (-1: never) that are not positives
            are left out of the sums.
        reduction: "mean" (/ n) | "sum" | "none", `[n]`.
        return_stats: also return `PairStats` of the logits.
        group: None, this process alone, or a ProcessGroup: the columns of all its ranks.
        dist: "gather" | "ring" | "auto": how columns travel; the bits are the same.
        local_loss: with a group, the loss of this rank's rows and columns; else of all ranks'.
        gather_with_grad: with a group, whether gradients reach the other ranks' features.
        check: whether values (index range) and the ranks' shapes are checked. None: on CPU always,
            on CUDA at the first call of a signature.
        backend: "auto", "reference", "cpu" or "triton". The fused ones differentiate once.

    Returns:
        float32 (float64 for float64 features) `[]`, or `[n]`; with `return_stats` a tuple of it and
        `PairStats`.

    Raises:
        TypeError: a dtype, or mixed dtypes.
        ValueError: a shape, device, value or name; with a group, ranks that disagree.
        RuntimeError: a group without torch.distributed; a second differentiation.
        NotImplementedError: the named backend cannot run this.
    """
    values, back = checks.arrays(
        x=x, y=y, logit_scale=logit_scale, logit_bias=logit_bias, positives=positives, ignore=ignore
    )
    options = InfoNceOptions(
        symmetric,
        reduction,
        bool(return_stats),
        dist,
        local_loss,
        gather_with_grad,
        check,
    )
    if group is None:
        result = run(prepare(values, options, 1), backend)
    else:
        result = _run_in_group(values, options, group, backend)
    return back(result if return_stats else result[0])


class InfoNceOptions(NamedTuple):
    """The arguments of `info_nce_loss` that are not tensors."""

    symmetric: Any
    reduction: Any
    return_stats: bool
    dist: Any
    local_loss: Any
    gather_with_grad: Any
    check: Any


class InfoNceCall(NamedTuple):
    """A checked call: features in one dtype, scalars in the logits' dtype."""

    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    pairs: Pairs
    symmetric: bool
    reduction: str
    divisor: int
    needs: list[bool]
    stats: bool
    check: bool


def prepare(values: list[Any], options: InfoNceOptions, world: int) -> InfoNceCall:
    """Check the arguments of one process of `world`; ids are those of this process alone."""
    x, y, logit_scale, logit_bias, positives, ignore = values
    one_of("reduction", options.reduction, ("mean", "sum", "none"))
    one_of("dist", options.dist, ("auto", "gather", "ring"))
    for name in ("symmetric", "local_loss", "gather_with_grad"):
        one_of(name, getattr(options, name), (True, False))
    x, y = checks.features(x, y)
    n = x.shape[0]
    scale = checks.one_element("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else checks.one_element("logit_bias", logit_bias, x)
    pairs = checks.info_nce_pairs(positives, ignore, options.symmetric, x, y.shape[0])
    signature = ("info_nce", x.shape, y.shape, x.dtype, pairs.form, world, options)
    return InfoNceCall(
        x,
        y,
        scale,
        bias,
        pairs,
        options.symmetric,
        options.reduction,
        n if options.reduction == "mean" else 1,
        raw.recorded(x, y, scale, bias),
        options.return_stats,
        checks.checks_values(options.check, signature, x.device.type),
    )


def run(call: InfoNceCall, backend: str) -> tuple[torch.Tensor, PairStats | None]:
    """The loss of one process and its statistics, by the backend that `select` gives."""
    x, y, scale, bias, pairs, symmetric, reduction, divisor, needs, stats, check = call
    name = select(raw.FAMILY, "info_nce_loss_fwd", backend, x.device.type, x.dtype)
    if name == "reference":
        if check and not torch.compiler.is_compiling():
            check_values(pairs, y.shape[0], need_positive=True)
        with checks.without_autocast(x.device.type):
            return reference.info_nce_loss(x, y, scale, bias, pairs, symmetric, reduction, stats)
    in_forward = (
        True in needs[:3] and reduction != "none" and engine.fits_one_tile(x, y.shape[0], name)
    )
    loss, _, _, _, _, _, counts, moments = raw.info_nce(
        x,
        y,
        scale,
        bias,
        *pairs,
        symmetric,
        reduction,
        divisor,
        in_forward,
        *needs,
        stats,
        check,
        name,
    )
    return loss, PairStats(*counts.unbind(), *moments.unbind()) if stats else None


def _run_in_group(
    values: list[Any], options: InfoNceOptions, group: Any, backend: str
) -> tuple[torch.Tensor, PairStats | None]:
    """This rank's rows among the columns of all ranks and, if symmetric, the reverse."""
    where = distributed.place(group)

    def describe(call: InfoNceCall) -> Any:
        sizes = (*call.x.shape, *call.y.shape, str(call.x.dtype))
        return (*sizes, call.pairs.form, *call.needs[:2], *options)

    call = distributed.agree(
        where, options.check, lambda: prepare(values, options, where.world), describe
    )
    x, y, scale, pairs = call.x, call.y, call.scale, call.pairs
    if options.gather_with_grad is False and options.local_loss is False:
        x, y = (distributed.scaled_gradient(t, 1 / where.world) for t in (x, y))
    if options.local_loss is False and scale.requires_grad:
        scale = distributed.mean_gradient(scale, where)
    constant = options.gather_with_grad is False and options.local_loss is True
    n, m, wide = x.shape[0], y.shape[0], checks.accumulator(x.dtype)

    def everyone(features: torch.Tensor) -> torch.Tensor:
        return distributed.gather_features(features.detach() if constant else features, where)

    def one_sided(own: torch.Tensor, other: torch.Tensor, sided: Pairs) -> Any:
        own, keys = own.to(wide), everyone(other)
        half = call._replace(
            x=own,
            y=keys,
            scale=scale,
            pairs=sided,
            symmetric=False,
            needs=raw.recorded(own, keys, scale, call.bias),
        )
        return run(half, backend)

    with checks.without_autocast(x.device.type):
        rows = pairs._replace(
            diagonal=where.rank * m,
            ignore_y=None if pairs.ignore_y is None else distributed.gather(pairs.ignore_y, where),
        )
        loss, stats = one_sided(x, y, rows)
        if call.symmetric:
            columns = pairs._replace(
                diagonal=where.rank * n,
                ignore_x=pairs.ignore_y,
                ignore_y=None
                if pairs.ignore_x is None
                else distributed.gather(pairs.ignore_x, where),
            )
            of_columns, column_stats = one_sided(y, x, columns)
            loss = (loss + of_columns) / 2
            if stats is not None and column_stats is not None:
                stats = stats._replace(col_top1=column_stats.row_top1)
        elif stats is not None:
            with torch.no_grad():
                index = reference.positive_columns(rows, n, x.device)
                wanted = pairs._replace(form="index", a=index)
                wanted = distributed.pairs_of_all_rows(wanted, m, x, where)
                every = distributed.gather_features(x.detach(), where)
                z = reference.logits(every, y.detach().to(wide), scale, call.bias)
                stats = stats._replace(col_top1=reference.pair_stats(z, wanted).col_top1)
    if options.local_loss is False and call.reduction != "none":
        loss = distributed.mean_value(loss, where)
    return loss, stats
