// The noise stream of analog bits: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller in one
// fixed sequence of float32 operations, so that every instruction set and the GPU give the same
// bits. The same sequence stands in foveate/ops/analog_bits/triton/noise.py and reference/noise.py.
// Internal linkage only: this header is compiled into every instruction set.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace foveate::FOVEATE_ISA {
namespace {

struct NoiseKey {
  std::uint64_t seed;
  std::uint32_t offset;
};

constexpr int kNoiseLanes = 64;  // pixels of one call

constexpr std::uint32_t kPhiloxM0 = 0xD2511F53U;
constexpr std::uint32_t kPhiloxM1 = 0xCD9E8D57U;
constexpr std::uint32_t kPhiloxW0 = 0x9E3779B9U;
constexpr std::uint32_t kPhiloxW1 = 0xBB67AE85U;

// words[w][i] of counter (pixel + i, group, offset), i in 0..7.
[[maybe_unused]] inline void philox8(std::uint64_t pixel, std::uint32_t group, NoiseKey key,
                                     std::uint32_t (*words)[kNoiseLanes]) {
  auto k0 = static_cast<std::uint32_t>(key.seed);
  auto k1 = static_cast<std::uint32_t>(key.seed >> 32);
#if defined(__AVX2__)
  // A word of eight blocks is two vectors of four 64-bit lanes whose low halves count: the even and
  // the odd blocks. Products then need no shuffles.
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0);
  const __m256i m1 = _mm256_set1_epi64x(kPhiloxM1);
  const auto p = static_cast<long long>(pixel);
  __m256i c0[2] = {_mm256_setr_epi64x(p, p + 2, p + 4, p + 6),
                   _mm256_setr_epi64x(p + 1, p + 3, p + 5, p + 7)};
  __m256i c1[2] = {_mm256_srli_epi64(c0[0], 32), _mm256_srli_epi64(c0[1], 32)};
  __m256i c2[2] = {_mm256_set1_epi64x(group), _mm256_set1_epi64x(group)};
  __m256i c3[2] = {_mm256_set1_epi64x(key.offset), _mm256_set1_epi64x(key.offset)};
  for (int round = 0; round < 10; ++round) {
    const __m256i a = _mm256_set1_epi64x(k0);
    const __m256i b = _mm256_set1_epi64x(k1);
    for (int half = 0; half < 2; ++half) {
      const __m256i x = _mm256_mul_epu32(c0[half], m0);
      const __m256i y = _mm256_mul_epu32(c2[half], m1);
      c0[half] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(y, 32), c1[half]), a);
      c1[half] = y;
      c2[half] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(x, 32), c3[half]), b);
      c3[half] = x;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  const __m256i* result[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; ++w) {
    const __m256i merged =
        _mm256_blend_epi32(result[w][0], _mm256_slli_epi64(result[w][1], 32), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[w]), merged);
  }
#else
  for (int i = 0; i < 8; ++i) {
    const std::uint64_t p = pixel + static_cast<std::uint64_t>(i);
    auto c0 = static_cast<std::uint32_t>(p);
    auto c1 = static_cast<std::uint32_t>(p >> 32);
    std::uint32_t c2 = group;
    std::uint32_t c3 = key.offset;
    std::uint32_t a = k0;
    std::uint32_t b = k1;
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t x = std::uint64_t{kPhiloxM0} * c0;
      const std::uint64_t y = std::uint64_t{kPhiloxM1} * c2;
      c0 = static_cast<std::uint32_t>(y >> 32) ^ c1 ^ a;
      c1 = static_cast<std::uint32_t>(y);
      c2 = static_cast<std::uint32_t>(x >> 32) ^ c3 ^ b;
      c3 = static_cast<std::uint32_t>(x);
      a += kPhiloxW0;
      b += kPhiloxW1;
    }
    words[0][i] = c0;
    words[1][i] = c1;
    words[2][i] = c2;
    words[3][i] = c3;
  }
#endif
}

