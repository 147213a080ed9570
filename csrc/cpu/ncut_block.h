// A block of four vectors [n][4] against the classes, a basis of such blocks, and itself. Sums run
// over chunks of rows and then over the chunks, so that they do not depend on the threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ncut_graph.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

// sums[r][c] = v[:, r] . w[:, c] over `rows` rows.
void chunk_dots(const double* v, const double* w, std::int64_t rows, double* sums) {
#if defined(__AVX2__)
  __m256d even[4];
  __m256d odd[4];
  for (int r = 0; r < 4; ++r) even[r] = odd[r] = _mm256_setzero_pd();
  std::int64_t i = 0;
  for (; i + 2 <= rows; i += 2) {
    const __m256d w0 = _mm256_loadu_pd(w + 4 * i);
    const __m256d w1 = _mm256_loadu_pd(w + 4 * i + 4);
    for (int r = 0; r < 4; ++r) {
      even[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(v + 4 * i + r), w0, even[r]);
      odd[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(v + 4 * i + 4 + r), w1, odd[r]);
    }
  }
  for (; i < rows; ++i) {
    const __m256d w0 = _mm256_loadu_pd(w + 4 * i);
    for (int r = 0; r < 4; ++r) {
      even[r] = _mm256_fmadd_pd(_mm256_broadcast_sd(v + 4 * i + r), w0, even[r]);
    }
  }
  for (int r = 0; r < 4; ++r) _mm256_storeu_pd(sums + 4 * r, _mm256_add_pd(even[r], odd[r]));
#else
  double total[16] = {};
  for (std::int64_t i = 0; i < rows; ++i) {
    for (int r = 0; r < 4; ++r) {
      for (int c = 0; c < 4; ++c) total[4 * r + c] += v[4 * i + r] * w[4 * i + c];
    }
  }
  std::memcpy(sums, total, sizeof(total));
#endif
}

// w -= v h over `rows` rows, h [4][4].
void chunk_subtract(const double* v, const double* h, std::int64_t rows, double* w) {
#if defined(__AVX2__)
  __m256d by[4];
  for (int r = 0; r < 4; ++r) by[r] = _mm256_loadu_pd(h + 4 * r);
  for (std::int64_t i = 0; i < rows; ++i) {
    __m256d left =
        _mm256_fnmadd_pd(_mm256_broadcast_sd(v + 4 * i), by[0], _mm256_loadu_pd(w + 4 * i));
    __m256d right = _mm256_mul_pd(_mm256_broadcast_sd(v + 4 * i + 1), by[1]);
    left = _mm256_fnmadd_pd(_mm256_broadcast_sd(v + 4 * i + 2), by[2], left);
    right = _mm256_fmadd_pd(_mm256_broadcast_sd(v + 4 * i + 3), by[3], right);
    _mm256_storeu_pd(w + 4 * i, _mm256_sub_pd(left, right));
  }
#else
  for (std::int64_t i = 0; i < rows; ++i) {
    for (int c = 0; c < 4; ++c) {
      w[4 * i + c] -= (v[4 * i] * h[c] + v[4 * i + 2] * h[8 + c]) +
                      (v[4 * i + 1] * h[4 + c] + v[4 * i + 3] * h[12 + c]);
    }
  }
#endif
}

// Averages over each class of equal rows.
[[maybe_unused]] void average_classes(const Graph& g, double* w) {
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
}

// A basis of blocks, and the scratch memory of its sums.
struct Basis {
  const Graph& g;
  double* blocks;  // [count][n][4]
  double* parts;   // [chunks][count + 2][16]
  double* sums;    // [count + 2][16]

  double* block(std::int64_t b) const { return blocks + 4 * g.n * b; }
};

