#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>

#include "pearson.h"
#include "pearson_correlation.h"
#include "pearson_source.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace foveate::FOVEATE_ISA {
namespace {

constexpr int64_t kScan = 32;  // elements whose keys are compared with both thresholds at once

// Bit l is (key[l] > least or key[l] > floors[l]) for key = value or |value|; NaN gives 0.
template <bool kAbs>
inline std::uint32_t above(const float* value, const float* floors, float least) {
  std::uint32_t mask = 0;
#if defined(__AVX2__)
  const __m256 sign = _mm256_set1_ps(-0.0F);
  const __m256 all = _mm256_set1_ps(least);
  for (int l = 0; l < kScan; l += 8) {
    __m256 key = _mm256_load_ps(value + l);
    if constexpr (kAbs) key = _mm256_andnot_ps(sign, key);
    const __m256 floor = _mm256_min_ps(all, _mm256_loadu_ps(floors + l));
    const int part = _mm256_movemask_ps(_mm256_cmp_ps(key, floor, _CMP_GT_OQ));
    mask |= static_cast<std::uint32_t>(part) << l;
  }
#else
  int any = 0;
#pragma omp simd reduction(| : any)
  for (int l = 0; l < kScan; ++l) {
    const float key = kAbs ? std::fabs(value[l]) : value[l];
    any |= key > std::min(least, floors[l]) ? 1 : 0;
  }
  if (any == 0) return 0;
  for (int l = 0; l < kScan; ++l) {
    const float key = kAbs ? std::fabs(value[l]) : value[l];
    mask |= (key > std::min(least, floors[l]) ? 1U : 0U) << l;
  }
#endif
  return mask;
}

template <bool kAbs>
inline std::uint32_t above(const double* value, const double* floors, double least) {
  std::uint32_t mask = 0;
  for (int l = 0; l < kScan; ++l) {
    const double key = kAbs ? std::fabs(value[l]) : value[l];
    mask |= (key > std::min(least, floors[l]) ? 1U : 0U) << l;
  }
  return mask;
}

// A list of the best k, key descending; equal keys keep the order of arrival, the lower index.
template <typename R>
struct List {
  R* keys;
  R* values;
  int64_t* indices;
  int64_t k;
  void insert(R key, R value, int64_t index) const {
    int64_t slot = k - 1;
    while (slot > 0 && key > keys[slot - 1]) {
      keys[slot] = keys[slot - 1];
      values[slot] = values[slot - 1];
      indices[slot] = indices[slot - 1];
      --slot;
    }
    keys[slot] = key;
    values[slot] = value;
    indices[slot] = index;
  }
  void clear() const {
    for (int64_t slot = 0; slot < k; ++slot) {
      keys[slot] = -std::numeric_limits<R>::infinity();
      values[slot] = std::numeric_limits<R>::quiet_NaN();
      indices[slot] = -1;
    }
  }
};

// Threads own ranges of rows and private lists of the columns, merged in the order of the rows.
template <typename Acc, typename R, bool kAbs>
void topk(const Acc* acc, int64_t ld, int64_t rows, int64_t cols, const double* side_a,
          const double* side_b, const int64_t* block_start, int64_t blocks,
          const int32_t* row_block, int64_t row_offset, int64_t col_offset, int64_t k_a,
          int64_t k_b, int threads, double* values_a, int64_t* indices_a, double* values_b,
          int64_t* indices_b) {
  const int64_t slots = cols * k_b;
  const Scratch<R> keys(2 * slots * threads);
  const Scratch<int64_t> positions(slots * threads);
  const int64_t padded = cols + kScan;  // the last scan reads past the columns
  const Scratch<R> thresholds(padded * threads);
  constexpr R kLowest = -std::numeric_limits<R>::infinity();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    R* floor_b = thresholds.data + padded * t;
    const auto column = [&](int64_t j) {
      return List<R>{keys.data + (2 * t * cols + j) * k_b,
                     keys.data + ((2 * t + 1) * cols + j) * k_b,
                     positions.data + (t * cols + j) * k_b, k_b};
    };
    for (int64_t j = 0; j < cols; ++j) {
      column(j).clear();
      floor_b[j] = k_b > 0 ? kLowest : -kLowest;
    }
    std::fill(floor_b + cols, floor_b + padded, -kLowest);
    const Scratch<R> row_keys(2 * k_a);
    const Scratch<int64_t> row_indices(k_a);
    const List<R> row{row_keys.data, row_keys.data + k_a, row_indices.data, k_a};
    for (int64_t i = rows * t / threads; i < rows * (t + 1) / threads; ++i) {
      row.clear();
      R floor_a = k_a > 0 ? kLowest : -kLowest;
      const double* b = side_b == nullptr ? nullptr : side_b + row_block[i] * cols;
      for (int64_t block = 0; block < blocks; ++block) {
        const double a = side_a == nullptr ? 0.0 : side_a[block * rows + i];
        for (int64_t j0 = block_start[block]; j0 < block_start[block + 1]; j0 += kScan) {
          const int64_t count = std::min(kScan, block_start[block + 1] - j0);
          alignas(64) R value[kScan];
          const Acc* from = acc + i * ld + j0;
          if (b == nullptr) {
#pragma omp simd
            for (int64_t l = 0; l < count; ++l) value[l] = static_cast<R>(from[l]);
          } else {
            const double* factor = b + j0;
#pragma omp simd
            for (int64_t l = 0; l < count; ++l) {
              value[l] = correlation<R>(static_cast<double>(from[l]), a, factor[l]);
            }
          }
          for (int64_t l = count; l < kScan; ++l) value[l] = std::numeric_limits<R>::quiet_NaN();
          std::uint32_t hits = above<kAbs>(value, floor_b + j0, floor_a);
          for (; hits != 0; hits &= hits - 1) {
            const int64_t j = j0 + std::countr_zero(hits);
            const R r = value[j - j0];
            const R key = kAbs ? std::fabs(r) : r;
            if (key > floor_a) {
              row.insert(key, r, col_offset + j);
              floor_a = row.keys[k_a - 1];
            }
            if (key > floor_b[j]) {
              column(j).insert(key, r, row_offset + i);
              floor_b[j] = column(j).keys[k_b - 1];
            }
          }
        }
      }
      for (int64_t slot = 0; slot < k_a; ++slot) {
        values_a[i * k_a + slot] = static_cast<double>(row.values[slot]);
        indices_a[i * k_a + slot] = row.indices[slot];
      }
    }
  }
  if (k_b == 0) return;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t j = 0; j < cols; ++j) {
    const List<R> best{keys.data + j * k_b, keys.data + (cols + j) * k_b, positions.data + j * k_b,
                       k_b};
    for (int t = 1; t < threads; ++t) {
      const R* other_keys = keys.data + (2 * t * cols + j) * k_b;
      const R* other_values = keys.data + ((2 * t + 1) * cols + j) * k_b;
      const int64_t* other = positions.data + (t * cols + j) * k_b;
      for (int64_t slot = 0; slot < k_b && other_keys[slot] > best.keys[k_b - 1]; ++slot) {
        best.insert(other_keys[slot], other_values[slot], other[slot]);
      }
    }
    for (int64_t slot = 0; slot < k_b; ++slot) {
      values_b[j * k_b + slot] = static_cast<double>(best.values[slot]);
      indices_b[j * k_b + slot] = best.indices[slot];
    }
  }
}

}  // namespace

void pearson_topk(const void* acc, int acc_dtype, int64_t acc_ld, int64_t rows, int64_t cols,
                  const double* side_a, const double* side_b, const int64_t* block_start,
                  int64_t blocks, const int32_t* row_block, bool by_abs, bool wide,
                  int64_t row_offset, int64_t col_offset, int64_t k_a, int64_t k_b, int threads,
                  double* values_a, int64_t* indices_a, double* values_b, int64_t* indices_b) {
  with_float(is_f64(acc_dtype), [&](auto* a) {
    with_float(wide, [&](auto* r) {
      using Acc = std::remove_pointer_t<decltype(a)>;
      using R = std::remove_pointer_t<decltype(r)>;
      const auto run = by_abs ? topk<Acc, R, true> : topk<Acc, R, false>;
      run(static_cast<const Acc*>(acc), acc_ld, rows, cols, side_a, side_b, block_start, blocks,
          row_block, row_offset, col_offset, k_a, k_b, threads, values_a, indices_a, values_b,
          indices_b);
    });
  });
}

}  // namespace foveate::FOVEATE_ISA
