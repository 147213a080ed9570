"""Noise levels gamma(t) in [0, 1] for times t in [0, 1], and the times that a sampler visits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate._arrays import as_tensors
from foveate._checks import floating, integer

Schedule = str | Callable[[Tensor], Tensor]

LEAST = 1e-9  # below it the published schedules clip gamma


def cosine_simple(t: Tensor, ns: float = 0.0002, ds: float = 0.00025) -> Tensor:
    """cos^2(((t + ns) / (1 + ds)) pi / 2)."""
    root: Tensor = torch.cos((t + ns) / (1 + ds) * (math.pi / 2))
    return root.square()


def cosine(t: Tensor, start: float, end: float, tau: float, least: float = LEAST) -> Tensor:
    """(C(t) - C(1)) / (C(0) - C(1)), C(t) = cos((t (end - start) + start) pi / 2)^(2 tau)."""
    first: float = math.cos(start * math.pi / 2) ** (2 * tau)
    last: float = math.cos(end * math.pi / 2) ** (2 * tau)
    level = torch.cos((t * (end - start) + start) * (math.pi / 2)).pow(2 * tau)
    return ((level - last) / _span("cosine", first, last)).clamp(least, 1.0)


def sigmoid(t: Tensor, start: float, end: float, tau: float, least: float = LEAST) -> Tensor:
    """(S(1) - S(t)) / (S(1) - S(0)), S(t) = sigmoid((t (end - start) + start) / tau)."""
    if tau == 0:
        raise ValueError("schedule sigmoid needs tau other than 0, got 0")
    ends = torch.tensor([start / tau, end / tau], dtype=torch.float64).sigmoid()
    first, last = float(ends[0]), float(ends[1])
    level = ((t * (end - start) + start) / tau).sigmoid()
    return ((last - level) / _span("sigmoid", last, first)).clamp(least, 1.0)


def logarithmic(t: Tensor, start: float, end: float, reverse: bool) -> Tensor:
    """(log end - log(t (end - start) + start)) / (log end - log start); ends swapped if reverse."""
    if not (start > 0 and end > 0):
        raise ValueError(f"schedule log needs start and end above 0, got {start} and {end}")
    if reverse:
        start, end = end, start
    first, last = math.log(start), math.log(end)
    level = (t * (end - start) + start).log()
    return ((last - level) / _span("log", last, first)).clamp(0.0, 1.0)


def linear(t: Tensor, least: float = LEAST) -> Tensor:
    """1 - t."""
    return (1.0 - t).clamp(least, 1.0)


def log_snr_cosine(t: Tensor, s: float = 0.008) -> Tensor:
    """-log(max(cos(((t + s) / (1 + s)) pi / 2)^-2 - 1, 1e-5))."""
    inverse = torch.cos((t + s) / (1 + s) * (math.pi / 2)) ** -2
    return -torch.log((inverse - 1).clamp(min=1e-5))


def log_snr_linear(t: Tensor) -> Tensor:
    """-log(expm1(1e-4 + 10 t^2))."""
    return -torch.log(torch.expm1(1e-4 + 10 * t.square()))


def _span(name: str, high: float, low: float) -> float:
    if not (math.isfinite(high - low) and high != low):
        raise ValueError(f"schedule {name} needs two different ends, got {high} and {low}")
    return high - low


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine": cosine_simple,
    "linear": linear,
    "simple_linear": linear,
}
_LOG_SNR: dict[str, Callable[[Tensor], Tensor]] = {
    "logsnr_cosine": log_snr_cosine,
    "logsnr_linear": log_snr_linear,
}
_BETWEEN = {"cosine": cosine, "sigmoid": sigmoid}
_CHOICES = (
    "'cosine', 'linear', 'simple_linear', 'cosine@start,end,tau', 'sigmoid@start,end,tau', "
    "'log@start,end,reverse', 'logsnr_cosine', 'logsnr_linear' or a callable"
)


def _between(schedule: str) -> Callable[[Tensor], Tensor]:
    """The schedule of a name with parameters, "kind@a,b,c"."""
    kind, _, text = schedule.partition("@")
    parts = [part.strip() for part in text.split(",")]
    if (kind in _BETWEEN or kind == "log") and len(parts) == 3:
        try:
            numbers = [float(part) for part in (parts[:2] if kind == "log" else parts)]
        except ValueError:
            raise ValueError(f"schedule must be {_CHOICES}, got {schedule!r}") from None
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"schedule needs finite parameters, got {schedule!r}")
        if kind == "log":
            reverse = parts[2].lower() in ("t", "true")
            return lambda t: logarithmic(t, numbers[0], numbers[1], reverse)
        return lambda t: _BETWEEN[kind](t, numbers[0], numbers[1], numbers[2])
    raise ValueError(f"schedule must be {_CHOICES}, got {schedule!r}")


def _times(t: Any) -> tuple[Tensor, Callable[[Any], Any]]:
    if isinstance(t, (int, float)) and not isinstance(t, bool):
        return torch.tensor(float(t), dtype=torch.float64), lambda value: value
    (times,), back = as_tensors(t=t)
    floating(t=times)
    return times, back


def gamma_schedule(t: Any, schedule: Schedule = "cosine") -> Any:
    """The noise level gamma of each time: 1 is data, 0 is noise.

    "cosine": cos^2(((t + 2e-4) / (1 + 2.5e-4)) pi / 2). "cosine@s,e,tau", "sigmoid@s,e,tau" and
    "log@s,e,reverse" run between two points of the curve, rescaled to [0, 1]; "linear" and
    "simple_linear" are 1 - t. "logsnr_cosine" and "logsnr_linear" are sigmoid(log snr).
    Source: Chen, "On the Importance of Noise Scheduling" (2023); Nichol & Dhariwal (2021).

    Args:
        t: times in [0, 1], floating, any shape, or a float (a float64 scalar).
        schedule: a name as above, or a callable from times to levels.

    Returns:
        Levels of t's shape, computed in t's dtype. Near t = 0 and t = 1 float32 loses digits of
        1 - gamma; float64 times keep them.

    Raises:
        TypeError: t is not floating; schedule is neither a name nor callable.
        ValueError: an unknown name or parameters that define no curve.
    """
    times, back = _times(t)
    if callable(schedule):
        return back(schedule(times))
    _require_name(schedule)
    if schedule in _LOG_SNR:
        return back(_LOG_SNR[schedule](times).sigmoid())
    return back((_PLAIN[schedule] if schedule in _PLAIN else _between(schedule))(times))


def log_snr_schedule(t: Any, schedule: Schedule = "cosine") -> Any:
    """log(gamma / (1 - gamma)) of each time; "logsnr_cosine" and "logsnr_linear" exactly.

    Args:
        t: times in [0, 1], floating, any shape, or a float (a float64 scalar).
        schedule: as in `gamma_schedule`.

    Returns:
        Log signal-to-noise ratios of t's shape and dtype; infinite where gamma is 0 or 1.

    Raises:
        TypeError, ValueError: as `gamma_schedule`.
    """
    times, back = _times(t)
    if isinstance(schedule, str) and schedule in _LOG_SNR:
        return back(_LOG_SNR[schedule](times))
    gamma = gamma_schedule(times, schedule)
    return back(gamma.log() - torch.log1p(-gamma))


def _require_name(schedule: Any) -> None:
    if not isinstance(schedule, str):
        raise TypeError(
            f"schedule must be a name or a callable, got {type(schedule).__name__} {schedule!r}"
        )


def require_schedule(schedule: Any) -> None:
    """The errors of `gamma_schedule` for a `schedule` that is used later."""
    if callable(schedule):
        return
    _require_name(schedule)
    gamma_schedule(torch.zeros(1, dtype=torch.float64), schedule)


def time_pairs(iterations: int, td: float = 0.0) -> list[tuple[float, float]]:
    """The times (t, t') of each sampler step: t = 1 - s / T, t' = max(1 - (s + 1 + td) / T, 0).

    Source: Chen, Zhang, Hinton, "Analog Bits" (ICLR 2023), Algorithm 2, asymmetric intervals.

    Args:
        iterations: T, at least 1.
        td: time difference in steps, at least 0.

    Returns:
        T pairs of floats.

    Raises:
        TypeError: iterations is not an int.
        ValueError: iterations below 1, td below 0 or not finite.
    """
    iterations = integer("iterations", iterations, 1)
    td = float(td)
    if not (td >= 0.0 and math.isfinite(td)):
        raise ValueError(f"td must be finite and at least 0, got {td}")
    return [
        (1 - s / iterations, max(1 - (s + 1 + td) / iterations, 0.0)) for s in range(iterations)
    ]
