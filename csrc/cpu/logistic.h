// exp, log(1 + e^u) and its slope, as loops over them vectorise. Internal linkage only: the header
// is compiled into every instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace foveate::FOVEATE_ISA {
namespace {

template <typename T>
[[maybe_unused, gnu::always_inline]] inline T madd(T a, T b, T c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x for x <= 88, NaN for NaN; relative error below 2e-7 (of subnormal results: one unit in the
// last place).
[[maybe_unused, gnu::always_inline]] inline float exp_(float x) {
  const float clamped = x < -104.0F ? -104.0F : x;
  const float shifted = madd(clamped, 1.442695041F, 12582912.0F);
  const float k = shifted - 12582912.0F;
  float r = madd(k, -0.693359375F, clamped);
  r = madd(k, 2.12194440e-4F, r);
  const float r2 = r * r;
  const float low = madd(0.16666576F, r, 0.5F);
  const float high = madd(0.008363236F, r, 0.041666463F);
  const float p = madd(madd(0.0013933734F, r2, high), r2, low);
  const float mantissa = madd(p, r2, r) + 1.0F;
  // 2^k in two factors, so that subnormal results are reached.
  const std::int32_t exponent = std::bit_cast<std::int32_t>(shifted) - 0x4b400000;
  const std::int32_t half = exponent >> 1;
  const float first = std::bit_cast<float>((half + 127) << 23);
  return mantissa * first * std::bit_cast<float>((exponent - half + 127) << 23);
}
[[maybe_unused, gnu::always_inline]] inline double exp_(double x) { return std::exp(x); }

// log(1 + e) for e in [0, 1]; relative error below 2e-7.
[[maybe_unused, gnu::always_inline]] inline float log1p_(float e) {
  const float e2 = e * e;
  const float e4 = e2 * e2;
  const float p01 = madd(-0.49999905F, e, 1.0F);
  const float p23 = madd(-0.24954559F, e, 0.33330005F);
  const float p45 = madd(-0.15311863F, e, 0.19678117F);
  const float p67 = madd(-0.0570642F, e, 0.10614265F);
  const float p89 = madd(-0.0032563785F, e, 0.019907162F);
  const float low = madd(p23, e2, p01);
  const float high = madd(p67, e2, p45);
  return e * madd(madd(p89, e4, high), e4, low);
}
[[maybe_unused, gnu::always_inline]] inline double log1p_(double e) { return std::log1p(e); }

constexpr int kPlain = 0;
constexpr int kSquare = 1;   // focal exponent 2
constexpr int kGeneral = 2;  // any focal exponent

// value = sigma(u)^gamma log(1 + e^u) and its slope; what is not asked for is left alone.
template <int Focal, bool Loss, bool Grad, typename T>
[[maybe_unused, gnu::always_inline]] inline void logistic(T u, T gamma, T& value, T& slope) {
  const T e = exp_(-std::abs(u));
  const bool up = u >= T(0);
  if constexpr (Focal == kPlain) {
    if constexpr (Loss) value = (u > T(0) ? u : T(0)) + log1p_(e);
    if constexpr (Grad) slope = (up ? T(1) : e) / (T(1) + e);
  } else {
    const T log = log1p_(e);
    const T sp = (u > T(0) ? u : T(0)) + log;
    const T inverse = T(1) / (T(1) + e);
    const T sigma = (up ? T(1) : e) * inverse;
    const T other = (up ? e : T(1)) * inverse;
    T power;
    if constexpr (Focal == kSquare) {
      power = sigma * sigma;
    } else {
      power = exp_(-gamma * ((u < T(0) ? -u : T(0)) + log));
    }
    if constexpr (Loss) value = power * sp;
    if constexpr (Grad) slope = power * madd(gamma * other, sp, sigma);
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
