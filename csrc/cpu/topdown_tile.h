// What the attention kernels share: packed panels, the 6 x 16 product, a row's softmax. Internal
// linkage only: the header is compiled into every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "dtypes.h"
#include "elementary.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace foveate::FOVEATE_ISA {
namespace {

using std::int64_t;

constexpr int64_t kTile = 6;        // rows of a product tile
constexpr int64_t kPanel = 16;      // its columns
constexpr int64_t kMostRows = 96;   // queries that share a block of scores
constexpr int64_t kScores = 49152;  // floats of such a block: 192 KiB, so that it stays in L2
constexpr int64_t kChain = 1024;    // keys whose weighted values are added in one chain
constexpr float kLog2E = 1.44269504F;
constexpr float kLn2 = 0.693147181F;
constexpr float kInf = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Sizes and element strides, in the order in which Python lists them. The innermost axis of q, k,
// v, v_td and every result is contiguous; that of the mask has stride 0 or 1.
struct Layout {
  int64_t b, h, n, m, d;
  int64_t q[3], k[3], v[3], td[3];  // of image, head and row
  int64_t mask[4];                  // of image, head, query and key
  int64_t out[3];                   // of the output, or of its gradient
};

enum MaskKind : int { kNoMask = 0, kAllowed = 1, kAdded = 2 };

// The scores of one head: where a row is cut off, and what is added to it.
struct Mask {
  int kind;
  const void* data;  // at the head's first query
  int64_t row, key;  // strides
  bool causal;
};

[[maybe_unused]] int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Queries in a block: as many as fit, all blocks alike.
[[maybe_unused]] int64_t block_rows(int64_t n, int64_t m) {
  const int64_t fit = std::min(kMostRows, kScores / std::max<int64_t>(round_up(m, kPanel), 1));
  const int64_t most = std::max(fit / kTile * kTile, kTile);
  const int64_t blocks = std::max<int64_t>((n + most - 1) / most, 1);
  return round_up(std::max<int64_t>((n + blocks - 1) / blocks, 1), kTile);
}

// Floats between the rows of a block of scores: whole panels, and whole tiles of keys.
[[maybe_unused]] int64_t score_stride(int64_t m) { return round_up(m, kPanel) + kPanel; }

#if defined(__AVX2__)
[[maybe_unused]] inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
[[maybe_unused]] inline __m256 load8(const bf16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
[[maybe_unused]] inline __m256 load8(const f16* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
#endif

// Rows [count, d] of a head, with what is added to them: a second tensor, a vector.
template <typename T>
struct Rows {
  const T* x;
  int64_t stride;
  const T* more;  // or null
  int64_t more_stride;
  const T* bias;  // [d], or null

  [[gnu::always_inline]] float at(int64_t row, int64_t k) const {
    float value = to_float(x[row * stride + k]);
    if (more != nullptr) value += to_float(more[row * more_stride + k]);
    if (bias != nullptr) value += to_float(bias[k]);
    return value;
  }
#if defined(__AVX2__)
  [[gnu::always_inline]] __m256 at8(int64_t row, int64_t k) const {
    __m256 value = load8(x + row * stride + k);
    if (more != nullptr) value = _mm256_add_ps(value, load8(more + row * more_stride + k));
    if (bias != nullptr) value = _mm256_add_ps(value, load8(bias + k));
    return value;
  }
#endif
};

#if defined(__AVX2__)
// out[c * kPanel + r] = row[r][c] of an 8 x 8 block.
[[gnu::always_inline]] inline void transpose8(const __m256 (&row)[8], float* out) {
  __m256 pair[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  __m256 quad[8];
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_store_ps(out + i * kPanel, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20));
    _mm256_store_ps(out + (i + 4) * kPanel, _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31));
  }
}
#endif

// Panels of 16 rows, transposed: to[(row / 16) * 16 d + k * 16 + row % 16]; missing rows are zero.
template <typename T>
void pack_transposed(const Rows<T>& from, int64_t count, int64_t d, float* to) {
  for (int64_t first = 0; first < count; first += kPanel, to += kPanel * d) {
    for (int64_t half = 0; half < kPanel; half += 8) {
      const int64_t row = first + half;
      const int64_t rows = std::clamp<int64_t>(count - row, 0, 8);
      int64_t k = 0;
#if defined(__AVX2__)
      for (; k + 8 <= d; k += 8) {
        __m256 block[8];
        for (int r = 0; r < 8; ++r)
          block[r] = r < rows ? from.at8(row + r, k) : _mm256_setzero_ps();
        transpose8(block, to + k * kPanel + half);
      }
#endif
      for (; k < d; ++k) {
        for (int64_t r = 0; r < 8; ++r) {
          to[k * kPanel + half + r] = r < rows ? from.at(row + r, k) : 0.0F;
        }
      }
    }
  }
}

// Panels of 16 columns: to[(k / 16) * 16 count + row * 16 + k % 16]; missing columns are zero.
template <typename T>
void pack_columns(const Rows<T>& from, int64_t count, int64_t d, float* to) {
  for (int64_t first = 0; first < d; first += kPanel, to += kPanel * count) {
    for (int64_t row = 0; row < count; ++row) {
      float* out = to + row * kPanel;
      int64_t k = 0;
#if defined(__AVX2__)
      for (; k < kPanel && first + k + 8 <= d; k += 8) {
        _mm256_store_ps(out + k, from.at8(row, first + k));
      }
#endif
      for (; k < kPanel; ++k) out[k] = first + k < d ? from.at(row, first + k) : 0.0F;
    }
  }
}

// Rows [count, d] times a factor, row by row at a stride of whole panels; missing rows up to a
// whole tile and missing columns are zero.
template <typename T>
void pack_rows(const Rows<T>& from, int64_t count, int64_t d, float factor, float* to) {
  const int64_t width = round_up(d, kPanel);
  for (int64_t row = 0; row < count; ++row, to += width) {
    int64_t k = 0;
#if defined(__AVX2__)
    for (; k + 8 <= d; k += 8) {
      _mm256_store_ps(to + k, _mm256_mul_ps(from.at8(row, k), _mm256_set1_ps(factor)));
    }
#endif
    for (; k < d; ++k) to[k] = from.at(row, k) * factor;
    for (; k < width; ++k) to[k] = 0.0F;
  }
  std::fill(to, to + (round_up(count, kTile) - count) * width, 0.0F);
}

// What happens to a product: it is stored, added as a whole (short chains of roundings), or stored
// times a factor of each row.
enum Finish : int { kStore, kAdd, kScale };

// C[6, 8 W] from A[6, depth] B[depth, 8 W]. A lies row by row, or (Across) step by step: its six
// rows are neighbours in memory, its steps `a_stride` apart.
template <int W, Finish F, bool Across>
[[gnu::always_inline]] inline void tile(int64_t depth, const float* a, int64_t a_stride,
                                        const float* b, int64_t b_stride, float* c,
                                        int64_t c_stride, const float* factor) {
  const int64_t a_row = Across ? 1 : a_stride;
  const int64_t a_step = Across ? a_stride : 1;
#if defined(__AVX2__)
  __m256 sum[kTile][W];
#pragma GCC unroll 6
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      sum[r][w] = _mm256_setzero_ps();
    }
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_stride) {
    __m256 right[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) right[w] = _mm256_load_ps(b + 8 * w);
#pragma GCC unroll 6
    for (int r = 0; r < kTile; ++r) {
      const __m256 left = _mm256_broadcast_ss(a + r * a_row);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sum[r][w] = _mm256_fmadd_ps(left, right[w], sum[r][w]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kTile; ++r) {
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      __m256 value = sum[r][w];
      if (F == kAdd) value = _mm256_add_ps(value, _mm256_loadu_ps(c + r * c_stride + 8 * w));
      if (F == kScale) value = _mm256_mul_ps(value, _mm256_broadcast_ss(factor + r));
      _mm256_storeu_ps(c + r * c_stride + 8 * w, value);
    }
  }
#else
  float sum[kTile][8 * W];
  for (int64_t r = 0; r < kTile; ++r) {
    for (int64_t j = 0; j < 8 * W; ++j) sum[r][j] = 0.0F;
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_stride) {
    for (int64_t r = 0; r < kTile; ++r) {
      const float left = a[r * a_row];
#pragma omp simd
      for (int64_t j = 0; j < 8 * W; ++j) sum[r][j] = madd(left, b[j], sum[r][j]);
    }
  }
  for (int64_t r = 0; r < kTile; ++r) {
    for (int64_t j = 0; j < 8 * W; ++j) {
      const float value = F == kScale ? sum[r][j] * factor[r] : sum[r][j];
      c[r * c_stride + j] = F == kAdd ? c[r * c_stride + j] + value : value;
    }
  }
#endif
}