// fl32(fl32(w) 2^-32 + 2^-33), in (0, 1]. The conversion is exact halves and one rounding.
[[maybe_unused]] inline float unit_interval(std::uint32_t w) {
  const auto high = static_cast<float>(static_cast<std::int32_t>(w >> 16));
  const auto low = static_cast<float>(static_cast<std::int32_t>(w & 0xffffU));
  return std::fma(high, 65536.0F, low) * 0x1p-32F + 0x1p-33F;
}

// sqrt(-2 ln u). ln(2^k m) with m in [sqrt(1/2), sqrt(2)): k ln 2 + f - f^2/2 + f^3 P(f), f = m -
// 1; P is a minimax polynomial of degree 7, relative error 6e-9.
[[maybe_unused]] inline float radius(float u) {
  const std::uint32_t b = std::bit_cast<std::uint32_t>(u) + (0x3f800000U - 0x3f3504f3U);
  const auto k = static_cast<float>(static_cast<std::int32_t>(b >> 23) - 127);
  const float f = std::bit_cast<float>((b & 0x7fffffU) + 0x3f3504f3U) - 1.0F;
  float p = -0.0785961374F;
  p = std::fma(p, f, 0.128816471F);
  p = std::fma(p, f, -0.131287545F);
  p = std::fma(p, f, 0.141811922F);
  p = std::fma(p, f, -0.166245535F);
  p = std::fma(p, f, 0.200022861F);
  p = std::fma(p, f, -0.250008106F);
  p = std::fma(p, f, 0.333333164F);
  const float t = std::fma(f * f, std::fma(f, p, -0.5F), f);
  const float ln = std::fma(k, 0.693145752F, std::fma(k, 1.42860677e-06F, t));
  return std::sqrt(-2.0F * ln);
}

struct Turn {
  float cos;
  float sin;
};

// cos and sin of 2 pi u by quarter turns: 4 u = q + d with q an integer and d in [-1/2, 1/2],
// exactly.
[[maybe_unused]] inline Turn turn(float u) {
  const float t = 4.0F * u;
  const float q = (t + 12582912.0F) - 12582912.0F;
  const float d = t - q;
  const float d2 = d * d;
  float s = -0.00460217707F;
  s = std::fma(s, d2, 0.0796802267F);
  s = std::fma(s, d2, -0.64596349F);
  s = std::fma(s, d2, 1.57079637F);
  s *= d;
  float c = 0.000906743517F;
  c = std::fma(c, d2, -0.0208615288F);
  c = std::fma(c, d2, 0.253669411F);
  c = std::fma(c, d2, -1.23370051F);
  c = std::fma(c, d2, 1.0F);
  const auto quadrant = static_cast<std::uint32_t>(static_cast<std::int32_t>(q));
  const float a = (quadrant & 1U) != 0 ? s : c;
  const float b = (quadrant & 1U) != 0 ? c : s;
  return {std::bit_cast<float>(std::bit_cast<std::uint32_t>(a) ^ (((quadrant + 1U) & 2U) << 30)),
          std::bit_cast<float>(std::bit_cast<std::uint32_t>(b) ^ ((quadrant & 2U) << 30))};
}

// z[j][i] = normal of pixel + i and channel 4 group + j, for kNoiseLanes pixels.
[[maybe_unused]] inline void normals(std::uint64_t pixel, std::uint32_t group, NoiseKey key,
                                     float (*z)[kNoiseLanes]) {
  alignas(64) std::uint32_t w[4][kNoiseLanes];
  for (int i = 0; i < kNoiseLanes; i += 8) {
    std::uint32_t (*lanes)[kNoiseLanes] =
        reinterpret_cast<std::uint32_t (*)[kNoiseLanes]>(&w[0][i]);
    philox8(pixel + static_cast<std::uint64_t>(i), group, key, lanes);
  }
#pragma omp simd
  for (int i = 0; i < kNoiseLanes; ++i) {
    const float r0 = radius(unit_interval(w[0][i]));
    const float r2 = radius(unit_interval(w[2][i]));
    const Turn a0 = turn(unit_interval(w[1][i]));
    const Turn a2 = turn(unit_interval(w[3][i]));
    z[0][i] = r0 * a0.cos;
    z[1][i] = r0 * a0.sin;
    z[2][i] = r2 * a2.cos;
    z[3][i] = r2 * a2.sin;
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
