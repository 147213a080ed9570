"""The PyTorch package `bit_diffusion` under its names: RGB images as 8 analog bits a channel.

Images are channels first, the most significant bit of a channel first (ICLR 2023).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

import foveate
from foveate._checks import floating, integer, one_of
from foveate.methods.bit_diffusion import schedules

BITS = 8

_LAYOUT: dict[str, Any] = {"bit_order": "msb", "dim": 1}


def _require_bits(bits: int) -> None:
    if bits != BITS:
        raise ValueError(f"bits must be 8, since images are multiplied by 255, got {bits!r}")


def _pixel_values(x: Tensor) -> Tensor:
    """Values in [0, 1] as uint8: trunc(255 x) clamped to 0..255."""
    floating(x=x)
    if x.ndim < 2:
        raise ValueError(f"x must be [b, c, *], got {tuple(x.shape)}")
    if x.device.type == "cpu" and bool(torch.isnan(x).any()):
        raise ValueError("x must hold values in [0, 1], got NaN")
    return (x.detach() * 255).clamp(0, 255).to(torch.uint8)


def decimal_to_bits(x: Tensor, bits: int = BITS) -> Tensor:
    """Bits -1 and 1 of an image in [0, 1]: `[b, c, h, w]` to `[b, c * 8, h, w]`, float32.

    Raises:
        TypeError: x is not floating.
        ValueError: bits is not 8, x holds NaN.
    """
    _require_bits(bits)
    values = _pixel_values(x)
    result: Tensor = foveate.bits_encode(values, (BITS,) * values.shape[1], **_LAYOUT)
    return result


def bits_to_decimal(x: Tensor, bits: int = BITS) -> Tensor:
    """The image in [0, 1] whose bits are (x > 0): `[b, c * 8, h, w]` to `[b, c, h, w]`, float32.

    Raises:
        TypeError: x is not floating.
        ValueError: bits is not 8, or does not divide the channels of x.
    """
    _require_bits(bits)
    if x.ndim < 2 or x.shape[1] % BITS or x.shape[1] == 0:
        raise ValueError(f"x must be [b, c * 8, *], got {tuple(x.shape)}")
    widths = (BITS,) * (x.shape[1] // BITS)
    values: Tensor = foveate.bits_decode(x.detach(), n_bits=widths, dtype=torch.uint8, **_LAYOUT)
    return values.float() / 255


def beta_linear_log_snr(t: Tensor) -> Tensor:
    """-log(expm1(1e-4 + 10 t^2))."""
    return schedules.log_snr_linear(t)


def alpha_cosine_log_snr(t: Tensor, s: float = 0.008) -> Tensor:
    """-log(max(cos(((t + s) / (1 + s)) pi / 2)^-2 - 1, 1e-5))."""
    return schedules.log_snr_cosine(t, s)


def log_snr_to_alpha_sigma(log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(sigmoid(log_snr)) and sqrt(sigmoid(-log_snr))."""
    return torch.sqrt(torch.sigmoid(log_snr)), torch.sqrt(torch.sigmoid(-log_snr))


_LOG_SNR = {"cosine": alpha_cosine_log_snr, "linear": beta_linear_log_snr}


