// What a block of four vectors is made orthogonal to: classes, basis, itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ncut_graph.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

// Class averages, and nothing along the trivial vector.
[[maybe_unused]] void restrict_block(const Graph& g, double* w) {
  const std::int64_t* members = g.alike;
  for (std::int64_t count : g.counts) {
    if (count > 1) {
      for (int v = 0; v < 4; ++v) {
        double sum = 0;
        for (std::int64_t t = 0; t < count; ++t) sum += w[4 * members[t] + v];
        sum /= static_cast<double>(count);
        for (std::int64_t t = 0; t < count; ++t) w[4 * members[t] + v] = sum;
      }
    }
    members += count;
  }
  double along[4] = {0, 0, 0, 0};
  for (std::int64_t i = 0; i < g.n; ++i) {
    for (int v = 0; v < 4; ++v) along[v] += g.trivial[i] * w[4 * i + v];
  }
  for (std::int64_t i = 0; i < g.n; ++i) {
    for (int v = 0; v < 4; ++v) w[4 * i + v] -= along[v] * g.trivial[i];
  }
}

// w -= V (V^T w) for `blocks` blocks; adds V^T w to h [4 blocks][4]. Threads share the blocks.
[[maybe_unused]] void project(const Graph& g, const double* basis, std::int64_t blocks, double* w, double* h,
             double* part) {
  const std::int64_t n = g.n;
#pragma omp parallel for num_threads(g.threads) schedule(static) if (g.threads > 1)
  for (std::int64_t b = 0; b < blocks; ++b) {
    const double* v = basis + 4 * n * b;
#if defined(__AVX2__)
    __m256d sums[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(),
                       _mm256_setzero_pd()};
    for (std::int64_t i = 0; i < n; ++i) {
      const __m256d wi = _mm256_loadu_pd(w + 4 * i);
      for (int r = 0; r < 4; ++r) {
        sums[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(v + 4 * i + r), wi, sums[r]);
      }
    }
    for (int r = 0; r < 4; ++r) _mm256_storeu_pd(part + 16 * b + 4 * r, sums[r]);
#else
    double sums[16] = {};
    for (std::int64_t i = 0; i < n; ++i) {
      for (int r = 0; r < 4; ++r) {
        for (int c = 0; c < 4; ++c) sums[4 * r + c] += v[4 * i + r] * w[4 * i + c];
      }
    }
    std::memcpy(part + 16 * b, sums, sizeof(sums));
#endif
  }
#pragma omp parallel for num_threads(g.threads) schedule(static) if (g.threads > 1)
  for (std::int64_t i = 0; i < n; ++i) {
#if defined(__AVX2__)
    __m256d wi = _mm256_loadu_pd(w + 4 * i);
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (int r = 0; r < 4; ++r) {
        wi = _mm256_fnmadd_pd(_mm256_broadcast_sd(basis + 4 * (n * b + i) + r),
                              _mm256_loadu_pd(part + 16 * b + 4 * r), wi);
      }
    }
    _mm256_storeu_pd(w + 4 * i, wi);
#else
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (int r = 0; r < 4; ++r) {
        for (int c = 0; c < 4; ++c) {
          w[4 * i + c] -= basis[4 * (n * b + i) + r] * part[16 * b + 4 * r + c];
        }
      }
    }
#endif
  }
  if (h != nullptr) {
    for (std::int64_t t = 0; t < 16 * blocks; ++t) h[t] += part[t];
  }
}

double column_norm(const Graph& g, const double* w, int c) {
  double sum = 0;
  for (std::int64_t i = 0; i < g.n; ++i) sum += w[4 * i + c] * w[4 * i + c];
  return std::sqrt(sum);
}

// Orthonormal columns in place, w = q R; a column that vanishes is replaced by a fresh hash column
// (its row of R is 0), or by zeros when the space is exhausted. Returns the columns left.
[[maybe_unused]] int orthonormalize(const Graph& g, const double* basis, std::int64_t blocks, double* w, double* r,
                   double* part, double* spare, std::uint64_t* fresh) {
  int alive = 0;
  bool small = false;
  std::memset(r, 0, 16 * sizeof(double));
  for (int c = 0; c < 4; ++c) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      const double floor = attempt == 0 ? 1e-12 : 1e-8;
      double coefficients[4] = {0, 0, 0, 0};
      for (int round = 0; round < 2; ++round) {
        for (int p = 0; p < c; ++p) {
          double dot = 0;
          for (std::int64_t i = 0; i < g.n; ++i) dot += w[4 * i + p] * w[4 * i + c];
          for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] -= dot * w[4 * i + p];
          coefficients[p] += dot;
        }
      }
      const double norm = column_norm(g, w, c);
      if (norm > floor) {
        if (norm < 1e-3) small = true;
        for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] /= norm;
        if (attempt == 0) {
          for (int p = 0; p < c; ++p) r[4 * p + c] = coefficients[p];
          r[4 * c + c] = norm;
        }
        ++alive;
        break;
      }
      if (attempt == 0) {
        // A fresh direction: hash, orthogonal to everything there is.
        std::memset(spare, 0, static_cast<std::size_t>(4 * g.n) * sizeof(double));
        for (std::int64_t i = 0; i < g.n; ++i) {
          spare[4 * i] = counter_hash(static_cast<std::uint64_t>(i), *fresh);
        }
        ++*fresh;
        restrict_block(g, spare);
        const double size = column_norm(g, spare, 0);
        for (std::int64_t i = 0; i < g.n; ++i) spare[4 * i] /= size > 0 ? size : 1;
        project(g, basis, blocks, spare, nullptr, part);
        project(g, basis, blocks, spare, nullptr, part);
        for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] = spare[4 * i];
      } else {
        for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] = 0;
      }
    }
  }
  if (small) {
    // Normalising a small remainder magnified what rounding left along the basis.
    restrict_block(g, w);
    project(g, basis, blocks, w, nullptr, part);
    for (int c = 0; c < 4; ++c) {
      for (int p = 0; p < c; ++p) {
        double dot = 0;
        for (std::int64_t i = 0; i < g.n; ++i) dot += w[4 * i + p] * w[4 * i + c];
        for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] -= dot * w[4 * i + p];
      }
      const double norm = column_norm(g, w, c);
      for (std::int64_t i = 0; i < g.n && norm > 0.5; ++i) w[4 * i + c] /= norm;
    }
  }
  return alive;
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
