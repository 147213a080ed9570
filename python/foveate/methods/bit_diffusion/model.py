"""Training and sampling of a denoiser on analog bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import foveate
from foveate._checks import integer, one_of
from foveate.methods.bit_diffusion.panoptic import encoded_past
from foveate.methods.bit_diffusion.sampling import (
    CONDITIONS,
    NORMALIZATIONS,
    SELF_CONDITIONS,
    Callback,
    network_condition,
    network_input,
    predict,
    sample,
)
from foveate.methods.bit_diffusion.schedules import Schedule, gamma_schedule, require_schedule
from foveate.ops.analog_bits.groups import group_count, one_axis
from foveate.ops.analog_bits.layout import (
    bit_widths,
    ids_with_map_axis,
    is_msb,
    normalize_dim,
    pixel_shape,
)
from foveate.ops.analog_bits.seeds import noise_key

OBJECTIVES = ("x", "eps", "v", "sigmoid", "softmax")

# One seed keys a training step: its noise, its times, its coin.
_NOISE, _TIMES, _COIN = 0, 1, 2


class BitDiffusion(nn.Module):
    """Diffusion of ids as analog bits around any denoiser.

    Source: Chen, Zhang, Hinton, "Analog Bits" (ICLR 2023), Algorithms 1 and 2; Pix2Seq-D (ICCV
    2023), Algorithms 1 and 2.

    Args:
        denoiser: denoiser(x, cond, **kwargs), or denoiser(x, cond, estimate, **kwargs) for
            self_cond "argument". x `[b, .., N, ..]` float32, for "concat" with 2 N channels
            [x_t, estimate]; cond `[b]` float32. It returns N channels at `dim`, or for the
            objective "softmax" logits, G 2^m there (or two axes G, 2^m).
        n_bits: bits of an id, 1..63; a tuple gives the bits of each of K maps at `dim`.
        scale: value of a set bit.
        bit_order: "lsb" or "msb", the bit that comes first.
        dim: axis of the channels; not 0, which holds the samples.
        objective: what the denoiser predicts: "x", "eps", "v", "sigmoid" or "softmax".
        schedule: as in `gamma_schedule`.
        condition: cond is "gamma", "log_snr" or "time".
        self_cond: "none", "argument" or "concat".
        self_cond_rate: share of samples, or of steps, that train with an estimate.
        self_cond_by: "half": the first int(b * rate) samples get an estimate, the rest zeros;
            "coin": all samples or none.
        normalize_input: as in `sample`.
        groups: of the softmax; None is one for each map.

    Raises:
        TypeError: an argument of another type.
        ValueError: a name that is none of the choices, dim = 0, a rate outside [0, 1], groups that
            do not fit.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        n_bits: int | Sequence[int],
        *,
        scale: float = 1.0,
        bit_order: str = "lsb",
        dim: int = 1,
        objective: str = "x",
        schedule: Schedule = "cosine",
        condition: str = "gamma",
        self_cond: str = "none",
        self_cond_rate: float = 0.5,
        self_cond_by: str = "half",
        normalize_input: str = "none",
        groups: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(denoiser):
            raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")
        widths = bit_widths(n_bits)
        is_msb(bit_order)
        one_of("objective", objective, OBJECTIVES)
        one_of("condition", condition, CONDITIONS)
        one_of("self_cond", self_cond, SELF_CONDITIONS)
        one_of("self_cond_by", self_cond_by, ("half", "coin"))
        one_of("normalize_input", normalize_input, NORMALIZATIONS)
        require_schedule(schedule)
        if integer("dim", dim, -63, 63) == 0:
            raise ValueError("dim must not be 0, which holds the samples")
        if not 0.0 <= self_cond_rate <= 1.0:
            raise ValueError(f"self_cond_rate must be in [0, 1], got {self_cond_rate}")
        self.denoiser = denoiser
        self.n_bits = widths.n_bits[0] if widths.single else widths.n_bits
        self.channels = widths.channels
        self.scale = float(scale)
        self.bit_order = bit_order
        self.dim = int(dim)
        self.objective = objective
        self.schedule = schedule
        self.condition = condition
        self.self_cond = self_cond
        self.self_cond_rate = float(self_cond_rate)
        self.self_cond_by = self_cond_by
        self.normalize_input = normalize_input
        self.groups = group_count(widths, groups) if objective == "softmax" else groups

    def forward(
        self,
        x: Tensor,
        *,
        weight: Tensor | None = None,
        times: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The training loss of a batch of ids, each at a time drawn from U(0, 1).

        Args:
            x: ids as in `foveate.bits_encode`, samples at axis 0.
            weight: `[*pixel]` or `[b]`, floating, weights of the loss.
            times: `[b]` floating in [0, 1], instead of drawn ones.
            noise: floating, of the shape of the bits, instead of drawn noise.
            seed: keys all that is drawn: int in [0, 2^63) or a one-element int64 tensor.
            generator: CPU generator from which a seed is drawn; with neither, torch's default one.
            kwargs: handed to the denoiser; of tensors with b entries at axis 0 a pass over some
                samples gets theirs.

        Returns:
            `[]`, the mean over pixels and bits (groups of them for "softmax").

        Raises:
            TypeError: ids are not integers, times are not floating.
            ValueError: an id out of range, times outside [0, 1], shapes that do not fit, two of
                noise, seed and generator.
        """
        ids, axis = ids_with_map_axis(x, bit_widths(self.n_bits), self.dim)
        self._require_samples(axis)
        shape = (*ids.shape[:axis], self.channels, *ids.shape[axis + 1 :])
        b = shape[0]
        if noise is not None and (seed is not None or generator is not None):
            raise ValueError("noise, seed and generator exclude each other, got noise and another")
        drawn, number, _ = noise_key(seed, 0, generator, x.device)
        key = number if drawn is None else drawn
        times = _uniform(b, key, _TIMES, x.device) if times is None else _given_times(times, x)
        gamma: Tensor = gamma_schedule(times, self.schedule)
        source: dict[str, Any] = (
            {"seed": key, "offset": _NOISE} if noise is None else {"noise": noise}
        )
        layout: dict[str, Any] = {"bit_order": self.bit_order, "dim": self.dim}
        x_t = foveate.bits_q_sample(x, self.n_bits, gamma, scale=self.scale, **source, **layout)
        seen = network_input(x_t, gamma, self.normalize_input, self.scale)
        cond = network_condition(times, self.schedule, self.condition)
        estimate = None
        if self.self_cond != "none":
            estimate = self._estimate(x_t, seen, cond, gamma, axis, key, kwargs)
        pred = predict(self.denoiser, seen, cond, estimate, self.self_cond, axis, **kwargs)
        if self.objective == "softmax":
            loss: Tensor = foveate.bits_softmax_cross_entropy(
                pred, x, self.n_bits, groups=self.groups, weight=weight, **layout
            )
        else:
            if self.objective == "v":
                source["gamma"] = gamma
            loss = foveate.bits_loss(
                pred, x, self.n_bits, kind=self.objective, scale=self.scale, weight=weight,
                **(source if self.objective in ("eps", "v") else {}), **layout,
            )  # fmt: skip
        return loss

    @torch.no_grad()
    def _estimate(
        self,
        x_t: Tensor,
        seen: Tensor,
        cond: Tensor,
        gamma: Tensor,
        axis: int,
        key: int | Tensor,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """What the earlier pass of self-conditioning made of x0: zeros where there was none."""
        b = x_t.shape[0]
        estimate = torch.zeros_like(x_t)
        count = int(b * self.self_cond_rate)
        if self.self_cond_by == "coin":
            tossed = bool(_uniform(1, key, _COIN, x_t.device) < self.self_cond_rate)
            count = b if tossed else 0
        if count == 0:
            return estimate
        some = {
            name: value[:count]
            if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == b
            else value
            for name, value in kwargs.items()
        }
        pred = predict(
            self.denoiser, seen[:count], cond[:count], estimate[:count], self.self_cond, axis,
            **some,
        )  # fmt: skip
        x0 = self._x0(x_t[:count], pred, gamma[:count], axis)
        bound = abs(self.scale)
        estimate[:count] = x0.clamp(-bound, bound)
        return estimate

    def _expected(self, logits: Tensor, pixels: Sequence[int], axis: int) -> Tensor:
        """The bits that logits expect, N channels at `axis`."""
        assert self.groups is not None
        bits = self.channels // self.groups
        joined = one_axis(logits, pixels, axis, self.groups, bits)
        result: Tensor = foveate.bits_softmax_expectation(
            joined, bits, groups=self.groups, scale=self.scale, bit_order=self.bit_order, dim=axis
        )
        return result

    def _x0(self, x_t: Tensor, pred: Tensor, gamma: Tensor, axis: int) -> Tensor:
        """x0 by the objective; `foveate.ddim_step` states the formulas."""
        if self.objective == "softmax":
            return self._expected(pred, pixel_shape(x_t.shape, axis), axis).float()
        f = pred.float()
        if self.objective == "x":
            return f
        if self.objective == "sigmoid":
            return self.scale * (2 * f.sigmoid() - 1)
        per_sample = (-1, *(1,) * (x_t.ndim - 1))
        signal = gamma.sqrt().to(f).view(per_sample)
        spread = (1 - gamma).sqrt().to(f).view(per_sample)
        return (x_t - spread * f) / signal if self.objective == "eps" else signal * x_t - spread * f

    def _require_samples(self, axis: int) -> None:
        if axis == 0:
            raise ValueError(f"dim={self.dim} must not be axis 0, which holds the samples")

    def _device(self) -> torch.device:
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return torch.device("cpu")

    @torch.no_grad()
    def sample(
        self,
        shape: Sequence[int],
        *,
        iterations: int = 100,
        method: str = "ddim",
        schedule: Schedule | None = None,
        td: float = 0.0,
        max_value: int | Sequence[int] | None = None,
        dtype: torch.dtype = torch.int64,
        return_bits: bool = False,
        clip: float | str | None = "auto",
        variance: str = "large",
        final: str = "x0",
        self_cond_decay: float = 0.0,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        **kwargs: Any,
    ) -> Any:
        """Ids drawn from noise, in the denoiser's mode (call `eval()` first) and on its device.

        Args:
            shape: pixel axes, `[b, *]`.
            schedule: None is the one of training.
            max_value: ids above it become it; an int, or one for each map.
            dtype: dtype of the ids.
            return_bits: also return the analog bits.
            iterations, method, td, clip, variance, final, self_cond_decay, seed, generator,
                callback: as in `sample`.
            kwargs: handed to the denoiser.

        Returns:
            Ids `[*pixel]`, or with K maps at `dim` for a tuple of bits; or (ids, bits).

        Raises:
            TypeError, ValueError: as `sample` and `foveate.bits_decode`.
        """
        pixels = tuple(integer("shape", size, 0) for size in shape)
        axis = normalize_dim(self.dim, len(pixels) + 1)
        self._require_samples(axis)

        def denoise(x: Tensor, cond: Tensor, *estimate: Tensor) -> Tensor:
            pred = self.denoiser(x, cond, *estimate, **kwargs)
            return self._expected(pred, pixels, axis) if self.objective == "softmax" else pred

        bits = sample(
            denoise,
            (*pixels[:axis], self.channels, *pixels[axis:]),
            iterations=iterations,
            method=method,
            schedule=self.schedule if schedule is None else schedule,
            condition=self.condition,
            pred_type="x" if self.objective == "softmax" else self.objective,
            scale=self.scale,
            clip=clip,
            td=td,
            self_cond=self.self_cond,
            self_cond_decay=self_cond_decay,
            variance=variance,
            normalize_input=self.normalize_input,
            final=final,
            seed=seed,
            generator=generator,
            dim=axis,
            device=self._device(),
            callback=callback,
        )
        ids = foveate.bits_decode(
            bits,
            n_bits=self.n_bits,
            max_value=max_value,
            bit_order=self.bit_order,
            dim=axis,
            dtype=dtype,
        )
        return (ids, bits) if return_bits else ids

    @torch.no_grad()
    def sample_video(
        self,
        frames: Sequence[dict[str, Any]],
        shape: Sequence[int],
        *,
        iterations: int = 100,
        iterations_rest: int | None = None,
        offsets: Sequence[int] = (-2, -1),
        max_value: int | Sequence[int] | None = None,
        cond_name: str = "cond_map",
        seed: int | Tensor | None = None,
        method: str = "ddim",
        schedule: Schedule | None = None,
        td: float = 0.0,
        dtype: torch.dtype = torch.int64,
        clip: float | str | None = "auto",
        variance: str = "large",
        final: str = "x0",
        self_cond_decay: float = 0.0,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Ids of a video, frame after frame, each conditioned on the decoded ones before it.

        Source: Pix2Seq-D (ICCV 2023), section 3.4.

        Args:
            frames: the denoiser's keyword arguments for each frame.
            shape: pixel axes of a frame, `[b, *]`.
            iterations: steps of the first frame.
            iterations_rest: steps of the others; None is `iterations`.
            offsets: which earlier frames, as in `past_frames`.
            cond_name: the denoiser's keyword that gets their bits, F N channels at `dim`.
            seed: of the first frame; frame f takes seed + f (modulo 2^63).
            max_value, method, schedule, td, dtype, clip, variance, final, self_cond_decay,
                generator, callback: as in `sample`.

        Returns:
            Ids `[b, frames, *]`.

        Raises:
            ValueError: no frames, a frame that holds `cond_name` itself; and as `sample`.
        """
        if not frames:
            raise ValueError("frames must hold at least one frame, got none")
        device = self._device()
        drawn, number, _ = noise_key(seed, 0, generator, device)
        history: list[Tensor] = []
        for index, given in enumerate(frames):
            if cond_name in given:
                raise ValueError(f"frames must not hold {cond_name!r}, which earlier frames fill")
            past: Any = encoded_past(
                history, shape, offsets, self.n_bits, self.scale, self.dim, torch.float32, 0.0,
                None, device, self.bit_order,
            )  # fmt: skip
            key: int | Tensor = (number + index) % 2**63
            if drawn is not None:
                key = (drawn + index) & (2**63 - 1)
            rest = index > 0 and iterations_rest is not None
            history.append(
                self.sample(
                    shape,
                    iterations=iterations_rest if rest else iterations,  # type: ignore[arg-type]
                    method=method,
                    schedule=schedule,
                    td=td,
                    max_value=max_value,
                    dtype=dtype,
                    clip=clip,
                    variance=variance,
                    final=final,
                    self_cond_decay=self_cond_decay,
                    seed=key,
                    callback=callback,
                    **{**given, cond_name: past},
                )
            )
        return torch.stack(history, 1)


def _uniform(count: int, key: int | Tensor, offset: int, device: torch.device) -> Tensor:
    """`[count]` float64 in (0, 1): the normal distribution's share below the noise stream."""
    normal = foveate.bits_noise((count, 1), key, offset=offset, device=device)
    return torch.erfc(normal[:, 0].double() / -math.sqrt(2)) / 2


def _given_times(times: Tensor, x: Tensor) -> Tensor:
    if not isinstance(times, Tensor) or not times.is_floating_point():
        kind = times.dtype if isinstance(times, Tensor) else type(times).__name__
        raise TypeError(f"times must be a floating tensor, got {kind}")
    if tuple(times.shape) != (x.shape[0],):
        raise ValueError(f"times must be [b] = ({x.shape[0]},), got {tuple(times.shape)}")
    if times.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~((times >= 0) & (times <= 1))
        if bool(wrong.any()):
            raise ValueError(f"times must be in [0, 1], got {float(times[wrong][0])}")
    return times.detach().to(x.device).double()
