#include <cmath>
#include <limits>

#include "analog_bits.h"
#include "code_words.h"
#include "elementary.h"
#include "memory.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace foveate::FOVEATE_ISA {
namespace {

constexpr int64_t kBlock = 16;  // pixels of a task: a cache line of a channels-first float32 tensor

// A tensor [outer, width, inner] of a row per pixel and group; channels last is inner == 1.
struct Rows {
  int64_t outer;
  int64_t inner;

  bool last() const { return inner == 1; }
  int64_t rows() const { return last() ? 1 : outer; }
  int64_t row_pixels() const { return last() ? outer : inner; }
  int64_t blocks_per_row() const { return (row_pixels() + kBlock - 1) / kBlock; }
  int64_t blocks() const { return rows() * blocks_per_row(); }
};

struct Block {
  int64_t pixel;
  int64_t n;
  int64_t row;
  int64_t column;

  // Of value c of pixel p in a contiguous tensor of `width` values a pixel.
  int64_t at(const Rows& rows, int64_t width, int64_t p, int64_t c) const {
    return rows.last() ? (column + p) * width + c : (row * width + c) * rows.inner + column + p;
  }
};

Block block_at(const Rows& rows, int64_t index) {
  Block block{};
  block.row = index / rows.blocks_per_row();
  block.column = index % rows.blocks_per_row() * kBlock;
  block.n = std::min(kBlock, rows.row_pixels() - block.column);
  block.pixel = block.row * rows.row_pixels() + block.column;
  return block;
}

int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Copies values c .. c + n of each pixel of the block to buffer[pixel, n], and back.
template <typename T>
void read_block(const T* from, const Rows& rows, const Block& block, int64_t width, int64_t c,
                int64_t n, float* buffer) {
  if (rows.last()) {
    for (int64_t p = 0; p < block.n; ++p) {
      const T* line = from + block.at(rows, width, p, c);
      for (int64_t k = 0; k < n; ++k) buffer[p * n + k] = to_float(line[k]);
    }
    return;
  }
  for (int64_t k = 0; k < n; ++k) {
    const T* line = from + block.at(rows, width, 0, c + k);
    for (int64_t p = 0; p < block.n; ++p) buffer[p * n + k] = to_float(line[p]);
  }
}

template <typename T>
void write_block(const float* buffer, const Rows& rows, const Block& block, int64_t width,
                 int64_t c, int64_t n, T* to) {
  if (rows.last()) {
    for (int64_t p = 0; p < block.n; ++p) {
      T* line = to + block.at(rows, width, p, c);
      for (int64_t k = 0; k < n; ++k) line[k] = from_float<T>(buffer[p * n + k]);
    }
    return;
  }
  for (int64_t k = 0; k < n; ++k) {
    T* line = to + block.at(rows, width, 0, c + k);
    for (int64_t p = 0; p < block.n; ++p) line[p] = from_float<T>(buffer[p * n + k]);
  }
}

struct Softmax {
  float top;
  double sum;
};

float largest(const float* l, int64_t n) {
  float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < n; ++k) top = l[k] > top ? l[k] : top;
  return top;
}

// e[k] = exp(l[k] - top) and their sum; e may be l. Sums are float32 within 256 values, float64
// across.
Softmax exponentials(const float* l, int64_t n, float top, float* e) {
  double sum = 0.0;
  for (int64_t begin = 0; begin < n; begin += 256) {
    const int64_t end = std::min(begin + 256, n);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t k = begin; k < end; ++k) {
      const float value = fast_exp(l[k] - top);
      e[k] = value;
      part += value;
    }
    sum += static_cast<double>(part);
  }
  return {top, sum};
}

uint32_t group_target(const uint32_t* words, int64_t stride, int64_t channel, int m, bool msb) {
  const int64_t w = channel / 32;
  const int shift = static_cast<int>(channel % 32);
  uint64_t word = words[w * stride];
  if (shift + m > 32) word |= static_cast<uint64_t>(words[(w + 1) * stride]) << 32;
  const auto bits = static_cast<uint32_t>(word >> shift) & ((1U << m) - 1U);
  return msb ? reverse32(bits) >> (32 - m) : bits;
}

template <typename T>
struct Problem {
  Ids ids;
  Rows rows;
  const T* logits;
  int64_t groups;
  int m;
  const float* weight;
  int64_t pixels_per_weight;
  const float* upstream;
  bool upstream_per_pixel;
  double slope_scale;
  int threads;
  float* work;        // [threads, kBlock, 2^m]
  double* partial;    // [blocks]
  float* pixel_loss;  // [P] or null
  T* slope;           // like logits, or null; may be logits
};

