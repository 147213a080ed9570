"""The decoders that send selected tokens back to every block, and their product with W_v."""

from __future__ import annotations

from typing import Any

import torch

from foveate._checks import shape
from foveate._dispatch import select
from foveate.ops.topdown_attention import reference
from foveate.ops.topdown_attention.checks import (
    FAMILY,
    autocast_dtype,
    cast,
    named_matrices,
    require_axes,
    require_length,
    tensors_and_stacks,
)


def feedback(z: Any, linear: Any, linear2: Any, *, backend: str = "auto") -> Any:
    """The top-down signal of every block from the selected tokens.

    For i = L-1 .. 0: z <- z L_i^T, td_i = z R_i^T, with L_i, R_i the matrices of `linear` and
    `linear2`. Source: "TOAST" (arXiv 2305.15542), section 3. Differentiable in every tensor;
    matrix products only, so that "auto" and "reference" are the backends.

    Args:
        z: `[b, n, c]` float32, float64, bfloat16 or float16. NumPy and CuPy arrays are taken and
            given back.
        linear: `[L, c, c]` or a sequence of L matrices `[c, c]`.
        linear2: likewise.
        backend: "auto" or "reference".

    Returns:
        A tuple of L tensors `[b, n, c]`; item i feeds block i.

    Raises:
        TypeError: non-tensors, mixed kinds or dtypes.
        ValueError: a shape or length that does not fit; the argument is named.
        NotImplementedError: another backend is named.
    """
    dtype = autocast_dtype(z)
    if dtype is not None:
        with torch.autocast(z.device.type, enabled=False):
            return feedback(
                cast(z, dtype), cast(linear, dtype), cast(linear2, dtype), backend=backend
            )
    left, right = named_matrices("linear", linear), named_matrices("linear2", linear2)
    require_length("linear2", right, len(left), "linear")
    (z,), (lefts, rights), back = tensors_and_stacks({"z": z}, {"linear": left, "linear2": right})
    require_axes("z", z, "[b, n, c]", 3)
    c = z.shape[2]
    for name, matrix in (*zip(left, lefts, strict=True), *zip(right, rights, strict=True)):
        shape(name, matrix, (c, c), "[c, c]")
    select(FAMILY, "feedback", backend, z.device.type)
    return back(reference.feedback(z, lefts, rights))


def fold_feedback(
    v_weight: Any, linear: Any, linear2: Any, transform: Any = None, *, backend: str = "auto"
) -> Any:
    """The one matrix per block that replaces the chain of decoders and the value projection.

    M_i = W_v,i R_i L_i L_{i+1} .. L_{L-1} T^T, so that td_i W_v,i^T = (m F) M_i^T. Computed in
    float32 at least, rounded once. Differentiable in every tensor.

    Args:
        v_weight: `[L, a, c]` or a sequence of L matrices `[a, c]`, the value rows of each block's
            projection. NumPy and CuPy arrays are taken and given back.
        linear: `[L, c, c]` or a sequence of L matrices.
        linear2: likewise.
        transform: `[c, c]` or None for the identity.
        backend: "auto" or "reference".

    Returns:
        `[L, a, c]` in the dtype of v_weight.

    Raises:
        TypeError: non-tensors, mixed kinds or dtypes.
        ValueError: a shape or length that does not fit; the argument is named.
        NotImplementedError: another backend is named.
    """
    values = named_matrices("v_weight", v_weight)
    left, right = named_matrices("linear", linear), named_matrices("linear2", linear2)
    require_length("linear", left, len(values), "v_weight")
    require_length("linear2", right, len(values), "v_weight")
    (transform,), (weights, lefts, rights), back = tensors_and_stacks(
        {"transform": transform}, {"v_weight": values, "linear": left, "linear2": right}
    )
    first = weights[0]
    require_axes("v_weight[0]", first, "[a, c]", 2)
    a, c = first.shape
    for name, matrix in zip(values, weights, strict=True):
        shape(name, matrix, (a, c), "[a, c]")
    for name, matrix in (*zip(left, lefts, strict=True), *zip(right, rights, strict=True)):
        shape(name, matrix, (c, c), "[c, c]")
    if transform is not None:
        shape("transform", transform, (c, c), "[c, c]")
    select(FAMILY, "fold_feedback", backend, first.device.type)
    with torch.autocast(first.device.type, enabled=False):
        return back(reference.fold_feedback(weights, lefts, rights, transform))
