// M y for a block of four vectors: bits through tables of partial sums, weights as they stand.
#pragma once

#include <cstdint>
#include <cstring>

#include "ncut_graph.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

// y[i][0..3] += the four table entries of each word, one word column at a time.
void multiply_bits(const Graph& g, const double* x, double* y, std::int64_t r0, std::int64_t r1,
                   double* tables) {
  const auto* bits = static_cast<const std::uint32_t*>(g.operand);
  const std::int64_t n = g.n;
  std::memset(y + 4 * r0, 0, static_cast<std::size_t>(4 * (r1 - r0)) * sizeof(double));
  for (std::int64_t q = 0; q < (n + 31) / 32; ++q) {
    for (int part = 0; part < 4; ++part) {
      double* table = tables + part * 1024;
      for (int v = 0; v < 4; ++v) table[v] = 0;
      for (int bit = 0; bit < 8; ++bit) {
        const std::int64_t token = 32 * q + 8 * part + bit;
        double entry[4] = {0, 0, 0, 0};
        if (token < n) std::memcpy(entry, x + 4 * token, sizeof(entry));
        double* target = table + (4 << bit);
        for (int j = 0; j < (1 << bit); ++j) {
          for (int v = 0; v < 4; ++v) target[4 * j + v] = table[4 * j + v] + entry[v];
        }
      }
    }
    const std::uint32_t* words = bits + q * n;
    for (std::int64_t i = r0; i < r1; ++i) {
      const std::uint32_t word = words[i];
      const double* a = tables + 4 * (word & 255U);
      const double* b = tables + 1024 + 4 * ((word >> 8) & 255U);
      const double* c = tables + 2048 + 4 * ((word >> 16) & 255U);
      const double* d = tables + 3072 + 4 * (word >> 24);
#if defined(__AVX2__)
      const __m256d left = _mm256_add_pd(_mm256_loadu_pd(a), _mm256_loadu_pd(b));
      const __m256d right = _mm256_add_pd(_mm256_loadu_pd(c), _mm256_loadu_pd(d));
      _mm256_storeu_pd(y + 4 * i, _mm256_add_pd(_mm256_loadu_pd(y + 4 * i),
                                                _mm256_add_pd(left, right)));
#else
      for (int v = 0; v < 4; ++v) y[4 * i + v] += (a[v] + b[v]) + (c[v] + d[v]);
#endif
    }
  }
}

// y = A x for four vectors; x is [n][4]. A is read once.
template <typename T>
void multiply_weights(const Graph& g, const double* x, double* y, std::int64_t r0,
                      std::int64_t r1) {
  const T* a = static_cast<const T*>(g.operand);
  for (std::int64_t i = r0; i < r1; ++i) {
    const T* row = a + i * g.n;
    double sums[4][4] = {};
    std::int64_t j = 0;
    for (; j + 4 <= g.n; j += 4) {
      for (int u = 0; u < 4; ++u) {
        const double w = static_cast<double>(row[j + u]);
        for (int v = 0; v < 4; ++v) sums[u][v] += w * x[4 * (j + u) + v];
      }
    }
    for (; j < g.n; ++j) {
      for (int v = 0; v < 4; ++v) sums[0][v] += static_cast<double>(row[j]) * x[4 * j + v];
    }
    for (int v = 0; v < 4; ++v) y[4 * i + v] = (sums[0][v] + sums[1][v]) + (sums[2][v] + sums[3][v]);
  }
}

// out = M y for four vectors, [n][4]; z is scratch of the same size.
[[maybe_unused]] void apply(const Graph& g, const double* y, double* out, double* z, double* tables) {
  const std::int64_t n = g.n;
  double total[4] = {0, 0, 0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    for (int v = 0; v < 4; ++v) {
      z[4 * i + v] = g.scale[i] * y[4 * i + v];
      total[v] += z[4 * i + v];
    }
  }
  const std::int64_t threads = g.threads;
#pragma omp parallel for num_threads(g.threads) schedule(static, 1) if (g.threads > 1)
  for (std::int64_t t = 0; t < threads; ++t) {
    const std::int64_t r0 = n * t / threads;
    const std::int64_t r1 = n * (t + 1) / threads;
    if (g.kind == 0) multiply_bits(g, z, out, r0, r1, tables + 4096 * t);
    if (g.kind == 1) multiply_weights<float>(g, z, out, r0, r1);
    if (g.kind == 2) multiply_weights<double>(g, z, out, r0, r1);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    for (int v = 0; v < 4; ++v) {
      double& o = out[4 * i + v];
      if (g.kind == 0) o = g.eps * total[v] + (1 - g.eps) * o;
      o *= g.scale[i];
    }
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
