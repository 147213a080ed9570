"""The sigmoid loss over all pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from foveate._checks import one_of
from foveate._dispatch import select
from foveate.ops.pairwise_loss import checks, distributed, reference
from foveate.ops.pairwise_loss.api import raw
from foveate.ops.pairwise_loss.pairs import Pairs, PairStats, check_values

_REDUCTIONS = ("row_mean", "pair_mean", "sum", "none")


def sigmoid_loss(
    x: Any,
    y: Any,
    logit_scale: Any,
    logit_bias: Any = None,
    *,
    positives: Any = "diagonal",
    ignore: Any = None,
    positive_share: str = "each",
    row_weight: Any = None,
    col_weight: Any = None,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    focal_gamma: float = 0.0,
    reduction: str = "row_mean",
    grad_mode: str = "auto",
    return_stats: bool = False,
    group: Any = None,
    dist: str = "auto",
    check: bool | None = None,
    backend: str = "auto",
) -> Any:
    """The binary cross-entropy of every pair of rows with its target, in one pass over the pairs.

    z_ij = s <x_i, y_j> + b and L = 1/n sum_ij w_ij [p t_ij sp(-z_ij) + q (1 - t_ij) sp(z_ij)] with
    sp(u) = log(1 + e^u), targets t in [0, 1] and weights w = row_weight x col_weight, 0 for ignored
    pairs. Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (ICCV 2023,
    2303.15343), Algorithm 1; focal option: Lin et al. (1708.02002).

    Logits and loss are float32 whatever the features' dtype (float64 for float64), also under
    autocast. Nothing of size n x m outlives a tile. NumPy and CuPy arrays are taken and given back.

    Args:
        x: `[n, d]`, float16, bfloat16, float32 or float64, any strides, not normalised here.
        y: `[m, d]`, the same dtype and device. Inside autocast both are cast to its dtype first.
        logit_scale: s, a number or a floating tensor of one element, exponentiated by the caller.
        logit_bias: b, likewise, or None. SigLIP starts it at -10.
        positives: which pairs are positive. "diagonal" (n = m) | None, none | int32 or int64
            `[n]`, the column of each row, -1 = none | (ids_x `[n]`, ids_y `[m]`), equal = positive,
            -1 matches nothing | bool or floating targets `[n, m]` in [0, 1] | sparse COO or CSR
            targets `[n, m]`, absent = 0, duplicates summed.
        ignore: (ids_x `[n]`, ids_y `[m]`): pairs of equal id (-1: never) whose target is 0 are
            dropped.
        positive_share: with ids, what a positive weighs. "each": 1 | "row": 1/k_i, k_i the
            positives of its row | "both": (1/k_i + 1/k'_j)/2, k'_j those of its column.
        row_weight: `[n]` floating, finite, >= 0, no gradient.
        col_weight: `[m]`, likewise.
        pos_weight: p, a number >= 0.
        neg_weight: q, a number >= 0.
        focal_gamma: f >= 0: sp(-z) becomes sigma(-z)^f sp(-z), sp(z) becomes sigma(z)^f sp(z).
        reduction: "row_mean" (/ n) | "pair_mean" (/ n N) | "sum" | "none", sums of the rows `[n]`.
        grad_mode: "forward": gradients in the forward pass, which needs one upstream gradient |
            "backward": recomputed in backward, for any upstream | "auto": forward if autograd
            records and reduction is not "none".
        return_stats: also return `PairStats` of the logits.
        group: None, this process alone, or a ProcessGroup: the columns of all its ranks, N = W m.
            Index and matrix positives index the N columns in rank order. The loss is that of this
            rank's rows; feature gradients sum over all ranks' losses (W times the global mean's).
        dist: "gather" | "ring" | "auto": how columns travel; the bits are the same.
        check: whether values (ranges, finite weights) and the ranks' shapes are checked. None: on
            CPU always, on CUDA at the first call of a signature.
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
        x=x,
        y=y,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        positives=positives,
        ignore=ignore,
        row_weight=row_weight,
        col_weight=col_weight,
    )
    options = SigmoidOptions(
        positive_share,
        pos_weight,
        neg_weight,
        focal_gamma,
        reduction,
        grad_mode,
        bool(return_stats),
        dist,
        check,
    )
    if group is None:
        result = run(prepare(values, options, 1), backend)
    else:
        result = _run_in_group(values, options, group, backend)
    return back(result if return_stats else result[0])


class SigmoidOptions(NamedTuple):
    """The arguments of `sigmoid_loss` that are not tensors."""

    positive_share: Any
    pos_weight: Any
    neg_weight: Any
    focal_gamma: Any
    reduction: Any
    grad_mode: Any
    return_stats: bool
    dist: Any
    check: Any


class SigmoidCall(NamedTuple):
    """A checked call: features in one dtype, scalars in the logits' dtype."""

    x: torch.Tensor
    y: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    pairs: Pairs
    reduction: str
    divisor: int
    in_forward: bool
    needs: list[bool]
    stats: bool
    check: bool


def prepare(values: list[Any], options: SigmoidOptions, world: int) -> SigmoidCall:
    """Check the arguments of one process of `world`; ids are those of this process alone."""
    x, y, logit_scale, logit_bias, positives, ignore, row_weight, col_weight = values
    one_of("reduction", options.reduction, _REDUCTIONS)
    one_of("grad_mode", options.grad_mode, ("auto", "forward", "backward"))
    one_of("dist", options.dist, ("auto", "gather", "ring"))
    if options.grad_mode == "forward" and options.reduction == "none":
        raise ValueError(
            'grad_mode="forward" knows one upstream gradient: with reduction="none" it must be '
            '"auto" or "backward", got "forward"'
        )
    x, y = checks.features(x, y)
    n, m = x.shape[0], y.shape[0]
    scale = checks.one_element("logit_scale", logit_scale, x)
    bias = None if logit_bias is None else checks.one_element("logit_bias", logit_bias, x)
    pairs = checks.sigmoid_pairs(positives, ignore, options.positive_share, x, m, world * m)
    row_weight, col_weight = checks.weights(x, n, m, row_weight, col_weight)
    pairs = pairs._replace(
        row_weight=row_weight,
        col_weight=col_weight,
        pos_weight=checks.weight_number("pos_weight", options.pos_weight),
        neg_weight=checks.weight_number("neg_weight", options.neg_weight),
        focal_gamma=checks.weight_number("focal_gamma", options.focal_gamma),
    )
    needs = raw.recorded(x, y, scale, bias)
    in_forward = options.grad_mode == "forward" or (
        options.grad_mode == "auto" and True in needs and options.reduction != "none"
    )
    divisor = {"row_mean": n, "pair_mean": n * m * world, "sum": 1, "none": 1}[options.reduction]
    signature = ("sigmoid", x.shape, y.shape, x.dtype, pairs.form, options)
    checked = checks.checks_values(options.check, signature, x.device.type)
    return SigmoidCall(
        x,
        y,
        scale,
        bias,
        pairs,
        options.reduction,
        divisor,
        in_forward,
        needs,
        options.return_stats,
        checked,
    )


def run(call: SigmoidCall, backend: str) -> tuple[torch.Tensor, PairStats | None]:
    """The loss of one process and its statistics, by the backend that `select` gives."""
    x, y, scale, bias, pairs, reduction, divisor, in_forward, needs, stats, check = call
    name = select(raw.FAMILY, "sigmoid_loss_fwd", backend, x.device.type, x.dtype)
    if name == "reference":
        if check and not torch.compiler.is_compiling():
            check_values(pairs, y.shape[0])
        with checks.without_autocast(x.device.type):
            return reference.sigmoid_loss(x, y, scale, bias, pairs, reduction, stats)
    loss, _, _, _, _, counts, moments = raw.sigmoid(
        x, y, scale, bias, *pairs, reduction, divisor, in_forward, *needs, stats, check, name
    )
    return loss, PairStats(*counts.unbind(), *moments.unbind()) if stats else None


def _run_in_group(
    values: list[Any], options: SigmoidOptions, group: Any, backend: str
) -> tuple[torch.Tensor, PairStats | None]:
    """This rank's rows against the columns of all ranks."""
    where = distributed.place(group)

    def describe(call: SigmoidCall) -> Any:
        sizes = (*call.x.shape, *call.y.shape, str(call.x.dtype))
        return (*sizes, call.pairs.form, *call.needs[:2], *options)

    call = distributed.agree(
        where, options.check, lambda: prepare(values, options, where.world), describe
    )
    m, wide = call.y.shape[0], checks.accumulator(call.x.dtype)
    with checks.without_autocast(call.x.device.type):
        everyone = call._replace(
            x=call.x.to(wide),
            y=distributed.gather_features(call.y, where),
            pairs=distributed.pairs_of_all_columns(call.pairs, m, where),
        )
        loss, stats = run(everyone, backend)
        if stats is None:
            return loss, None
        with torch.no_grad():
            x, y = distributed.gather_features(call.x.detach(), where), call.y.detach().to(wide)
            pairs = distributed.pairs_of_all_rows(call.pairs, m, x[: len(call.x)], where)
            columns = call._replace(
                x=x, y=y, pairs=pairs, in_forward=False, needs=[False] * 4, check=False
            )
            _, of_columns = run(columns, backend)
    assert of_columns is not None
    return loss, stats._replace(col_top1=of_columns.col_top1)