// sums = V^T w of blocks b0 .. b1 and, last, the trivial vector's row, after w -= V `by` of blocks
// c0 .. c1 and the trivial vector (none if by is nullptr); with `own` instead w^T w, last.
void sweep(const Basis& v, std::int64_t c0, std::int64_t c1, const double* by, std::int64_t b0,
           std::int64_t b1, bool own, double* w) {
  const std::int64_t n = v.g.n;
  const std::int64_t chunks = (n + kChunk - 1) / kChunk;
  const std::int64_t width = 16 * (b1 - b0 + 1);
#pragma omp parallel for num_threads(v.g.row_threads) schedule(static) if (v.g.row_threads > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t i0 = chunk * kChunk;
    const std::int64_t rows = n - i0 < kChunk ? n - i0 : kChunk;
    double* part = v.parts + chunk * width;
    if (by != nullptr) {
      for (std::int64_t b = c0; b < c1; ++b) {
        chunk_subtract(v.block(b) + 4 * i0, by + 16 * (b - c0), rows, w + 4 * i0);
      }
      const double* along = by + 16 * (c1 - c0);
      for (std::int64_t i = i0; i < i0 + rows; ++i) {
        for (int c = 0; c < 4; ++c) w[4 * i + c] -= v.g.trivial[i] * along[c];
      }
    }
    for (std::int64_t b = b0; b < b1; ++b) {
      chunk_dots(v.block(b) + 4 * i0, w + 4 * i0, rows, part + 16 * (b - b0));
    }
    double* last = part + 16 * (b1 - b0);
    if (own) {
      chunk_dots(w + 4 * i0, w + 4 * i0, rows, last);
    } else {
      double along[4] = {0, 0, 0, 0};
      for (std::int64_t i = i0; i < i0 + rows; ++i) {
        for (int c = 0; c < 4; ++c) along[c] += v.g.trivial[i] * w[4 * i + c];
      }
      std::memset(last, 0, 16 * sizeof(double));
      std::memcpy(last, along, sizeof(along));
    }
  }
  std::memcpy(v.sums, v.parts, static_cast<std::size_t>(width) * sizeof(double));
  for (std::int64_t chunk = 1; chunk < chunks; ++chunk) {
    const double* part = v.parts + chunk * width;
    for (std::int64_t t = 0; t < width; ++t) v.sums[t] += part[t];
  }
}

// Makes w orthogonal to blocks 0 .. count and the trivial vector: against blocks `near` .. count,
// which hold all but rounding of it, then against all. h [count][16] gets the coefficients; gram
// the remaining w^T w.
[[maybe_unused]] void orthogonalize(const Basis& v, std::int64_t near, std::int64_t count,
                                    double* w, double* h, double* gram) {
  sweep(v, 0, 0, nullptr, near, count, false, w);
  Memory by(16 * (count + 1));
  std::memcpy(by.data, v.sums, static_cast<std::size_t>(16 * (count - near + 1)) * sizeof(double));
  std::memset(h, 0, static_cast<std::size_t>(16 * count) * sizeof(double));
  for (std::int64_t t = 0; t < 16 * (count - near); ++t) h[16 * near + t] = by.data[t];
  sweep(v, near, count, by.data, 0, count, false, w);
  std::memcpy(by.data, v.sums, static_cast<std::size_t>(16 * (count + 1)) * sizeof(double));
  for (std::int64_t t = 0; t < 16 * count; ++t) h[t] += by.data[t];
  sweep(v, 0, count, by.data, 0, 0, true, w);
  std::memcpy(gram, v.sums, 16 * sizeof(double));
}

// R of gram = R^T R, upper, and its inverse; false where a column is all but dependent on the ones
// before it or has nearly vanished.
bool triangular(const double* gram, double* r, double* inverse) {
  std::memset(r, 0, 16 * sizeof(double));
  std::memset(inverse, 0, 16 * sizeof(double));
  for (int c = 0; c < 4; ++c) {
    double pivot = gram[5 * c];
    for (int p = 0; p < c; ++p) {
      double sum = gram[4 * p + c];
      for (int t = 0; t < p; ++t) sum -= r[4 * t + p] * r[4 * t + c];
      r[4 * p + c] = sum / r[5 * p];
      pivot -= r[4 * p + c] * r[4 * p + c];
    }
    if (!(pivot > 1e-5 * gram[5 * c]) || pivot < 1e-20) return false;
    r[5 * c] = std::sqrt(pivot);
  }
  for (int c = 0; c < 4; ++c) {
    inverse[5 * c] = 1 / r[5 * c];
    for (int p = c - 1; p >= 0; --p) {
      double sum = 0;
      for (int t = p + 1; t <= c; ++t) sum += r[4 * p + t] * inverse[4 * t + c];
      inverse[4 * p + c] = -sum / r[5 * p];
    }
  }
  return true;
}

// w = w inverse; gram of the result.
void rescale(const Basis& v, const double* inverse, double* w, double* gram) {
  const std::int64_t n = v.g.n;
  const std::int64_t chunks = (n + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(v.g.row_threads) schedule(static) if (v.g.row_threads > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t i0 = chunk * kChunk;
    const std::int64_t rows = n - i0 < kChunk ? n - i0 : kChunk;
    for (std::int64_t i = i0; i < i0 + rows; ++i) {
      double row[4];
      std::memcpy(row, w + 4 * i, sizeof(row));
      for (int c = 0; c < 4; ++c) {
        w[4 * i + c] = (row[0] * inverse[c] + row[1] * inverse[4 + c]) +
                       (row[2] * inverse[8 + c] + row[3] * inverse[12 + c]);
      }
    }
    chunk_dots(w + 4 * i0, w + 4 * i0, rows, v.parts + 16 * chunk);
  }
  std::memset(gram, 0, 16 * sizeof(double));
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int t = 0; t < 16; ++t) gram[t] += v.parts[16 * chunk + t];
  }
}