// The same for a panel of which `columns` are used: half of it if they fit.
template <Finish F, bool Across>
void product(int64_t columns, int64_t depth, const float* a, int64_t a_stride, const float* b,
             int64_t b_stride, float* c, int64_t c_stride, const float* factor) {
  if (columns > 8) {
    tile<2, F, Across>(depth, a, a_stride, b, b_stride, c, c_stride, factor);
  } else {
    tile<1, F, Across>(depth, a, a_stride, b, b_stride, c, c_stride, factor);
  }
}

// scores[rows, keys] = left[rows, d] right^T, right in transposed panels.
[[maybe_unused]] void score_block(int64_t rows, int64_t keys, int64_t d, const float* left,
                                  const float* right, float* scores, int64_t stride) {
  const int64_t width = round_up(d, kPanel);
  for (int64_t key = 0; key < keys; key += kPanel) {
    for (int64_t row = 0; row < rows; row += kTile) {
      product<kStore, false>(keys - key, d, left + row * width, width, right + key * d, kPanel,
                             scores + row * stride + key, stride, nullptr);
    }
  }
}

// Adds the mask to a row of `count` scores (base 2); -inf where it forbids.
[[maybe_unused]] void apply_mask(const Mask& mask, int64_t query, int64_t count, float* s) {
  if (mask.kind == kAllowed) {
    const auto* allowed = static_cast<const unsigned char*>(mask.data) + query * mask.row;
    if (mask.key == 0) {
      if (count > 0 && *allowed == 0) std::fill(s, s + count, -kInf);
      return;
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) s[j] = allowed[j] != 0 ? s[j] : -kInf;
  } else if (mask.kind == kAdded) {
    const float* added = static_cast<const float*>(mask.data) + query * mask.row;
    if (mask.key == 0) {
      const float w = count > 0 ? *added : 0.0F;
#pragma omp simd
      for (int64_t j = 0; j < count; ++j) s[j] = w == -kInf ? -kInf : madd(w, kLog2E, s[j]);
      return;
    }
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      s[j] = added[j] == -kInf ? -kInf : madd(added[j], kLog2E, s[j]);
    }
  }
}

