// Elementary functions as scalar inline code that vectorises under `omp simd`. Unlike philox.h they
// promise an accuracy, not bits: madd is fused where the instruction set has it.
// Internal linkage only: this header is compiled into every instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace foveate::FOVEATE_ISA {
namespace {

[[maybe_unused, gnu::always_inline]] inline float madd(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

[[maybe_unused, gnu::always_inline]] inline double madd(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x, relative error below 3e-7 (of subnormal results: one unit in the last place); inf
// above 88.7; NaN stays NaN.
[[maybe_unused, gnu::always_inline]] inline float fast_exp(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23
  const float clamped = x < -104.0F ? -104.0F : (x > 89.0F ? 89.0F : x);
  const float n = madd(clamped, 1.44269504F, kRound) - kRound;
  const float r = madd(n, 2.12194440e-4F, madd(n, -0.693359375F, clamped));
  float p = 0.00139560667F;
  p = madd(p, r, 0.00837513525F);
  p = madd(p, r, 0.0416660830F);
  p = madd(p, r, 0.166664153F);
  p = madd(p, r, 0.5F);
  p = madd(p, r, 1.0F);
  p = madd(p, r, 1.0F);
  // 2^n in two factors, so that n = 128 and subnormal results are reached.
  const auto k = static_cast<std::int32_t>(n);
  const std::int32_t half = k >> 1;
  const float a = std::bit_cast<float>((half + 127) << 23);
  const float b = std::bit_cast<float>((k - half + 127) << 23);
  return p * a * b;
}

// log(1 + e) for e in [0, 1], relative error below 1e-7.
[[maybe_unused, gnu::always_inline]] inline float log1p_unit(float e) {
  float p = 0.00203024154F;
  p = madd(p, e, -0.0134075312F);
  p = madd(p, e, 0.0414782278F);
  p = madd(p, e, -0.0824417546F);
  p = madd(p, e, 0.124184363F);
  p = madd(p, e, -0.161056921F);
  p = madd(p, e, 0.198907480F);
  p = madd(p, e, -0.249872714F);
  p = madd(p, e, 0.333325595F);
  p = madd(p, e, -0.499999821F);
  p = madd(p, e, 1.0F);
  return p * e;
}

[[maybe_unused]] inline double fast_exp(double x) { return std::exp(x); }
[[maybe_unused]] inline double log1p_unit(double e) { return std::log1p(e); }

}  // namespace
}  // namespace foveate::FOVEATE_ISA
