#include <algorithm>
#include <cmath>

#include "dtypes.h"
#include "memory.h"
#include "pearson.h"
#include "pearson_correlation.h"
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

}  // namespace foveate::FOVEATE_ISA
