"""The raw ops of the family, and the derivative of ncut_affinity.

A launcher takes images in groups: `features` is a list of `[b_i, n_i, c_i]` (one entry for a batch,
one with b = 1 per image of a ragged list), `mask` an empty list or a bool `[b_i, n_i]` per group,
`grid` the flat list h_0, w_0, h_1, w_1, ... of the groups. With B = sum b_i images and
n = max n_i it returns, padded with zeros to n:

    ncut_fwd, ncut_affinity_fwd    the fields of `NCutResult`, eigenvectors `[B, k, n]`
    maskcut_fwd                    the fields of `MaskCutResult`, masks and candidates `[B, m, n]`
    tokencut_fwd                   the fields of `TokenCutResult`, mask and foreground `[B, n]`

Checks of values, and the warning about entries that did not converge, are the launcher's
(`values.py`), skipped with check=False. Bits are `[b, ceil(n / 32), n]` int32: bit t of word (q, i)
is B[32 q + t, i], tail bits zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from foveate._dispatch import differentiable, register

_FAMILY = "ncut"
_F64, _I64, _BOOL = torch.float64, torch.int64, torch.bool


def _sizes(features: list[torch.Tensor]) -> tuple[int, int]:
    images, n = 0, 0
    for group in features:
        images += group.shape[0]
        n = max(n, group.shape[1])
    return images, n


def _empty(like: torch.Tensor, *fields: tuple[torch.dtype, tuple[int, ...]]) -> Any:
    return tuple(like.new_empty(shape, dtype=dtype) for dtype, shape in fields)


def _pairs(like: torch.Tensor, b: int, k: int, n: int) -> Any:
    return _empty(
        like,
        (_F64, (b, k)),
        (_F64, (b, k, n)),
        (_F64, (b, k)),
        (_F64, (b,)),
        (_I64, (b,)),
        (_BOOL, (b,)),
        (_BOOL, (b,)),
        (_I64, (b,)),
    )


def _ncut_fake(
    features: list[torch.Tensor],
    mask: list[torch.Tensor],
    tau: float,
    eps: float,
    k: int,
    tol: float,
    max_iter: int,
    check: bool,
    backend: str,
) -> Any:
    images, n = _sizes(features)
    return _pairs(features[0], images, k, n)


def _ncut_affinity_fake(
    affinity: torch.Tensor, k: int, tol: float, max_iter: int, check: bool, backend: str
) -> Any:
    return _pairs(affinity, affinity.shape[0], k, affinity.shape[-1])


def _maskcut_fake(
    features: list[torch.Tensor],
    grid: list[int],
    n_masks: int,
    tau: float,
    eps: float,
    iou_threshold: float,
    min_area: float,
    corners: int,
    on_reject: str,
    tol: float,
    max_iter: int,
    check: bool,
    backend: str,
) -> Any:
    images, n = _sizes(features)
    stage, token = (images, n_masks), (images, n_masks, n)
    return _empty(
        features[0],
        (_BOOL, token),
        (_I64, stage),
        (_BOOL, token),
        (_I64, stage),
        (_F64, stage),
        (_F64, stage),
        (_F64, stage),
        (_I64, stage),
        (_BOOL, stage),
        (_BOOL, stage),
        (_F64, token),
    )


def _tokencut_fake(
    features: list[torch.Tensor],
    grid: list[int],
    tau: float,
    eps: float,
    binary: bool,
    tol: float,
    max_iter: int,
    check: bool,
    backend: str,
) -> Any:
    images, n = _sizes(features)
    return _empty(
        features[0],
        (_BOOL, (images, n)),
        (_I64, (images, 4)),
        (_I64, (images,)),
        (_F64, (images, n)),
        (_BOOL, (images, n)),
        (_F64, (images,)),
        (_F64, (images,)),
        (_F64, (images,)),
        (_I64, (images,)),
        (_BOOL, (images,)),
        (_BOOL, (images,)),
    )


_PAIRS = (
    "(Tensor eigenvalues, Tensor eigenvectors, Tensor residual, Tensor gap, Tensor iterations, "
    "Tensor converged, Tensor degenerate, Tensor uncertain)"
)
ncut_fwd = register(
    _FAMILY,
    "ncut_fwd(Tensor[] features, Tensor[] mask, float tau, float eps, int k, float tol, "
    f"int max_iter, bool check, str backend) -> {_PAIRS}",
    _ncut_fake,
)
ncut_affinity_fwd = register(
    _FAMILY,
    "ncut_affinity_fwd(Tensor affinity, int k, float tol, int max_iter, bool check, str backend) "
    f"-> {_PAIRS}",
    _ncut_affinity_fake,
)
maskcut_fwd = register(
    _FAMILY,
    "maskcut_fwd(Tensor[] features, int[] grid, int n_masks, float tau, float eps, "
    "float iou_threshold, float min_area, int corners, str on_reject, float tol, int max_iter, "
    "bool check, str backend) -> (Tensor masks, Tensor status, Tensor candidates, Tensor seeds, "
    "Tensor eigenvalues, Tensor gap, Tensor residual, Tensor uncertain, Tensor degenerate, "
    "Tensor converged, Tensor eigenvectors)",
    _maskcut_fake,
)
tokencut_fwd = register(
    _FAMILY,
    "tokencut_fwd(Tensor[] features, int[] grid, float tau, float eps, bool binary, float tol, "
    "int max_iter, bool check, str backend) -> (Tensor mask, Tensor box, Tensor seed, "
    "Tensor eigenvector, Tensor foreground, Tensor eigenvalue, Tensor gap, Tensor residual, "
    "Tensor uncertain, Tensor degenerate, Tensor converged)",
    _tokencut_fake,
)


# One definition for all backends, opaque because the values decide its control flow.
_affinity_bwd = register(
    "ncut",
    "ncut_affinity_bwd(Tensor affinity, Tensor eigenvalues, Tensor eigenvectors, "
    "Tensor degenerate, Tensor? d_eigenvalues, Tensor? d_eigenvectors, str backend) -> Tensor",
    lambda affinity, *_: torch.empty_like(affinity),
)


class _NCutAffinity(torch.autograd.Function):
    """Eigenpairs of an affinity `[b, n, n]`; eigenvalues and eigenvectors are differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        affinity: torch.Tensor, k: int, tol: float, max_iter: int, check: bool, backend: str
    ) -> Any:
        return ncut_affinity_fwd(affinity.detach(), k, tol, max_iter, check, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        eigenvalues, eigenvectors, _, _, _, _, degenerate, _ = output
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], eigenvalues, eigenvectors, degenerate)
        ctx.backend = inputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        affinity, eigenvalues, eigenvectors, degenerate = ctx.saved_tensors
        gradient = _affinity_bwd(
            affinity,
            eigenvalues,
            eigenvectors,
            degenerate,
            gradients[0],
            gradients[1],
            ctx.backend,
        )
        return gradient, None, None, None, None, None


differentiable_affinity = differentiable(_NCutAffinity)