// Zeroes the slopes of the scores that the mask replaced.
[[maybe_unused]] void close_masked(const Mask& mask, int64_t query, int64_t count, float* s) {
  if (mask.kind == kAllowed) {
    const auto* allowed = static_cast<const unsigned char*>(mask.data) + query * mask.row;
    for (int64_t j = 0; j < count; ++j) s[j] = allowed[j * mask.key] != 0 ? s[j] : 0.0F;
  } else if (mask.kind == kAdded) {
    const float* added = static_cast<const float*>(mask.data) + query * mask.row;
    for (int64_t j = 0; j < count; ++j) s[j] = added[j * mask.key] == -kInf ? 0.0F : s[j];
  }
}

// 2^x for x <= 127, relative error below 2e-7, 2^0 = 1; below 2^-126.5 zero; NaN stays NaN.
[[maybe_unused, gnu::always_inline]] inline float exp2_(float x) {
  constexpr float kRound = 12582912.0F + 127.0F;  // the low bits of x + kRound are its exponent
  const float clamped = x < -127.0F ? -127.0F : x;
  const float shifted = clamped + kRound;
  const float f = clamped - (shifted - kRound);
  float p = 0.001326472731307149F;
  p = madd(p, f, 0.009671512991189957F);
  p = madd(p, f, 0.05550733581185341F);
  p = madd(p, f, 0.24022242426872253F);
  p = madd(p, f, 0.6931470036506653F);
  p = madd(p, f, 1.0F);
  return p * std::bit_cast<float>(std::bit_cast<std::uint32_t>(shifted) << 23);
}

// The largest of `count` scores, a multiple of 8.
[[maybe_unused]] float row_high(const float* s, int64_t count) {
#if defined(__AVX2__)
  __m256 high[4];
  for (auto& lane : high) lane = _mm256_set1_ps(-kInf);
  int64_t j = 0;
  for (; j + 32 <= count; j += 32) {
    for (int i = 0; i < 4; ++i) high[i] = _mm256_max_ps(high[i], _mm256_load_ps(s + j + 8 * i));
  }
  for (; j < count; j += 8) high[0] = _mm256_max_ps(high[0], _mm256_load_ps(s + j));
  high[0] = _mm256_max_ps(_mm256_max_ps(high[0], high[1]), _mm256_max_ps(high[2], high[3]));
  alignas(32) float lane[8];
  _mm256_store_ps(lane, high[0]);
  return *std::max_element(lane, lane + 8);
#else
  float high = -kInf;
#pragma omp simd reduction(max : high)
  for (int64_t j = 0; j < count; ++j) high = s[j] > high ? s[j] : high;
  return high;
#endif
}

