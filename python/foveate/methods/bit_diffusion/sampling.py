"""From noise to analog bits: the loop around a denoiser, DDIM and DDPM, with self-conditioning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate._checks import integer, one_of
from foveate.methods.bit_diffusion.schedules import (
    Schedule,
    gamma_schedule,
    log_snr_schedule,
    require_schedule,
    time_pairs,
)
from foveate.ops.analog_bits.layout import normalize_dim
from foveate.ops.analog_bits.seeds import noise_key
from foveate.ops.analog_bits.steps import PREDICTIONS, VARIANCES

METHODS = ("ddim", "ddpm")
CONDITIONS = ("gamma", "log_snr", "time")
SELF_CONDITIONS = ("none", "argument", "concat")
NORMALIZATIONS = ("none", "std", "variance")

Denoiser = Callable[..., Tensor]
Callback = Callable[[int, Tensor, Tensor], Any]


def network_condition(times: Tensor, schedule: Schedule, condition: str) -> Tensor:
    """What tells the network the noise level, float32 of times' shape."""
    if condition == "time":
        return times.float()
    level = gamma_schedule if condition == "gamma" else log_snr_schedule
    result: Tensor = level(times, schedule)
    return result.float()


def network_input(x_t: Tensor, gamma: Tensor, normalize_input: str, scale: float) -> Tensor:
    """x_t `[b, *]` as the network sees it, at levels gamma `[b]` or `[1]`."""
    if normalize_input == "std":
        axes = tuple(range(1, x_t.ndim))
        return x_t / x_t.std(dim=axes, correction=0, keepdim=True)
    if normalize_input == "variance":
        spread = ((scale * scale - 1) * gamma.double() + 1).sqrt()
        return x_t / spread.to(x_t).view(-1, *(1,) * (x_t.ndim - 1))
    return x_t


def predict(
    denoise: Denoiser,
    x: Tensor,
    cond: Tensor,
    estimate: Tensor | None,
    self_cond: str,
    dim: int,
    **kwargs: Any,
) -> Tensor:
    """The network's output for its input, condition and earlier estimate of x0."""
    if self_cond == "none" or estimate is None:
        return denoise(x, cond, **kwargs)
    if self_cond == "argument":
        return denoise(x, cond, estimate, **kwargs)
    return denoise(torch.cat([x, estimate.to(x.dtype)], dim), cond, **kwargs)


