"""The correlation matrix of two sets of units."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import floating, one_of, same_device
from foveate._dispatch import differentiable, register, select
from foveate.ops.pearson import reference
from foveate.ops.pearson.grids import RESAMPLERS, check_grid, joint_grid
from foveate.ops.pearson.policies import CONSTANTS, NAN_POLICIES, PRECISIONS, checked_images

_FAMILY = "pearson"


def pearson_matrix(
    a: Any,
    b: Any,
    *,
    precision: str = "fp32",
    grid: str | tuple[int, int] = "pair-max",
    resample: str = "bilinear",
    nan_policy: str = "propagate",
    constant: str = "nan",
    backend: str = "auto",
) -> Any:
    """Pearson's r between every unit of `a` and every unit of `b`.

    r_ij = sum (x_i - mu_i)(y_j - nu_j) / sqrt(sum (x_i - mu_i)^2 sum (y_j - nu_j)^2), clipped to
    [-1, 1], over all images and the positions of the grid on which both maps are compared:
    x = R a, y = R b. No resized map is formed: <R_a a, R_b b> = <a, R_a^T R_b b>.
    Source: Dravid, Gandelsman, Efros, Shocher, "Rosetta Neurons" (ICCV 2023), section 3.

    Args:
        a: `[s, c1]` samples or `[n, c1, h, w]` maps (samples are maps of 1 x 1), float16,
            bfloat16, float32 or float64, any strides. NumPy and CuPy arrays are taken and
            given back.
        b: the same with c2 units; dtype and grid may differ from a's. `b is a` costs half and
            gives a symmetric result with a diagonal of exactly 1.
        precision: floor on the accuracy of the products: "bf16" (|dr| <= 4e-3), "tf32" (1e-3),
            "bf16x3" (3e-5), "fp32" (2e-6) or "fp64" (1e-12). Accumulation is at least float32.
            float64 inputs are always computed in float64.
        grid: "pair-max" (the larger size of each axis), (H, W), "a", "b", or "native" (the sizes
            must agree).
        resample: "bilinear" (align_corners=False, no antialiasing), "nearest" or "area".
        nan_policy: "propagate" (a non-finite value makes NaN of its unit's row or column only),
            "raise", or "omit" (images that hold one in either side are dropped).
        constant: r of a unit whose variance is exactly 0: "nan" or "zero".
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        `[c1, c2]` float32; float64 if an input is float64. Differentiable once in a and b; the
        gradient of a constant unit is NaN, or 0 under constant="zero".

    Raises:
        TypeError: an input that is no floating tensor or array.
        ValueError: shapes that do not fit, an unknown option, no sample, or a non-finite value
            under nan_policy="raise".
        NotImplementedError: the named backend cannot run this.

    Warns:
        UserWarning: there is one sample, so that every unit is constant.
    """
    same = b is a
    (a, b), back = as_tensors(a=a, b=b)
    one_of("precision", precision, PRECISIONS)
    one_of("resample", resample, RESAMPLERS)
    one_of("nan_policy", nan_policy, NAN_POLICIES)
    one_of("constant", constant, CONSTANTS)
    check_grid(grid)
    floating(a=a, b=b)
    same_device(a=a, b=b)
    a, b = _as_maps("a", a), _as_maps("b", b)
    if a.shape[0] != b.shape[0]:
        raise ValueError(
            f"a and b must have the same first size, got a has n={a.shape[0]}, b has n={b.shape[0]}"
        )
    size_a, size_b = (a.shape[2], a.shape[3]), (b.shape[2], b.shape[3])
    joint = joint_grid(grid, size_a, size_b)
    samples = a.shape[0] * joint[0] * joint[1]
    if samples == 0:
        raise ValueError("pearson_matrix needs at least 2 samples, got 0")
    if samples == 1:
        warnings.warn("one sample: every unit is constant", UserWarning, stacklevel=2)
    name = select(_FAMILY, "pearson_matrix_fwd", backend, a.device.type, a, b)
    double = torch.float64 in (a.dtype, b.dtype)
    if name == "reference":
        if nan_policy != "propagate":
            keep = checked_images(a, b, nan_policy)
            a, b = a[keep], b[keep]
        dtype = torch.float64 if double else torch.float32
        return back(reference.pearson_matrix(a, b, same, joint, resample, constant, dtype))
    if double:
        precision = "fp64"
    return back(_matrix(a, b, same, precision, list(joint), resample, nan_policy, constant, name))


def _as_maps(name: str, x: torch.Tensor) -> torch.Tensor:
    if x.ndim == 3:
        raise ValueError(
            f"{name} must be [s, c] or [n, c, h, w], got {tuple(x.shape)}; for tokens use "
            "PearsonAccumulator with LayerSpec"
        )
    if x.ndim not in (2, 4):
        raise ValueError(f"{name} must be [s, c] or [n, c, h, w], got {tuple(x.shape)}")
    if x.ndim == 2:
        return x[:, :, None, None]
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name} must be [n, c, h, w] with h, w >= 1, got {tuple(x.shape)}")
    return x


class _Matrix(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: torch.Tensor,
        b: torch.Tensor,
        same: bool,
        precision: str,
        grid: list[int],
        resample: str,
        nan_policy: str,
        constant: str,
        backend: str,
    ) -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...] = _fwd(
            a, b, same, precision, grid, resample, nan_policy, constant, backend
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        a, b, _, precision, grid, resample, _, constant, backend = inputs
        r, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, r, *statistics)
        ctx.options = (precision, grid, resample, constant, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 9
        grad_a, grad_b = _bwd(grad, *ctx.saved_tensors, *ctx.options)
        return grad_a, grad_b, None, None, None, None, None, None, None


def _matrix(*args: Any) -> torch.Tensor:
    r: torch.Tensor = _differentiable_matrix(*args)[0]
    return r


_differentiable_matrix = differentiable(_Matrix)


def _fwd_fake(
    a: torch.Tensor,
    b: torch.Tensor,
    same: bool,
    precision: str,
    grid: list[int],
    resample: str,
    nan_policy: str,
    constant: str,
    backend: str,
) -> tuple[torch.Tensor, ...]:
    double = torch.float64 in (a.dtype, b.dtype)
    r = a.new_empty((a.shape[1], b.shape[1]), dtype=torch.float64 if double else torch.float32)
    side_a = a.new_empty((2, a.shape[1]), dtype=torch.float64)
    side_b = a.new_empty((2, b.shape[1]), dtype=torch.float64)
    return r, side_a, side_b, a.new_empty(a.shape[0], dtype=torch.bool)


def _bwd_fake(
    grad: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    r: torch.Tensor,
    side_a: torch.Tensor,
    side_b: torch.Tensor,
    keep: torch.Tensor,
    precision: str,
    grid: list[int],
    resample: str,
    constant: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return a.new_empty(a.shape), b.new_empty(b.shape)


_fwd = register(
    _FAMILY,
    "pearson_matrix_fwd(Tensor a, Tensor b, bool same, str precision, int[] grid, str resample, "
    "str nan_policy, str constant, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fwd_fake,
)
_bwd = register(
    _FAMILY,
    "pearson_matrix_bwd(Tensor grad, Tensor a, Tensor b, Tensor r, Tensor side_a, Tensor side_b, "
    "Tensor keep, str precision, int[] grid, str resample, str constant, str backend) "
    "-> (Tensor, Tensor)",
    _bwd_fake,
)