template <typename T>
uint64_t cross_entropy(const Problem<T>& problem) {
  const Rows& rows = problem.rows;
  const int64_t channels = problem.groups * problem.m;
  const int64_t n_words = (channels + 31) / 32;
  const int64_t values = int64_t{1} << problem.m;
  const int64_t width = problem.groups * values;
  const int64_t blocks = rows.blocks();
  uint64_t excess = 0;
#pragma omp parallel for schedule(static) num_threads(problem.threads) if (problem.threads > 1) \
    reduction(| : excess)
  for (int64_t index = 0; index < blocks; ++index) {
    const Block block = block_at(rows, index);
    alignas(64) uint32_t words[kWords];
    float* buffer = problem.work + thread_index() * kBlock * values;
    float loss[kBlock] = {};
    float factor[kBlock];
    float weight[kBlock];
    excess |= problem.ids.pack_words(rows.last() ? block.column : block.row,
                                     rows.last() ? 0 : block.column, rows.last(), block.n, n_words,
                                     kBlock, words);
    for (int64_t p = 0; p < block.n; ++p) {
      const int64_t at = block.pixel + p;
      weight[p] =
          problem.weight == nullptr ? float(1) : problem.weight[at / problem.pixels_per_weight];
      float upstream = 1;
      if (problem.upstream != nullptr) {
        upstream = problem.upstream[problem.upstream_per_pixel ? at : 0];
      }
      factor[p] = static_cast<float>(problem.slope_scale) * upstream * weight[p];
    }
    for (int64_t g = 0; g < problem.groups; ++g) {
      read_block(problem.logits, rows, block, width, g * values, values, buffer);
      for (int64_t p = 0; p < block.n; ++p) {
        float* row = buffer + p * values;
        const uint32_t target =
            group_target(words + p, kBlock, g * problem.m, problem.m, problem.ids.msb);
        // The target stays out of the sum of the others, so that neither the loss nor its slope
        // is a difference of near equals where the target is almost certain.
        const float at_target = row[target];
        const float top = largest(row, values);
        row[target] = -std::numeric_limits<float>::infinity();
        const double others = exponentials(row, values, top, row).sum;
        const double sum = others + static_cast<double>(fast_exp(at_target - top));
        loss[p] += static_cast<float>(at_target == top ? std::log1p(others) : std::log(sum)) +
                   (top - at_target);
        if (problem.slope == nullptr) continue;
        const float scale = factor[p] / static_cast<float>(sum);
#pragma omp simd
        for (int64_t k = 0; k < values; ++k) row[k] *= scale;
        // An infinite factor gives NaN, as in factor p - factor.
        row[target] = (factor[p] - factor[p]) - factor[p] * static_cast<float>(others / sum);
      }
      if (problem.slope != nullptr) {
        write_block(buffer, rows, block, width, g * values, values, problem.slope);
      }
    }
    double total = 0.0;
    for (int64_t p = 0; p < block.n; ++p) {
      const float weighted = weight[p] * loss[p];
      if (problem.pixel_loss != nullptr) problem.pixel_loss[block.pixel + p] = weighted;
      total += static_cast<double>(weighted);
    }
    problem.partial[index] = total;
  }
  return excess;
}

// E[j] = sum of p[k] over the k whose bit j is set, from e = p sum; e is folded to its half m
// times.
void expected_bits(float* e, int m, bool msb, double sum, double scale, float* expected) {
  for (int b = m - 1; b >= 0; --b) {  // from the top bit down
    const int64_t half = int64_t{1} << b;
    float upper = 0;
#pragma omp simd reduction(+ : upper)
    for (int64_t k = 0; k < half; ++k) {
      upper += e[half + k];
      e[k] += e[half + k];
    }
    const double probability = static_cast<double>(upper) / sum;
    expected[msb ? m - 1 - b : b] = static_cast<float>(scale * (2.0 * probability - 1.0));
  }
}

template <typename T, typename Out>
void expectation(const T* logits, const Rows& rows, int64_t groups, int m, bool msb, double scale,
                 int threads, float* work, Out* out) {
  const int64_t values = int64_t{1} << m;
  const int64_t blocks = rows.blocks();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t index = 0; index < blocks; ++index) {
    const Block block = block_at(rows, index);
    float* buffer = work + thread_index() * kBlock * values;
    float expected[kBlock * 16];
    for (int64_t g = 0; g < groups; ++g) {
      read_block(logits, rows, block, groups * values, g * values, values, buffer);
      for (int64_t p = 0; p < block.n; ++p) {
        float* row = buffer + p * values;
        const Softmax softmax = exponentials(row, values, largest(row, values), row);
        expected_bits(row, m, msb, softmax.sum, scale, expected + p * m);
      }
      write_block(expected, rows, block, groups * m, g * m, m, out);
    }
  }
}

