// All eigenpairs of a small symmetric matrix by one warp: Householder reduction, then implicit QL.
// The same steps as csrc/cpu/ncut_small.h.
#pragma once

#include "device.h"

namespace foveate {
namespace {

FOVEATE_DEVICE double warp_sum(double value) {
  for (int mask = 16; mask > 0; mask /= 2) value += device::shuffle_xor(value, mask);
  return value;
}

// a [m, m] becomes tridiagonal: its diagonal, and off [m]; row k of a keeps reflector k, whose
// factor is beta[k]. p [m] is scratch. Lanes own rows.
FOVEATE_DEVICE void tridiagonalize(double* a, int m, int lane, double* off, double* p,
                                   double* beta) {
  for (int k = 0; k + 2 < m; ++k) {
    // Reflects column k below the diagonal onto its first entry.
    double* v = a + k * m;
    const double first = v[k + 1];
    double rest = 0;
    for (int i = k + 2 + lane; i < m; i += 32) rest += v[i] * v[i];
    rest = warp_sum(rest);
    if (rest == 0) {
      if (lane == 0) {
        beta[k] = 0;
        off[k] = first;
      }
      continue;
    }
    const double length = sqrt(rest + first * first);
    const double head = first > 0 ? -length : length;
    const double factor = 2 / (rest + (first - head) * (first - head));
    if (lane == 0) {
      v[k + 1] = first - head;
      off[k] = head;
      beta[k] = factor;
    }
    device::sync_warp();
    double along = 0;
    for (int i = k + 1 + lane; i < m; i += 32) {
      double sum = 0;
      for (int j = k + 1; j < m; ++j) sum += a[j * m + i] * v[j];
      p[i] = factor * sum;
      along += p[i] * v[i];
    }
    along = warp_sum(along);
    for (int i = k + 1 + lane; i < m; i += 32) p[i] -= factor / 2 * along * v[i];
    device::sync_warp();
    for (int i = k + 1; i < m; ++i) {
      for (int j = k + 1 + lane; j < m; j += 32) a[i * m + j] -= v[i] * p[j] + p[i] * v[j];
    }
    device::sync_warp();
  }
  if (lane == 0) {
    if (m >= 2) off[m - 2] = a[(m - 2) * m + m - 1];
    if (m >= 1) off[m - 1] = 0;
  }
}

// One QL sweep from row l, by one lane: rotation i of rows i and i + 1 is (sines[i], cosines[i]).
// span = {end, low}: rotations end - 1 down to low are to be applied; end = l when row l is done.
FOVEATE_DEVICE void ql_sweep(int m, int l, double* values, double* off, double* sines,
                             double* cosines, int* span) {
  int end = l;
  for (; end + 1 < m; ++end) {
    const double size = fabs(values[end]) + fabs(values[end + 1]);
    if (fabs(off[end]) <= 1.2e-16 * size || fabs(off[end]) < 1e-300) break;
  }
  span[0] = end;
  span[1] = l;
  if (end == l) return;
  double g = (values[l + 1] - values[l]) / (2 * off[l]);
  double r = sqrt(g * g + 1);
  g = values[end] - values[l] + off[l] / (g + (g >= 0 ? r : -r));
  double s = 1;
  double c = 1;
  double shift = 0;
  for (int i = end - 1; i >= l; --i) {
    const double f = s * off[i];
    const double b = c * off[i];
    r = sqrt(f * f + g * g);
    off[i + 1] = r;
    if (r == 0) {
      values[i + 1] -= shift;
      off[end] = 0;
      span[1] = i + 1;
      return;
    }
    s = f / r;
    c = g / r;
    g = values[i + 1] - shift;
    r = (values[i] - g) * s + 2 * c * b;
    shift = s * r;
    values[i + 1] = g + shift;
    g = c * r - b;
    sines[i] = s;
    cosines[i] = c;
  }
  values[l] -= shift;
  off[l] = g;
  off[end] = 0;
}

// Row l of z [m, m] becomes the eigenvector of values[l], in no order; a [m, m] is overwritten,
// work holds 5 m, span 2.
FOVEATE_DEVICE void symmetric_eigen(double* a, int m, int lane, double* values, double* z,
                                    double* work, int* span) {
  double* off = work;
  double* beta = work + m;
  double* p = work + 2 * m;
  double* sines = work + 3 * m;
  double* cosines = work + 4 * m;
  tridiagonalize(a, m, lane, off, p, beta);
  for (int i = lane; i < m; i += 32) values[i] = a[i * m + i];
  for (int i = 0; i < m; ++i) {
    for (int j = lane; j < m; j += 32) z[i * m + j] = i == j ? 1.0 : 0.0;
  }
  device::sync_warp();
  for (int l = lane; l < m; l += 32) {
    double* row = z + l * m;
    for (int k = m - 3; k >= 0; --k) {
      if (beta[k] == 0 || l <= k) continue;
      const double* v = a + k * m;
      double sum = 0;
      for (int j = k + 1; j < m; ++j) sum += row[j] * v[j];
      sum *= beta[k];
      for (int j = k + 1; j < m; ++j) row[j] -= sum * v[j];
    }
  }
  device::sync_warp();
  for (int l = 0; l < m; ++l) {
    for (int sweep = 0; sweep < 200; ++sweep) {
      if (lane == 0) ql_sweep(m, l, values, off, sines, cosines, span);
      device::sync_warp();
      const int end = span[0];
      const int low = span[1];
      if (end != l) {
        for (int j = lane; j < m; j += 32) {
          double upper = z[end * m + j];
          for (int i = end - 1; i >= low; --i) {
            const double lower = z[i * m + j];
            z[(i + 1) * m + j] = sines[i] * lower + cosines[i] * upper;
            upper = cosines[i] * lower - sines[i] * upper;
          }
          z[low * m + j] = upper;
        }
      }
      device::sync_warp();
      if (end == l) break;
    }
  }
}

}  // namespace
}  // namespace foveate