double column_norm(const Graph& g, const double* w, int c) {
  double sum = 0;
  for (std::int64_t i = 0; i < g.n; ++i) sum += w[4 * i + c] * w[4 * i + c];
  return std::sqrt(sum);
}

// Column c less its parts in the columns before it, twice; what they were is added to r.
void gram_schmidt(const Graph& g, double* w, int c, double* r) {
  for (int round = 0; round < 2; ++round) {
    for (int p = 0; p < c; ++p) {
      double dot = 0;
      for (std::int64_t i = 0; i < g.n; ++i) dot += w[4 * i + p] * w[4 * i + c];
      for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] -= dot * w[4 * i + p];
      r[4 * p + c] += dot;
    }
  }
}

// Column by column. One that vanishes is replaced by a hash column orthogonal to blocks 0 .. count
// (its row of R is 0), or by zeros where the space is exhausted. Returns the columns left.
int orthonormalize_slowly(const Basis& v, std::int64_t count, double* w, double* r,
                          std::uint64_t* fresh) {
  const Graph& g = v.g;
  int alive = 0;
  Memory spare(4 * g.n), unused(16 * (count + 2));
  std::memset(r, 0, 16 * sizeof(double));
  for (int c = 0; c < 4; ++c) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      double coefficients[16] = {};
      gram_schmidt(g, w, c, coefficients);
      const double norm = column_norm(g, w, c);
      // A column that vanishes is a sum of those before it: its row of R is 0, its column is not.
      for (int p = 0; p < c && attempt == 0; ++p) r[4 * p + c] = coefficients[4 * p + c];
      if (norm > (attempt == 0 ? 1e-12 : 1e-8)) {
        for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] /= norm;
        if (attempt == 0) r[5 * c] = norm;
        ++alive;
        break;
      }
      if (attempt == 1) {
        for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] = 0;
        break;
      }
      double gram[16];
      for (std::int64_t i = 0; i < g.n; ++i) {
        spare.data[4 * i] = counter_hash(static_cast<std::uint64_t>(i), *fresh);
      }
      ++*fresh;
      average_classes(g, spare.data);
      const double size = column_norm(g, spare.data, 0);
      for (std::int64_t i = 0; i < g.n; ++i) spare.data[4 * i] /= size > 0 ? size : 1;
      orthogonalize(v, 0, count, spare.data, unused.data, gram);
      for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] = spare.data[4 * i];
    }
  }
  // Normalising a small remainder magnified what rounding left along the basis.
  double gram[16];
  orthogonalize(v, 0, count, w, unused.data, gram);
  for (int c = 0; c < 4; ++c) {
    double none[16] = {};
    gram_schmidt(g, w, c, none);
    const double norm = column_norm(g, w, c);
    for (std::int64_t i = 0; i < g.n && norm > 0.5; ++i) w[4 * i + c] /= norm;
  }
  return alive;
}

// Orthonormal columns in place, w = q R, given gram = w^T w.
[[maybe_unused]] int orthonormalize(const Basis& v, std::int64_t count, const double* gram,
                                    double* w, double* r, std::uint64_t* fresh) {
  double first[16];
  double inverse[16];
  double again[16];
  if (!triangular(gram, first, inverse)) return orthonormalize_slowly(v, count, w, r, fresh);
  rescale(v, inverse, w, again);
  double second[16];
  if (!triangular(again, second, inverse)) return orthonormalize_slowly(v, count, w, r, fresh);
  rescale(v, inverse, w, again);
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      r[4 * i + j] = 0;
      for (int t = i; t <= j; ++t) r[4 * i + j] += second[4 * i + t] * first[4 * t + j];
    }
  }
  return 4;
}

// out[n][4] = blocks b0 .. b1 times s [4 (b1 - b0)][4]; may be one of other blocks.
[[maybe_unused]] void combine(const Basis& v, std::int64_t b0, std::int64_t b1, const double* s,
                              double* out) {
  const std::int64_t n = v.g.n;
  const std::int64_t chunks = (n + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(v.g.row_threads) schedule(static) if (v.g.row_threads > 1)
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t i0 = chunk * kChunk;
    const std::int64_t rows = n - i0 < kChunk ? n - i0 : kChunk;
    double* target = out + 4 * i0;
    std::memset(target, 0, static_cast<std::size_t>(4 * rows) * sizeof(double));
    for (std::int64_t b = b0; b < b1; ++b) {
      double minus[16];
      for (int t = 0; t < 16; ++t) minus[t] = -s[16 * (b - b0) + t];
      chunk_subtract(v.block(b) + 4 * i0, minus, rows, target);
    }
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
