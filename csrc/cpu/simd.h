// Vector primitives that need intrinsics, each with a portable twin of the same result. Everything
// has internal linkage: the header is compiled into every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace foveate::FOVEATE_ISA::simd {
namespace {

// Bit i is (bits[i] > 0) of eight float32 bit patterns; NaN and -0 give 0.
[[maybe_unused]] inline std::uint32_t positive_mask(const std::int32_t* bits) {
#if defined(__AVX2__)
  const __m256 v = _mm256_loadu_ps(reinterpret_cast<const float*>(bits));
  return static_cast<std::uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ)));
#else
  std::uint32_t mask = 0;
  for (int i = 0; i < 8; ++i) {
    mask |= (bits[i] > 0 && bits[i] <= 0x7f800000 ? 1U : 0U) << i;
  }
  return mask;
#endif
}

// Writes eight elements past the caches; out must be aligned to the row's size. Pays for outputs
// larger than the caches, which a plain store would read first.
template <typename Bits>
[[maybe_unused]] inline void stream_row(Bits* out, const Bits* row) {
#if defined(__AVX2__)
  if constexpr (sizeof(Bits) == 2) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(row)));
  } else {
    for (std::size_t i = 0; i < sizeof(Bits) / 4; ++i) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out) + i,
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(row) + i));
    }
  }
#else
  std::memcpy(out, row, 8 * sizeof(Bits));
#endif
}

// out[r * out_stride + c] = in[c * in_stride + r], r and c in 0..3.
[[maybe_unused]] inline void transpose4(const float* in, std::int64_t in_stride, float* out,
                                        std::int64_t out_stride) {
#if defined(__AVX2__)
  __m128 a = _mm_loadu_ps(in);
  __m128 b = _mm_loadu_ps(in + in_stride);
  __m128 c = _mm_loadu_ps(in + 2 * in_stride);
  __m128 d = _mm_loadu_ps(in + 3 * in_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + out_stride, b);
  _mm_storeu_ps(out + 2 * out_stride, c);
  _mm_storeu_ps(out + 3 * out_stride, d);
#else
  for (int r = 0; r < 4; ++r) {
    for (int c = 0; c < 4; ++c) out[r * out_stride + c] = in[c * in_stride + r];
  }
#endif
}

// Orders streamed stores before whatever follows.
[[maybe_unused]] inline void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA::simd
