#include <algorithm>
#include <cmath>
#include <limits>

#include "dtypes.h"
#include "memory.h"
#include "pearson.h"
#include "pearson_source.h"

namespace foveate::FOVEATE_ISA {
namespace {

template <typename P, typename Acc>
void fold(const P* product, int64_t product_ld, int64_t rows, int64_t cols, const double* u1,
          const double* v1, const double* u2, const double* v2, int64_t ld, int threads, Acc* acc) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const P* from = product + i * product_ld;
    Acc* to = acc + i * ld;
    const double first = u1[i];
    const double second = u2[i];
#pragma omp simd
    for (int64_t j = 0; j < cols; ++j) {
      const double term = static_cast<double>(from[j]) - first * v1[j] + second * v2[j];
      to[j] = static_cast<Acc>(static_cast<double>(to[j]) + term);
    }
  }
}

// r of one element: float from inverse roots, double from squares. NaN passes the clip.
template <typename R>
inline R correlation(double c, double a, double b) {
  double r;
  if constexpr (sizeof(R) == 8) {
    r = c / std::sqrt(a * b);
  } else {
    r = c * (a * b);
  }
  r = r > 1.0 ? 1.0 : r;
  return static_cast<R>(r < -1.0 ? -1.0 : r);
}

template <typename Acc, typename R>
void finalize(const Acc* acc, int64_t ld, int64_t rows, int64_t cols, const double* a,
              const double* b, bool symmetric, int threads, int64_t out_ld, R* out) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 16)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = symmetric ? i : 0;
#pragma omp simd
    for (int64_t j = begin; j < cols; ++j) {
      out[i * out_ld + j] = correlation<R>(static_cast<double>(acc[i * ld + j]), a[i], b[j]);
    }
    // A product with itself: 1, or what the policy makes of a unit without variance.
    if (symmetric) {
      const double own = sizeof(R) == 8 ? 1.0 / a[i] : a[i];
      out[i * out_ld + i] = static_cast<R>(own > 0.0 ? 1.0 : own);
    }
  }
  if (!symmetric) return;
  constexpr int64_t kTile = 32;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
  for (int64_t i0 = 0; i0 < rows; i0 += kTile) {
    for (int64_t j0 = 0; j0 <= i0; j0 += kTile) {
      for (int64_t i = i0; i < std::min(i0 + kTile, rows); ++i) {
        for (int64_t j = j0; j < std::min(j0 + kTile, i); ++j) {
          out[i * out_ld + j] = out[j * out_ld + i];
        }
      }
    }
  }
}

constexpr int64_t kScan = 32;  // elements whose keys are compared with both thresholds at once

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
template <typename Acc, typename R>
void topk(const Acc* acc, int64_t ld, int64_t rows, int64_t cols, const double* side_a,
          const double* side_b, const int64_t* block_start, int64_t blocks,
          const int32_t* row_block, bool by_abs, int64_t row_offset, int64_t col_offset,
          int64_t k_a, int64_t k_b, int threads, double* values_a, int64_t* indices_a,
          double* values_b, int64_t* indices_b) {
  const int64_t slots = cols * k_b;
  const Scratch<R> keys(2 * slots * threads);
  const Scratch<int64_t> positions(slots * threads);
  const Scratch<R> thresholds(cols * threads);
  constexpr R kLowest = -std::numeric_limits<R>::infinity();
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    R* floor_b = thresholds.data + cols * t;
    const auto column = [&](int64_t j) {
      return List<R>{keys.data + (2 * t * cols + j) * k_b,
                     keys.data + ((2 * t + 1) * cols + j) * k_b,
                     positions.data + (t * cols + j) * k_b, k_b};
    };
    for (int64_t j = 0; j < cols; ++j) {
      column(j).clear();
      floor_b[j] = k_b > 0 ? kLowest : -kLowest;
    }
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
          alignas(64) R key[kScan];
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
          int ranked = 0;
          const R* floors = floor_b + j0;
#pragma omp simd reduction(| : ranked)
          for (int64_t l = 0; l < count; ++l) {
            key[l] = by_abs ? std::fabs(value[l]) : value[l];
            ranked |= (key[l] > floor_a ? 1 : 0) | (key[l] > floors[l] ? 1 : 0);
          }
          if (ranked == 0) continue;
          for (int64_t l = 0; l < count; ++l) {
            if (key[l] > floor_a) {
              row.insert(key[l], value[l], col_offset + j0 + l);
              floor_a = row.keys[k_a - 1];
            }
            if (key[l] > floor_b[j0 + l]) {
              column(j0 + l).insert(key[l], value[l], row_offset + i);
              floor_b[j0 + l] = column(j0 + l).keys[k_b - 1];
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

// Calls f with a null pointer of float or double.
template <typename F>
void with_float(bool wide, F f) {
  if (wide) {
    f(static_cast<double*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

bool is_f64(int dtype) { return static_cast<DType>(dtype) == DType::f64; }

}  // namespace

void pearson_fold(const void* product, bool wide, int64_t product_ld, int64_t rows, int64_t cols,
                  const double* u1, const double* v1, const double* u2, const double* v2,
                  int acc_dtype, int64_t acc_ld, int threads, void* acc) {
  with_float(wide, [&](auto* p) {
    with_float(is_f64(acc_dtype), [&](auto* a) {
      fold(static_cast<const decltype(p)>(const_cast<void*>(product)), product_ld, rows, cols, u1,
           v1, u2, v2, acc_ld, threads, static_cast<decltype(a)>(acc));
    });
  });
}

void pearson_finalize(const void* acc, int acc_dtype, int64_t acc_ld, int64_t rows, int64_t cols,
                      const double* side_a, const double* side_b, bool symmetric, int threads,
                      int out_dtype, int64_t out_ld, void* out) {
  if (rows == 0 || cols == 0) return;
  advise_huge_pages(out, size_t(rows * out_ld) * (is_f64(out_dtype) ? 8 : 4));
  with_float(is_f64(acc_dtype), [&](auto* a) {
    with_float(is_f64(out_dtype), [&](auto* r) {
      finalize(static_cast<const decltype(a)>(const_cast<void*>(acc)), acc_ld, rows, cols, side_a,
               side_b, symmetric, threads, out_ld, static_cast<decltype(r)>(out));
    });
  });
}

void pearson_topk(const void* acc, int acc_dtype, int64_t acc_ld, int64_t rows, int64_t cols,
                  const double* side_a, const double* side_b, const int64_t* block_start,
                  int64_t blocks, const int32_t* row_block, bool by_abs, bool wide,
                  int64_t row_offset, int64_t col_offset, int64_t k_a, int64_t k_b, int threads,
                  double* values_a, int64_t* indices_a, double* values_b, int64_t* indices_b) {
  with_float(is_f64(acc_dtype), [&](auto* a) {
    with_float(wide, [&](auto* r) {
      using Acc = std::remove_pointer_t<decltype(a)>;
      using R = std::remove_pointer_t<decltype(r)>;
      topk<Acc, R>(static_cast<const Acc*>(acc), acc_ld, rows, cols, side_a, side_b, block_start,
                   blocks, row_block, by_abs, row_offset, col_offset, k_a, k_b, threads, values_a,
                   indices_a, values_b, indices_b);
    });
  });
}

}  // namespace foveate::FOVEATE_ISA
