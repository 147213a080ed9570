// M y for a block of four vectors: bits through tables of partial sums, weights as they stand.
#pragma once

#include <cstdint>
#include <cstring>

#include "ncut_graph.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

// Row by row, the sums over the set bits of four vectors x [n][4]: one word column at a time, whose
// four groups of eight tokens have all their partial sums in tables.
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
      _mm256_storeu_pd(
          y + 4 * i, _mm256_add_pd(_mm256_loadu_pd(y + 4 * i), _mm256_add_pd(left, right)));
#else
      for (int v = 0; v < 4; ++v) y[4 * i + v] += (a[v] + b[v]) + (c[v] + d[v]);
#endif
    }
  }
}

#if defined(__AVX2__)
inline __m256d load4(const float* a) { return _mm256_cvtps_pd(_mm_loadu_ps(a)); }
inline __m256d load4(const double* a) { return _mm256_loadu_pd(a); }
#endif

// Two rows of A times four vectors x [4][n]; each is summed in four interleaved lanes.
template <typename T>
void multiply_rows(const T* first, const T* second, const double* x, std::int64_t n, double* y0,
                   double* y1) {
  double sums[2][4][4] = {};
  std::int64_t j = 0;
#if defined(__AVX2__)
  __m256d lanes[2][4];
  for (auto& row : lanes) {
    for (auto& lane : row) lane = _mm256_setzero_pd();
  }
  for (; j + 4 <= n; j += 4) {
    const __m256d a = load4(first + j);
    const __m256d b = load4(second + j);
    for (int v = 0; v < 4; ++v) {
      const __m256d values = _mm256_loadu_pd(x + v * n + j);
      lanes[0][v] = _mm256_fmadd_pd(a, values, lanes[0][v]);
      lanes[1][v] = _mm256_fmadd_pd(b, values, lanes[1][v]);
    }
  }
  for (int r = 0; r < 2; ++r) {
    for (int v = 0; v < 4; ++v) _mm256_storeu_pd(sums[r][v], lanes[r][v]);
  }
#else
  for (; j + 4 <= n; j += 4) {
    for (int v = 0; v < 4; ++v) {
      for (int t = 0; t < 4; ++t) {
        sums[0][v][t] += static_cast<double>(first[j + t]) * x[v * n + j + t];
        sums[1][v][t] += static_cast<double>(second[j + t]) * x[v * n + j + t];
      }
    }
  }
#endif
  for (int t = 0; j < n; ++j, ++t) {
    for (int v = 0; v < 4; ++v) {
      sums[0][v][t] += static_cast<double>(first[j]) * x[v * n + j];
      sums[1][v][t] += static_cast<double>(second[j]) * x[v * n + j];
    }
  }
  for (int v = 0; v < 4; ++v) {
    y0[v] = (sums[0][v][0] + sums[0][v][1]) + (sums[0][v][2] + sums[0][v][3]);
    y1[v] = (sums[1][v][0] + sums[1][v][1]) + (sums[1][v][2] + sums[1][v][3]);
  }
}

template <typename T>
void multiply_weights(const Graph& g, const double* x, double* y, std::int64_t r0,
                      std::int64_t r1) {
  const T* a = static_cast<const T*>(g.operand);
  for (std::int64_t i = r0; i < r1; i += 2) {
    double spare[4];
    const bool both = i + 1 < r1;
    multiply_rows(a + i * g.n, a + (both ? i + 1 : i) * g.n, x, g.n, y + 4 * i,
                  both ? y + 4 * i + 4 : spare);
  }
}

// out = M y for four vectors [n][4]; A is read once for the four.
[[maybe_unused]] void apply(const Graph& g, const double* y, double* out) {
  const std::int64_t n = g.n;
  double total[4] = {0, 0, 0, 0};
  for (std::int64_t i = 0; i < n; ++i) {
    double z[4];
    for (int v = 0; v < 4; ++v) {
      z[v] = g.scale[i] * y[4 * i + v];
      total[v] += z[v];
    }
    if (g.kind == kBits) {
      std::memcpy(g.input + 4 * i, z, sizeof(z));
    } else {
      for (int v = 0; v < 4; ++v) g.input[v * n + i] = z[v];
    }
  }
  const std::int64_t threads = g.threads;
#pragma omp parallel for num_threads(g.threads) schedule(static, 1) if (g.threads > 1)
  for (std::int64_t t = 0; t < threads; ++t) {
    const std::int64_t r0 = n * t / threads;
    const std::int64_t r1 = n * (t + 1) / threads;
    if (g.kind == kBits) multiply_bits(g, g.input, out, r0, r1, g.tables + 4096 * t);
    if (g.kind == kWeights32) multiply_weights<float>(g, g.input, out, r0, r1);
    if (g.kind == kWeights64) multiply_weights<double>(g, g.input, out, r0, r1);
    for (std::int64_t i = r0; i < r1; ++i) {
      for (int v = 0; v < 4; ++v) {
        double& o = out[4 * i + v];
        if (g.kind == kBits) o = g.eps * total[v] + (1 - g.eps) * o;
        o *= g.scale[i];
      }
    }
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