// dl[k] = 2 scale p[k] sum_j g_j (bit_j(k) - E_j).
template <typename T, typename Up>
void expectation_slope(const T* logits, const Rows& rows, int64_t groups, int m, bool msb,
                       double scale, const Up* upstream, int threads, float* work, T* slope) {
  const int64_t values = int64_t{1} << m;
  const int64_t blocks = rows.blocks();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t index = 0; index < blocks; ++index) {
    const Block block = block_at(rows, index);
    float* buffer = work + thread_index() * (kBlock + 1) * values;
    float* weights = buffer + kBlock * values;
    float g[kBlock * 16];
    for (int64_t group = 0; group < groups; ++group) {
      read_block(logits, rows, block, groups * values, group * values, values, buffer);
      read_block(upstream, rows, block, groups * m, group * m, m, g);
      for (int64_t p = 0; p < block.n; ++p) {
        float* row = buffer + p * values;
        const Softmax softmax = exponentials(row, values, largest(row, values), row);
        // sum_j g_j (bit_j(k) - E_j), from terms that stay accurate when a bit is almost certain.
        float set[16];
        float clear[16];
        std::memcpy(weights, row, size_t(values) * sizeof(float));
        for (int b = m - 1; b >= 0; --b) {
          const int64_t half = int64_t{1} << b;
          float upper = 0;
          float lower = 0;
#pragma omp simd reduction(+ : upper, lower)
          for (int64_t k = 0; k < half; ++k) {
            upper += weights[half + k];
            lower += weights[k];
            weights[k] += weights[half + k];
          }
          const float gb = g[p * m + (msb ? m - 1 - b : b)];
          set[b] = gb * static_cast<float>(static_cast<double>(lower) / softmax.sum);
          clear[b] = -gb * static_cast<float>(static_cast<double>(upper) / softmax.sum);
        }
        weights[0] = 0;
        for (int b = 0; b < m; ++b) {
          const int64_t half = int64_t{1} << b;
          for (int64_t k = 0; k < half; ++k) {
            weights[half + k] = weights[k] + set[b];
            weights[k] += clear[b];
          }
        }
        const auto factor = static_cast<float>(2.0 * scale / softmax.sum);
#pragma omp simd
        for (int64_t k = 0; k < values; ++k) row[k] *= factor * weights[k];
      }
      write_block(buffer, rows, block, groups * values, group * values, values, slope);
    }
  }
}

}  // namespace

int64_t bits_softmax_blocks(int64_t outer, int64_t inner) { return Rows{outer, inner}.blocks(); }

uint64_t bits_softmax_loss(const void* logits, int dtype, const void* x, int x_dtype,
                           int64_t x_outer_stride, int64_t x_map_stride, int64_t x_inner_stride,
                           const int32_t* n_bits, int64_t maps, int64_t outer, int64_t inner,
                           bool msb, int64_t groups, int m, const void* weight,
                           int64_t pixels_per_weight, const void* upstream, bool upstream_per_pixel,
                           double slope_scale, int threads, void* work, double* partial,
                           double* total, void* pixel_loss, void* slope) {
  *total = 0.0;
  if (outer * inner == 0) return 0;
  uint64_t excess = 0;
  const Rows rows{outer, inner};
  with_float_type(dtype, [&]<typename T>(T*) {
    if (slope != nullptr && slope != logits) {
      advise_huge_pages(slope, size_t((outer * inner * groups) << m) * sizeof(T));
    }
    excess = cross_entropy(
        Problem<T>{{x, x_dtype, x_outer_stride, x_map_stride, x_inner_stride, n_bits, maps, msb},
                   rows,
                   static_cast<const T*>(logits),
                   groups,
                   m,
                   static_cast<const float*>(weight),
                   pixels_per_weight,
                   static_cast<const float*>(upstream),
                   upstream_per_pixel,
                   slope_scale,
                   threads,
                   static_cast<float*>(work),
                   partial,
                   static_cast<float*>(pixel_loss),
                   static_cast<T*>(slope)});
  });
  for (int64_t i = 0; i < rows.blocks(); ++i) *total += partial[i];
  return excess;
}

void bits_softmax_expectation(const void* logits, int dtype, int64_t outer, int64_t inner, bool msb,
                              int64_t groups, int m, double scale, int out_dtype, int threads,
                              void* work, void* out) {
  with_float_type(dtype, [&]<typename T>(T*) {
    with_float_type(out_dtype, [&]<typename Out>(Out*) {
      expectation(static_cast<const T*>(logits), Rows{outer, inner}, groups, m, msb, scale, threads,
                  static_cast<float*>(work), static_cast<Out*>(out));
    });
  });
}

void bits_softmax_expectation_slope(const void* logits, int dtype, int64_t outer, int64_t inner,
                                    bool msb, int64_t groups, int m, double scale,
                                    const void* upstream, int threads, void* work, void* slope) {
  with_float_type(dtype, [&]<typename T>(T*) {
    expectation_slope(static_cast<const T*>(logits), Rows{outer, inner}, groups, m, msb, scale,
                      static_cast<const float*>(upstream), threads, static_cast<float*>(work),
                      static_cast<T*>(slope));
  });
}

}  // namespace foveate::FOVEATE_ISA