// s <- 2^(s - shift) over `count` scores, a multiple of 8; returns their sum.
[[maybe_unused]] float row_exp(float* s, int64_t count, float shift) {
  constexpr int64_t kLanes = 16;
  float lane[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const float e = exp2_(s[j + l] - shift);
      s[j + l] = e;
      lane[l] += e;
    }
  }
  for (; j < count; j += 8) {
#pragma omp simd
    for (int64_t l = 0; l < 8; ++l) {
      const float e = exp2_(s[j + l] - shift);
      s[j + l] = e;
      lane[l] += e;
    }
  }
  float sum = 0.0F;
  for (int64_t l = 0; l < 8; ++l) sum += lane[l] + lane[l + 8];
  return sum;
}

// Whether every element of the rows is finite; what a causal mask skips must be.
template <typename T>
bool all_finite(const Rows<T>& from, int64_t count, int64_t d) {
  float spoiled = 0.0F;
  for (int64_t row = 0; row < count; ++row) {
#pragma omp simd reduction(+ : spoiled)
    for (int64_t k = 0; k < d; ++k) spoiled += 0.0F * from.at(row, k);
  }
  return spoiled == 0.0F;
}

// What both directions read; td and each bias may be null.
template <typename T>
struct Inputs {
  const T *q, *k, *v, *td, *q_bias, *k_bias, *v_bias;
  const void* mask;
  int mask_kind;
  bool causal;
  float scale;
};

// out[rows, d] = factor P V, rows of one block.
template <typename T>
void weigh_values(int64_t rows, int64_t keys, int64_t m, int64_t d, const float* p, int64_t stride,
                  const float* values, const float* factor, float* spare, T* out,
                  int64_t out_stride) {
  for (int64_t row = 0; row < rows; row += kTile) {
    const int64_t used = std::min(kTile, rows - row);
    for (int64_t first = 0; first < d; first += kPanel) {
      const int64_t columns = std::min(kPanel, d - first);
      const float* panel = values + first * m;
      const float* left = p + row * stride;
      T* to = out + row * out_stride + first;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (used == kTile && columns % 8 == 0 && keys <= kChain) {
          product<kScale, false>(columns, keys, left, stride, panel, kPanel, to, out_stride,
                                 factor + row);
          continue;
        }
      }
      const int64_t chain = std::min(keys, kChain);
      product<kStore, false>(columns, chain, left, stride, panel, kPanel, spare, kPanel, nullptr);
      for (int64_t key = chain; key < keys; key += kChain) {
        product<kAdd, false>(columns, std::min(kChain, keys - key), left + key, stride,
                             panel + key * kPanel, kPanel, spare, kPanel, nullptr);
      }
      for (int64_t r = 0; r < used; ++r) {
        for (int64_t j = 0; j < columns; ++j) {
          to[r * out_stride + j] = from_float<T>(spare[r * kPanel + j] * factor[row + r]);
        }
      }
    }
  }
}

// Where a head's rows begin.
[[maybe_unused]] inline int64_t place(const int64_t (&stride)[3], int64_t image, int64_t head) {
  return image * stride[0] + head * stride[1];
}

template <typename T>
Rows<T> rows_of(const T* x, const int64_t (&stride)[3], const T* more,
                const int64_t (&more_stride)[3], const T* bias, int64_t image, int64_t head,
                int64_t d) {
  return {x + place(stride, image, head), stride[2],
          more == nullptr ? nullptr : more + place(more_stride, image, head), more_stride[2],
          bias == nullptr ? nullptr : bias + head * d};
}

[[maybe_unused]] Mask mask_of(const Layout& at, int kind, const void* data, bool causal,
                              int64_t image, int64_t head) {
  const int64_t first = image * at.mask[0] + head * at.mask[1];
  const auto* bytes = static_cast<const unsigned char*>(data);
  const int64_t item = kind == kAdded ? 4 : 1;
  return {kind, data == nullptr ? nullptr : bytes + first * item, at.mask[2], at.mask[3], causal};
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
