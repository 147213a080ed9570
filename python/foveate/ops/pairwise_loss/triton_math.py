"""exp, log(1 + e^u) and its slope as Triton functions, in float32 and float64."""

from __future__ import annotations

import struct

import triton
import triton.language as tl

PLAIN, SQUARE, GENERAL = 0, 1, 2  # focal exponent 0, 2, any


def float64_pattern(value: float) -> int:
    """The bits of a number: a float argument of a kernel would be rounded to float32."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@triton.jit
def number(bits, like):
    """The number of a float64 pattern, in the dtype of `like`."""
    return tl.cast(bits.to(tl.int64), tl.float64, bitcast=True).to(like.dtype)


@triton.jit
def exponential(x):
    """e^x for x below 88; 0 for -inf, NaN for NaN."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        # x log2(e) in two parts: the hardware's 2^u is right to an ulp, a rounded u is not.
        c = tl.where(x < -200.0, -200.0, x)
        high = c * 1.4426950408889634
        low = tl.fma(c, 1.4426950408889634, -high)
        low = tl.fma(c, 1.925963033500e-8, low)
        power = tl.exp2(high)
        result = tl.fma(power * low, 0.6931471805599453, power)
    return result


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1], relative error below 2e-7 (float64: a few ulps)."""
    if e.dtype == tl.float64:
        u = 1.0 + e
        result = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        e2 = e * e
        e4 = e2 * e2
        p01 = tl.fma(e, -0.49999905, 1.0)
        p23 = tl.fma(e, -0.24954559, 0.33330005)
        p45 = tl.fma(e, -0.15311863, 0.19678117)
        p67 = tl.fma(e, -0.0570642, 0.10614265)
        p89 = tl.fma(e, -0.0032563785, 0.019907162)
        low = tl.fma(p23, e2, p01)
        high = tl.fma(p67, e2, p45)
        result = e * tl.fma(tl.fma(p89, e4, high), e4, low)
    return result


@triton.jit
def expm1(u):
    """e^u - 1 for float64 u."""
    e = tl.exp(u)
    near = (u > -40.0) & (u < 40.0) & (e != 1.0)
    log = tl.log(tl.where(near, e, 2.0))
    return tl.where(near, (e - 1.0) * (u / log), tl.where(e == 1.0, u, e - 1.0))


@triton.jit
def logistic(u, gamma, FOCAL: tl.constexpr):
    """sigma(u)^gamma log(1 + e^u) and its slope."""
    e = exponential(-tl.abs(u))
    log = log1p_unit(e)
    softplus = tl.where(u > 0.0, u, 0.0) + log
    softplus = tl.where(u != u, u, softplus)
    up = u >= 0.0
    inverse = 1.0 / (1.0 + e)
    sigma = tl.where(up, 1.0, e) * inverse
    if FOCAL == 0:
        value = softplus
        slope = sigma
    else:
        other = tl.where(up, e, 1.0) * inverse
        if FOCAL == 1:
            power = sigma * sigma
        else:
            power = exponential(-gamma * (tl.where(u < 0.0, -u, 0.0) + log))
        value = power * softplus
        slope = power * tl.fma(gamma * other, softplus, sigma)
    return value, slope
