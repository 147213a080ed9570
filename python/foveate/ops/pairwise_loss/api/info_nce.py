"""The softmax (CLIP, InfoNCE) loss over all pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from foveate._checks import one_of
from foveate._dispatch import select
from foveate.ops.pairwise_loss import checks, engine, reference
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
    if group is not None:
        raise NotImplementedError("info_nce_loss: group must be None, got a process group")
    result = run(prepare(values, options, 1), backend)
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
    name = select(raw.FAMILY, "info_nce_loss_fwd", backend, x.device.type)
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
