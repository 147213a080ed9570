"""The noise stream, operation by operation, and noisy bits."""

from __future__ import annotations

import torch

from foveate.ops.analog_bits.layout import split_at
from foveate.ops.analog_bits.reference.codec import bits_encode
from foveate.ops.analog_bits.seeds import pixels_per_sample

_LOW = 0xFFFFFFFF
_RADIUS = (
    0.128816471,
    -0.131287545,
    0.141811922,
    -0.166245535,
    0.200022861,
    -0.250008106,
    0.333333164,
)
_SIN = (0.0796802267, -0.64596349, 1.57079637)
_COS = (-0.0208615288, 0.253669411, -1.23370051, 1.0)


def _fma(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """float32 fma(a, b, c), rounded once: the sum is rounded to odd in float64, then to float32."""
    b, c = torch.as_tensor(b, device=a.device), torch.as_tensor(c, device=a.device)
    product = a.double() * b.float().double()  # exact
    other = c.float().double()
    total = product + other
    back = total - product
    rest = (product - (total - back)) + (other - back)  # TwoSum: what the addition lost, exactly
    bits = total.view(torch.int64)
    odd = bits & 1 == 1
    away = (rest > 0) == (total > 0)  # the exact sum is larger in magnitude
    nudged = torch.where(away, bits + 1, bits - 1).view(torch.float64)
    return torch.where((rest != 0) & ~odd, nudged, total).float()


def _polynomial(coefficients: tuple[float, ...], x: torch.Tensor, first: float) -> torch.Tensor:
    value = torch.full_like(x, first)
    for coefficient in coefficients:
        value = _fma(value, x, coefficient)
    return value


def _multiply(m: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the product of two 32-bit numbers."""
    high = (m * (x >> 16) + (m * (x & 0xFFFF) >> 16)) >> 16
    return high & _LOW, (m * x) & _LOW


def philox(
    c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 of int64 tensors that hold 32-bit words; `seed` is the 64-bit key."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        h0, l0 = _multiply(0xD2511F53, c0)
        h1, l1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _unit(word: torch.Tensor) -> torch.Tensor:
    return word.float() * 2.0**-32 + 2.0**-33  # in (0, 1]


def _radius(u: torch.Tensor) -> torch.Tensor:
    bits = u.view(torch.int32) + (0x3F800000 - 0x3F3504F3)
    k = ((bits >> 23) - 127).float()
    f = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1.0
    p = _polynomial(_RADIUS, f, -0.0785961374)
    t = _fma(f * f, _fma(f, p, -0.5), f)
    ln = _fma(k, 0.693145752, _fma(k, 1.42860677e-06, t))
    # float64 first: torch's float32 sqrt is not correctly rounded on every CPU.
    return (-2.0 * ln).double().sqrt().float()


def _turn(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    t = 4.0 * u
    q = t.round()  # ties to even, as the kernels' addition of 1.5 * 2^23
    d = t - q
    d2 = d * d
    s = _polynomial(_SIN, d2, -0.00460217707) * d
    c = _polynomial(_COS, d2, 0.000906743517)
    quadrant = q.int() & 3
    cosine = torch.where(quadrant % 2 == 1, s, c)
    sine = torch.where(quadrant % 2 == 1, c, s)
    return (
        torch.where((quadrant == 1) | (quadrant == 2), -cosine, cosine),
        torch.where(quadrant >= 2, -sine, sine),
    )


def noise_stream(
    shape: torch.Size | tuple[int, ...],
    dim: int,
    seed_tensor: torch.Tensor | None,
    seed: int,
    offset: int,
    device: torch.device,
) -> torch.Tensor:
    """float32 noise of `shape`: four normals for each pixel and group of four channels."""
    outer, inner = split_at(shape, dim)
    channels = shape[dim]
    key = torch.tensor([seed], device=device) if seed_tensor is None else seed_tensor
    pixel = torch.arange(outer * inner, device=device).view(-1, 1)  # [P, 1]
    group = torch.arange((channels + 3) // 4, device=device).view(1, -1)  # [1, Q]
    pixel, group = torch.broadcast_tensors(pixel, group)
    w0, w1, w2, w3 = philox(
        pixel & _LOW, pixel >> 32, group, torch.full_like(group, offset), key
    )  # [P, Q] each
    r0, r2 = _radius(_unit(w0)), _radius(_unit(w2))
    (cos0, sin0), (cos2, sin2) = _turn(_unit(w1)), _turn(_unit(w3))
    z = torch.stack([r0 * cos0, r0 * sin0, r2 * cos2, r2 * sin2], -1)  # [P, Q, 4]
    z = z.flatten(1)[:, :channels]  # [P, N]
    return z.view(outer, inner, channels).transpose(1, 2).reshape(tuple(shape))


def bits_noise(
    out: torch.Tensor, dim: int, seed_tensor: torch.Tensor | None, seed: int, offset: int
) -> None:
    out.copy_(noise_stream(out.shape, dim, seed_tensor, seed, offset, out.device))


def bits_q_sample(
    x: torch.Tensor,
    n_bits: list[int],
    high: float,
    low: float,
    msb: bool,
    dim: int,
    gamma: torch.Tensor,
    noise: torch.Tensor | None,
    seed_tensor: torch.Tensor | None,
    seed: int,
    offset: int,
    check: bool,
    *,
    out: torch.Tensor,
    noise_out: torch.Tensor | None,
) -> None:
    """x_t = sqrt(g) s + sqrt(1 - g) e (DDPM, eq. 4), in float64 for float64 results."""
    work = torch.float64 if out.dtype == torch.float64 else torch.float32
    if noise is None:
        noise = noise_stream(out.shape, dim, seed_tensor, seed, offset, out.device)
    level = spread_over_pixels(gamma, out.shape, dim)  # [*outer, 1, *inner]
    bits = bits_encode(x, n_bits, 1.0, 0.0, msb, dim, work, check)  # [*outer, N, *inner]
    signal = torch.where(bits > 0, (level.sqrt() * high).to(work), (level.sqrt() * low).to(work))
    out.copy_((1.0 - level).sqrt().to(work) * noise.to(work) + signal)
    if noise_out is not None:
        noise_out.copy_(noise)


def spread_over_pixels(gamma: torch.Tensor, shape: torch.Size, dim: int) -> torch.Tensor:
    """gamma of each pixel: `[b]` or `[1]` to `[*outer, 1, *inner]`."""
    outer, inner = split_at(shape, dim)
    pixels = torch.arange(outer * inner, device=gamma.device)
    levels = gamma[(pixels // pixels_per_sample(gamma, shape, dim)).clamp(max=len(gamma) - 1)]
    return levels.view(*shape[:dim], 1, *shape[dim + 1 :])