class BitDiffusion(nn.Module):
    """Diffusion of an image's bits by model(x, log_snr `[b]`, self_cond or None) -> x0.

    Args:
        model: a network with an attribute `channels`, 8 for each channel of the image.
        image_size: height and width.
        timesteps: steps of sampling.
        use_ddim: whether `sample` takes `ddim_sample` or `ddpm_sample`.
        noise_schedule: "cosine" or "linear".
        time_difference: how much earlier, in [0, 1], the times that a step goes to are.
        bit_scale: value of a set bit.

    Raises:
        ValueError: an unknown noise_schedule, timesteps or image_size below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int,
        timesteps: int = 1000,
        use_ddim: bool = False,
        noise_schedule: str = "cosine",
        time_difference: float = 0.0,
        bit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        one_of("noise_schedule", noise_schedule, _LOG_SNR)
        self.model = model
        self.channels: Any = model.channels
        self.image_size = integer("image_size", image_size, 1)
        self.timesteps = integer("timesteps", timesteps, 1)
        self.use_ddim = use_ddim
        self.noise_schedule = noise_schedule
        self.log_snr = _LOG_SNR[noise_schedule]
        self.time_difference = time_difference
        self.bit_scale = bit_scale

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        for parameter in self.model.parameters():
            return parameter.device
        return torch.device("cpu")

    def get_sampling_timesteps(
        self, batch: int, *, device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        """The pairs of times (t, t') of the steps, float32 `[b]` each."""
        times = torch.linspace(1.0, 0.0, self.timesteps + 1, device=device)
        rows = times.unsqueeze(-1).expand(-1, batch).contiguous()
        return list(itertools.pairwise(rows.unbind(0)))

    def forward(self, img: Tensor) -> Tensor:
        """The mean squared error of the model's x0 for images `[b, c, h, w]` in [0, 1].

        In half of the steps, by a coin, the model's first guess is its self-condition.

        Raises:
            TypeError: img is not floating.
            ValueError: img is not `image_size` high and wide, or holds NaN.
        """
        if img.ndim != 4 or tuple(img.shape[2:]) != (self.image_size, self.image_size):
            raise ValueError(
                f"img must be [b, c, {self.image_size}, {self.image_size}], got {tuple(img.shape)}"
            )
        ids = _pixel_values(img)
        widths = (BITS,) * ids.shape[1]
        log_snr = self.log_snr(torch.rand(ids.shape[0], device=ids.device))
        gamma = log_snr.double().sigmoid()
        noised = foveate.bits_q_sample(ids, widths, gamma, scale=self.bit_scale, **_LAYOUT)
        self_cond = None
        if float(torch.rand(())) < 0.5:
            with torch.no_grad():
                self_cond = self.model(noised, log_snr, None).detach()
        pred = self.model(noised, log_snr, self_cond)
        loss: Tensor = foveate.bits_loss(pred, ids, widths, scale=self.bit_scale, **_LAYOUT)
        return loss

    @torch.no_grad()
    def sample(self, batch_size: int = 16) -> Tensor:
        """Images `[batch_size, channels / 8, image_size, image_size]` in [0, 1]."""
        draw = self.ddim_sample if self.use_ddim else self.ddpm_sample
        return draw((batch_size, self.channels, self.image_size, self.image_size))

    @torch.no_grad()
    def ddim_sample(self, shape: tuple[int, ...], time_difference: float | None = None) -> Tensor:
        """Images from bits of `shape` `[b, c * 8, h, w]` by DDIM."""
        return self._draw(shape, time_difference, ancestral=False)

    @torch.no_grad()
    def ddpm_sample(self, shape: tuple[int, ...], time_difference: float | None = None) -> Tensor:
        """Images from bits of `shape` `[b, c * 8, h, w]` by DDPM, silent where t' = 0."""
        return self._draw(shape, time_difference, ancestral=True)

    def _draw(
        self, shape: tuple[int, ...], time_difference: float | None, ancestral: bool
    ) -> Tensor:
        earlier = self.time_difference if time_difference is None else time_difference
        img = torch.randn(shape, device=self.device)
        x0: Tensor | None = None
        for time, time_next in self.get_sampling_timesteps(shape[0], device=self.device):
            target = (time_next - earlier).clamp(min=0.0)
            log_snr, log_snr_next = self.log_snr(time), self.log_snr(target)
            pred = self.model(img, log_snr, x0)
            gamma, gamma_next = log_snr.double().sigmoid(), log_snr_next.double().sigmoid()
            if ancestral:
                img, x0 = foveate.ddpm_step(
                    img, pred, gamma, gamma_next, clip=self.bit_scale, dim=1,
                    variance="small", noise=torch.randn_like(img) * _noisy(target, img),
                )  # fmt: skip
            else:
                img, x0 = foveate.ddim_step(img, pred, gamma, gamma_next, clip=self.bit_scale)
        return bits_to_decimal(img)


def _noisy(times: Tensor, x: Tensor) -> Tensor:
    """1 for each sample at a time above 0, else 0, to be multiplied with x `[b, *]`."""
    return (times > 0).to(x).view(-1, *(1,) * (x.ndim - 1))
