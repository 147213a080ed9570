// Products of a symmetric matrix with four vectors [n][4]: its upper triangle is read, once for the
// four and for both sides of the diagonal.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr std::int64_t kStrip = 128;  // columns whose vectors stay in the first-level cache

// The rows in parts of equal areas, each of which sums into vectors of its own: what is added to
// what depends on n alone.
std::int64_t weight_parts(std::int64_t n) {
  return std::min<std::int64_t>(16, std::max<std::int64_t>(1, n / 256));
}

std::int64_t part_begin(std::int64_t n, std::int64_t parts, std::int64_t part) {
  if (part == parts) return n;
  const double left = std::sqrt(1 - static_cast<double>(part) / static_cast<double>(parts));
  return static_cast<std::int64_t>(static_cast<double>(n) * (1 - left)) / 4 * 4;
}

// y0 += A x1 and y1 += A^T x0 for four rows of A and `count` columns, at most kStrip. The four rows
// after them are fetched meanwhile.
template <typename T>
void multiply_strip(const T* a, std::int64_t stride, std::int64_t count, const double* x0,
                    const double* x1, double* y0, double* y1) {
#if defined(__AVX2__)
  const double* rows[4];
  double wide[4][kStrip];
  for (int r = 0; r < 4; ++r) {
    const T* row = a + r * stride;
    if constexpr (sizeof(T) == 4) {
      for (std::int64_t j = 0; j < count; ++j) wide[r][j] = static_cast<double>(row[j]);
      rows[r] = wide[r];
    } else {
      rows[r] = row;
    }
    for (std::int64_t j = 0; j < count; j += 64 / static_cast<std::int64_t>(sizeof(T))) {
      __builtin_prefetch(row + 4 * stride + j);
    }
  }
  const double* w0 = rows[0];
  const double* w1 = rows[1];
  const double* w2 = rows[2];
  const double* w3 = rows[3];
  __m256d given[4];
  __m256d even[4];
  __m256d odd[4];
  for (int r = 0; r < 4; ++r) {
    given[r] = _mm256_loadu_pd(x0 + 4 * r);
    even[r] = _mm256_loadu_pd(y0 + 4 * r);
    odd[r] = _mm256_setzero_pd();
  }
  const auto column = [&](std::int64_t j, __m256d* lanes) {
    const __m256d x = _mm256_loadu_pd(x1 + 4 * j);
    __m256d y = _mm256_loadu_pd(y1 + 4 * j);
    const __m256d b0 = _mm256_broadcast_sd(w0 + j);
    const __m256d b1 = _mm256_broadcast_sd(w1 + j);
    lanes[0] = _mm256_fmadd_pd(b0, x, lanes[0]);
    lanes[1] = _mm256_fmadd_pd(b1, x, lanes[1]);
    const __m256d left = _mm256_fmadd_pd(b1, given[1], _mm256_mul_pd(b0, given[0]));
    const __m256d b2 = _mm256_broadcast_sd(w2 + j);
    const __m256d b3 = _mm256_broadcast_sd(w3 + j);
    lanes[2] = _mm256_fmadd_pd(b2, x, lanes[2]);
    lanes[3] = _mm256_fmadd_pd(b3, x, lanes[3]);
    const __m256d right = _mm256_fmadd_pd(b3, given[3], _mm256_fmadd_pd(b2, given[2], y));
    y = _mm256_add_pd(left, right);
    _mm256_storeu_pd(y1 + 4 * j, y);
  };
  std::int64_t j = 0;
  for (; j + 2 <= count; j += 2) {
    column(j, even);
    column(j + 1, odd);
  }
  if (j < count) column(j, even);
  for (int r = 0; r < 4; ++r) _mm256_storeu_pd(y0 + 4 * r, _mm256_add_pd(even[r], odd[r]));
#else
  for (std::int64_t j = 0; j < count; ++j) {
    for (int r = 0; r < 4; ++r) {
      const auto w = static_cast<double>(a[r * stride + j]);
      for (int v = 0; v < 4; ++v) {
        y0[4 * r + v] += w * x1[4 * j + v];
        y1[4 * j + v] += w * x0[4 * r + v];
      }
    }
  }
#endif
}

// Rows r0 .. r1 of the upper triangle of A times x, and their mirror image: y[r0 ..] is written.
template <typename T>
void multiply_part(const T* a, std::int64_t n, std::int64_t r0, std::int64_t r1, const double* x,
                   double* y) {
  std::memset(y + 4 * r0, 0, static_cast<std::size_t>(4 * (n - r0)) * sizeof(double));
  for (std::int64_t i = r0; i < r1; ++i) {
    const std::int64_t end = std::min(n, i / 4 * 4 + 4);  // what the strips leave out
    for (std::int64_t j = i; j < end; ++j) {
      const auto w = static_cast<double>(a[i * n + j]);
      for (int v = 0; v < 4; ++v) {
        y[4 * i + v] += w * x[4 * j + v];
        if (j > i) y[4 * j + v] += w * x[4 * i + v];
      }
    }
  }
  for (std::int64_t j0 = r0 / kStrip * kStrip; j0 < n; j0 += kStrip) {
    const std::int64_t j1 = std::min(n, j0 + kStrip);
    for (std::int64_t i = r0; i < r1; i += 4) {
      const std::int64_t j = std::max(j0, i + 4);
      if (j >= j1) break;
      multiply_strip(a + i * n + j, n, j1 - j, x + 4 * i, x + 4 * j, y + 4 * i, y + 4 * j);
    }
  }
}

// y [n][4] = A x; `scratch` holds [weight_parts(n)][n][4].
template <typename T>
void multiply_symmetric(const T* a, std::int64_t n, const double* x, int threads, double* scratch,
                        double* y) {
  const std::int64_t parts = weight_parts(n);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (std::int64_t part = 0; part < parts; ++part) {
    multiply_part(a, n, part_begin(n, parts, part), part_begin(n, parts, part + 1), x,
                  scratch + 4 * n * part);
  }
  std::memcpy(y, scratch, static_cast<std::size_t>(4 * n) * sizeof(double));
  for (std::int64_t part = 1; part < parts; ++part) {
    const double* from = scratch + 4 * n * part;
    for (std::int64_t t = 4 * part_begin(n, parts, part); t < 4 * n; ++t) y[t] += from[t];
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
