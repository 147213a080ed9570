"""One step of a sampler, after the network: DDIM and DDPM."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from foveate._arrays import as_tensors
from foveate._checks import floating, one_of, same_device
from foveate._dispatch import register, select
from foveate.ops.analog_bits.api.noise import given_noise
from foveate.ops.analog_bits.layout import normalize_dim
from foveate.ops.analog_bits.seeds import noise_key, per_sample
from foveate.ops.analog_bits.steps import (
    PREDICTIONS,
    VARIANCES,
    Step,
    ddim_coefficients,
    ddpm_coefficients,
    learned_sigma,
)

_FAMILY = "analog_bits"


class _Ancestral(NamedTuple):
    """What the ancestral step takes beside the arguments of both."""

    variance: Any
    noise: Any
    seed: int | torch.Tensor | None
    offset: int
    generator: torch.Generator | None
    dim: int


_NO_NOISE = _Ancestral(None, None, None, 0, None, -1)


def ddim_step(
    x_t: Any,
    pred: Any,
    gamma: Any,
    gamma_prev: Any,
    *,
    pred_type: str = "x",
    clip: float | None = None,
    scale: float = 1.0,
    pred_uncond: Any = None,
    guidance: float = 0.0,
    return_x0: bool = True,
    out: Any = None,
    backend: str = "auto",
) -> Any:
    """The deterministic step from noise level gamma to gamma_prev.

        x_prev = A x_t + B x0,  A = sqrt(1 - g') / sqrt(1 - g),  B = sqrt(g') - A sqrt(g)

    x0 is read off the prediction f by `pred_type`: "x" f; "eps" (x_t - sqrt(1-g) f) / sqrt(g);
    "v" sqrt(g) x_t - sqrt(1-g) f; "sigmoid" scale (2 sigmoid(f) - 1). Guidance comes first,
    f := (1 + guidance) f - guidance f_uncond; then x0 is clipped, and the noise derived anew.
    Source: Song et al., DDIM (2021), eq. 12; Chen et al., "Analog Bits" (ICLR 2023), Algorithm 2.

    Args:
        x_t: `[b, *]` float32 or float64.
        pred: what the network gave, of x_t's shape, any floating dtype.
        gamma: float, or `[b]` float32 or float64, in [0, 1); g.
        gamma_prev: the same in [0, 1]; g'.
        pred_type: "x", "eps", "v" or "sigmoid".
        clip: x0 is clipped to [-clip, clip]; None: it is not.
        scale: of the bits, for "sigmoid".
        pred_uncond: the unconditional prediction, like `pred`.
        guidance: weight of the guidance; it needs `pred_uncond`.
        return_x0: also return the clipped x0.
        out: (x_prev, x0) to write to, or x_prev alone without x0: of x_t's shape and dtype, e.g.
            halves of a buffer; x_prev may be x_t.
        backend: "auto", "reference", "cpu" or "triton".

    Returns:
        (x_prev, x0), or x_prev; of x_t's shape and dtype. No gradient passes.

    Raises:
        TypeError: x_t is not float32 or float64, pred not floating, out of another dtype.
        ValueError: a shape, gamma outside [0, 1], gamma = 1, gamma = 0 with "eps" (on CUDA these
            two give inf or NaN), an unknown pred_type.
        NotImplementedError: the named backend cannot run this.
    """
    return _step(
        x_t, pred, gamma, gamma_prev, None,
        pred_type, clip, scale, pred_uncond, guidance, return_x0, out, backend,
    )  # fmt: skip


def ddpm_step(
    x_t: Any,
    pred: Any,
    gamma: Any,
    gamma_prev: Any,
    *,
    variance: Any = "large",
    noise: Any = None,
    seed: int | torch.Tensor | None = None,
    offset: int = 0,
    generator: torch.Generator | None = None,
    dim: int = -1,
    pred_type: str = "x",
    clip: float | None = None,
    scale: float = 1.0,
    pred_uncond: Any = None,
    guidance: float = 0.0,
    return_x0: bool = True,
    out: Any = None,
    backend: str = "auto",
) -> Any:
    """The ancestral step from noise level gamma to gamma_prev.

        x_prev = A x_t + B x0 + S z,  r = g / g' in [0, 1]
        A = sqrt(r) (1 - g') / (1 - g),  B = sqrt(g') (1 - r) / (1 - g)
        S^2 = 1 - r ("large"), (1 - g') / (1 - g) (1 - r) ("small"), 0 ("zero")

    Source: Ho et al., DDPM (2020), eq. 7; learned variance: Nichol & Dhariwal (2021), eq. 15.

    Args:
        variance: "large", "small", "zero", or a floating tensor v of x_t's shape: log S^2 =
            f log beta + (1 - f) log w, f = (v + 1) / 2, beta = 1 - r, w = beta (1 - g') / (1 - g);
            S = 0 at g' = 1.
        noise: z, floating, of x_t's shape.
        seed, offset: z is the stream of `bits_noise`; without noise, seed and generator a seed is
            drawn from torch's default generator.
        generator: CPU generator from which a seed is drawn (eager mode).
        dim: axis of the channels, which lays out the stream.
        x_t, pred, gamma, gamma_prev, pred_type, clip, scale, pred_uncond, guidance, return_x0, out,
            backend: as in `ddim_step`.

    Returns:
        (x_prev, x0), or x_prev; of x_t's shape and dtype. No gradient passes.

    Raises:
        TypeError: as `ddim_step`; noise or variance of another kind.
        ValueError: as `ddim_step`; two sources of noise, noise or variance of another shape, an
            unknown variance.
        NotImplementedError: the named backend cannot run this.
    """
    return _step(
        x_t, pred, gamma, gamma_prev, _Ancestral(variance, noise, seed, offset, generator, dim),
        pred_type, clip, scale, pred_uncond, guidance, return_x0, out, backend,
    )  # fmt: skip


def _like(name: str, tensor: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    if tuple(tensor.shape) != tuple(x_t.shape):
        raise ValueError(
            f"{name} must have x_t's shape {tuple(x_t.shape)}, got {tuple(tensor.shape)}"
        )
    return tensor.detach()


def _outputs(
    out: Any, x_t: torch.Tensor, return_x0: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`out` after its checks, or fresh tensors: x_prev, and x0 where it is wanted."""
    given = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    wanted = 2 if return_x0 else 1
    if out is None:
        given = (None,) * wanted
    elif len(given) != wanted:
        contract = "(x_prev, x0)" if return_x0 else "x_prev"
        raise ValueError(f"out must be {contract}, got {len(given)} tensors")
    checked = []
    for name, tensor in zip(("out[0]", "out[1]"), given, strict=False):
        if tensor is None:
            checked.append(torch.empty_like(x_t, memory_format=torch.contiguous_format))
            continue
        _like(name, tensor, x_t)
        if tensor.dtype != x_t.dtype:
            raise TypeError(f"{name} must have x_t's dtype {x_t.dtype}, got {tensor.dtype}")
        same_device(**{"x_t": x_t, name: tensor})
        checked.append(tensor)
    return checked[0], checked[1] if return_x0 else None


def _require_levels(g: torch.Tensor, pred_type: str) -> None:
    """ValueError where a step divides by zero: gamma = 1, and gamma = 0 for "eps"."""
    if bool((g == 1).any()):
        raise ValueError("gamma must be below 1 in a step, which divides by sqrt(1 - gamma), got 1")
    if pred_type == "eps" and bool((g == 0).any()):
        raise ValueError('gamma must be above 0 with pred_type="eps", got 0')


def _step(
    x_t: Any,
    pred: Any,
    gamma: Any,
    gamma_prev: Any,
    ancestral: _Ancestral | None,
    pred_type: str,
    clip: float | None,
    scale: float,
    pred_uncond: Any,
    guidance: float,
    return_x0: bool,
    out: Any,
    backend: str,
) -> Any:
    variance, noise, seed, offset, generator, dim = ancestral or _Ancestral(
        *(None,) * 3, 0, None, -1
    )
    outs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    learned = None if isinstance(variance, str) else variance
    (x_t, pred, gamma, gamma_prev, noise, pred_uncond, learned, *outs_t), back = as_tensors(
        x_t=x_t, pred=pred, gamma=gamma, gamma_prev=gamma_prev, noise=noise,
        pred_uncond=pred_uncond, variance=learned,
        **{f"out[{i}]": value for i, value in enumerate(outs)},
    )  # fmt: skip
    if x_t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x_t must be float32 or float64, got {x_t.dtype}")
    if x_t.ndim == 0:
        raise ValueError("x_t must be [b, *], got a scalar")
    x_t = x_t.detach()
    floating(pred=pred, pred_uncond=pred_uncond)
    same_device(x_t=x_t, pred=pred, pred_uncond=pred_uncond, variance=learned, noise=noise)
    pred = _like("pred", pred, x_t)
    one_of("pred_type", pred_type, PREDICTIONS)
    guidance = float(guidance)
    if pred_uncond is not None:
        pred_uncond = _like("pred_uncond", pred_uncond, x_t)
    elif guidance != 0.0:
        raise ValueError(f"guidance={guidance} needs pred_uncond, got None")
    bound = math.inf if clip is None else float(clip)
    if not bound >= 0.0:
        raise ValueError(f"clip must be at least 0 or None, got {clip}")
    dim = normalize_dim(dim, x_t.ndim)
    check = x_t.device.type == "cpu"
    # Samples are axis 0 whatever the channels' axis: -1 tells per_sample that it is not the bits'.
    g = per_sample("gamma", gamma, x_t.shape, -1, check).to(x_t.device)
    g_prev = per_sample("gamma_prev", gamma_prev, x_t.shape, -1, check).to(x_t.device)
    if check and not torch.compiler.is_compiling():
        _require_levels(g, pred_type)
    key: tuple[torch.Tensor | None, int, int] = (None, 0, 0)
    sigma = None
    if ancestral is None:
        coefficients = ddim_coefficients(g, g_prev)
    elif learned is not None:
        if not isinstance(learned, torch.Tensor) or not learned.is_floating_point():
            kind = learned.dtype if isinstance(learned, torch.Tensor) else type(learned).__name__
            raise TypeError(f"variance must be a name or a floating tensor, got {kind}")
        sigma = learned_sigma(_like("variance", learned, x_t), g, g_prev, x_t.dtype)
        coefficients = ddpm_coefficients(g, g_prev, "zero")
    else:
        one_of("variance", variance, VARIANCES)
        coefficients = ddpm_coefficients(g, g_prev, variance)
    if noise is not None:
        if seed is not None or generator is not None:
            raise ValueError("noise, seed and generator exclude each other, got noise and another")
        noise = given_noise(noise, tuple(x_t.shape), x_t.dtype)
    elif ancestral is not None:
        key = noise_key(seed, offset, generator, x_t.device)
    noisy = ancestral is not None and not (learned is None and variance == "zero")
    draws = noisy and noise is None
    noise = noise if noisy else None
    x_prev, x0 = _outputs(None if out is None else outs_t, x_t, return_x0)
    name = select(_FAMILY, "bits_step", backend, x_t.device.type)
    step = Step(PREDICTIONS[pred_type], guidance, bound, float(scale), dim, *key, draws)
    _step_out(
        x_t, pred, pred_uncond, noise, sigma, coefficients, *step, name, out=x_prev, x0_out=x0
    )
    return back((x_prev, x0)) if return_x0 else back(x_prev)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_step_out = register(
    _FAMILY,
    "bits_step_out(Tensor x_t, Tensor pred, Tensor? uncond, Tensor? noise, Tensor? sigma, "
    "Tensor coefficients, int kind, float guidance, float clip, float scale, int dim, "
    "Tensor? seed_tensor, int seed, int offset, bool draws, str backend, *, "
    "Tensor(a!) out, Tensor(b!)? x0_out) -> ()",
    _nothing,
)