@torch.no_grad()
def sample(
    denoise: Denoiser,
    shape: Sequence[int],
    *,
    iterations: int = 100,
    method: str = "ddim",
    schedule: Schedule = "cosine",
    condition: str = "gamma",
    pred_type: str = "x",
    scale: float = 1.0,
    clip: float | str | None = "auto",
    td: float = 0.0,
    self_cond: str = "none",
    self_cond_decay: float = 0.0,
    guidance: float = 0.0,
    uncond: Denoiser | None = None,
    variance: str = "large",
    normalize_input: str = "none",
    final: str = "x0",
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    dim: int = 1,
    device: torch.device | str | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Analog bits drawn by a denoiser from noise, T steps of DDIM or DDPM.

    x_T is the noise stream at offset 0; step s draws, where it does, at offset s + 1.
    Source: Chen, Zhang, Hinton, "Analog Bits" (ICLR 2023), Algorithm 2; Pix2Seq-D (ICCV 2023),
    Algorithm 2.

    Args:
        denoise: denoise(x, cond) or, for self_cond "argument", denoise(x, cond, estimate): the
            prediction, floating, of `shape`. For "concat" x is [x_t, estimate] at `dim`.
        shape: of the result, `[b, *]` with N channels at `dim`.
        iterations: T.
        method: "ddim" or "ddpm".
        schedule: as in `gamma_schedule`.
        condition: cond is "gamma", "log_snr" or "time", float32 `[b]`.
        pred_type: what the denoiser predicts, "x", "eps", "v" or "sigmoid".
        scale: of the bits.
        clip: x0 is clipped to [-clip, clip]; "auto" is scale, None does not clip.
        td: time difference in steps (asymmetric intervals).
        self_cond: "none", "argument" or "concat"; the estimate is zeros at first, then
            self_cond_decay * estimate + (1 - self_cond_decay) * x0.
        self_cond_decay: in [0, 1].
        guidance, uncond: weight of the guidance and the unconditional denoiser.
        variance: of "ddpm": "large", "small" or "zero".
        normalize_input: "none"; "std": x_t over its standard deviation in each sample (biased);
            "variance": x_t / sqrt((scale^2 - 1) gamma + 1).
        final: "x0", the last step's x0 (that step draws nothing), or "x", its x_prev.
        seed: int in [0, 2^63) or a one-element int64 tensor on the device.
        generator: CPU generator from which a seed is drawn; with neither, torch's default one.
        dim: axis of the channels; not 0, which holds the samples.
        device: of the result; None is that of a seed tensor, else the CPU.
        callback: callback(s, x_prev, x0) after each step.

    Returns:
        `shape` float32.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that is none of the choices, guidance without uncond, dim = 0, a
            prediction of another shape.
    """
    sizes = tuple(integer("shape", size, 0) for size in shape)
    axis = normalize_dim(dim, len(sizes))
    if axis == 0:
        raise ValueError("dim must not be 0, which holds the samples")
    one_of("method", method, METHODS)
    one_of("condition", condition, CONDITIONS)
    one_of("pred_type", pred_type, PREDICTIONS)
    one_of("self_cond", self_cond, SELF_CONDITIONS)
    one_of("variance", variance, VARIANCES)
    one_of("normalize_input", normalize_input, NORMALIZATIONS)
    one_of("final", final, ("x0", "x"))
    require_schedule(schedule)
    bound = _bound(clip, scale)
    if not 0.0 <= self_cond_decay <= 1.0:
        raise ValueError(f"self_cond_decay must be in [0, 1], got {self_cond_decay}")
    if guidance != 0.0 and uncond is None:
        raise ValueError(f"guidance={guidance} needs uncond, got None")
    pairs = time_pairs(iterations, td)
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    drawn, number, _ = noise_key(seed, 0, generator, torch.device(device))
    key = number if drawn is None else drawn
    x = foveate.bits_noise(sizes, key, offset=0, dim=axis, device=device)
    estimate = torch.zeros_like(x)
    x0 = x
    for step, (t, t_prev) in enumerate(pairs):
        # Levels are taken from float64 times on the host: no synchronisation, no lost digits.
        times = torch.tensor([t, t_prev], dtype=torch.float64)
        gamma: Tensor = gamma_schedule(times, schedule)
        cond = network_condition(times[:1], schedule, condition).expand(sizes[0])
        cond = cond.contiguous().to(device)
        seen = network_input(x, gamma[:1], normalize_input, scale)
        pred = predict(denoise, seen, cond, estimate, self_cond, axis)
        other = None
        if uncond is not None and guidance != 0.0:
            other = predict(uncond, seen, cond, estimate, self_cond, axis)
        g, g_prev = float(gamma[0]), float(gamma[1])
        if method == "ddim":
            x, x0 = foveate.ddim_step(
                x, pred, g, g_prev, pred_type=pred_type, clip=bound, scale=scale,
                pred_uncond=other, guidance=guidance if other is not None else 0.0,
            )  # fmt: skip
        else:
            silent = final == "x0" and step == len(pairs) - 1
            x, x0 = foveate.ddpm_step(
                x, pred, g, g_prev, variance="zero" if silent else variance, seed=key,
                offset=step + 1, dim=axis, pred_type=pred_type, clip=bound, scale=scale,
                pred_uncond=other, guidance=guidance if other is not None else 0.0,
            )  # fmt: skip
        if self_cond != "none":
            estimate = self_cond_decay * estimate + (1 - self_cond_decay) * x0
        if callback is not None:
            callback(step, x, x0)
    return x0 if final == "x0" else x


def _bound(clip: float | str | None, scale: float) -> float | None:
    if clip is None:
        return None
    if isinstance(clip, str):
        if clip != "auto":
            raise ValueError(f"clip must be 'auto', None or a number, got {clip!r}")
        return abs(float(scale))
    if not float(clip) >= 0.0:
        raise ValueError(f"clip must be at least 0, got {clip}")
    return float(clip)
