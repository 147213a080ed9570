// All eigenpairs of a small symmetric matrix: Householder reduction, then implicit QL.
#pragma once

#include <cmath>
#include <cstdint>

namespace foveate::FOVEATE_ISA {
namespace {

// z = Q^T z for the reflectors in the rows of a: of four columns each reflector in turn, of all m
// row by row, last reflector first.
void reflect(const double* a, std::int64_t m, std::int64_t width, const double* beta, double* z) {
  if (width == 4) {
    for (std::int64_t k = 0; k + 2 < m; ++k) {
      const double* v = a + k * m;
      double sums[4] = {0, 0, 0, 0};
      for (std::int64_t l = k + 1; l < m; ++l) {
        for (int j = 0; j < 4; ++j) sums[j] += v[l] * z[4 * l + j];
      }
      for (double& sum : sums) sum *= beta[k];
      for (std::int64_t l = k + 1; l < m; ++l) {
        for (int j = 0; j < 4; ++j) z[4 * l + j] -= sums[j] * v[l];
      }
    }
    return;
  }
  for (std::int64_t k = m - 3; k >= 0; --k) {
    if (beta[k] == 0) continue;
    const double* v = a + k * m;
    for (std::int64_t l = k + 1; l < m; ++l) {
      double* row = z + l * m;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t j = k + 1; j < m; ++j) sum += row[j] * v[j];
      sum *= beta[k];
#pragma omp simd
      for (std::int64_t j = k + 1; j < m; ++j) row[j] -= sum * v[j];
    }
  }
}

// Row l of z [m, width] becomes the last `width` entries of the eigenvector of values[l], in no
// order; width is m or 4, at most m. a [m, m] is overwritten, work holds 3 m. Row-wise storage: a
// rotation of two eigenvectors is two contiguous rows.
[[maybe_unused]] void symmetric_eigen(double* a, std::int64_t m, std::int64_t width, double* values,
                                      double* z, double* work) {
  double* off = work;
  double* p = work + m;
  double* beta = work + 2 * m;
  for (std::int64_t k = 0; k + 2 < m; ++k) {
    // Reflects column k below the diagonal onto its first entry; row k keeps the reflector.
    double* v = a + k * m;
    double rest = 0;
    for (std::int64_t i = k + 2; i < m; ++i) rest += v[i] * v[i];
    beta[k] = 0;
    off[k] = v[k + 1];
    if (rest == 0) continue;
    const double length = std::sqrt(rest + v[k + 1] * v[k + 1]);
    const double head = v[k + 1] > 0 ? -length : length;
    v[k + 1] -= head;
    off[k] = head;
    beta[k] = 2 / (rest + v[k + 1] * v[k + 1]);
    double along = 0;
    for (std::int64_t i = k + 1; i < m; ++i) {
      double sum = 0;
      const double* row = a + i * m;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t j = k + 1; j < m; ++j) sum += row[j] * v[j];
      p[i] = beta[k] * sum;
      along += p[i] * v[i];
    }
    for (std::int64_t i = k + 1; i < m; ++i) p[i] -= beta[k] / 2 * along * v[i];
    for (std::int64_t i = k + 1; i < m; ++i) {
      double* row = a + i * m;
      const double vi = v[i];
      const double pi = p[i];
#pragma omp simd
      for (std::int64_t j = k + 1; j < m; ++j) row[j] -= vi * p[j] + pi * v[j];
    }
  }
  if (m >= 2) off[m - 2] = a[(m - 2) * m + m - 1];
  if (m >= 1) off[m - 1] = 0;
  for (std::int64_t i = 0; i < m; ++i) {
    values[i] = a[i * m + i];
    for (std::int64_t j = 0; j < width; ++j) z[i * width + j] = i == j + m - width ? 1.0 : 0.0;
  }
  reflect(a, m, width, beta, z);
  for (std::int64_t l = 0; l < m; ++l) {
    for (int sweep = 0; sweep < 200; ++sweep) {
      std::int64_t end = l;
      for (; end + 1 < m; ++end) {
        const double size = std::abs(values[end]) + std::abs(values[end + 1]);
        if (std::abs(off[end]) <= 1.2e-16 * size || std::abs(off[end]) < 1e-300) break;
      }
      if (end == l) break;
      double g = (values[l + 1] - values[l]) / (2 * off[l]);
      double r = std::sqrt(g * g + 1);
      g = values[end] - values[l] + off[l] / (g + (g >= 0 ? r : -r));
      double s = 1;
      double c = 1;
      double shift = 0;
      std::int64_t i = end - 1;
      for (; i >= l; --i) {
        const double f = s * off[i];
        const double b = c * off[i];
        r = std::sqrt(f * f + g * g);
        off[i + 1] = r;
        if (r == 0) {
          values[i + 1] -= shift;
          off[end] = 0;
          break;
        }
        s = f / r;
        c = g / r;
        g = values[i + 1] - shift;
        r = (values[i] - g) * s + 2 * c * b;
        shift = s * r;
        values[i + 1] = g + shift;
        g = c * r - b;
        double* low = z + i * width;
        double* high = low + width;
#pragma omp simd
        for (std::int64_t j = 0; j < width; ++j) {
          const double upper = high[j];
          high[j] = s * low[j] + c * upper;
          low[j] = c * low[j] - s * upper;
        }
      }
      if (r == 0 && i >= l) continue;
      values[l] -= shift;
      off[l] = g;
      off[end] = 0;
    }
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
