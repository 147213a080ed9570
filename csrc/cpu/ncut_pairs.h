// Eigenpairs in one list: those that were searched and the contrasts of the classes; what they
// certify.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "ncut_graph.h"

namespace foveate::FOVEATE_ISA {
namespace {

struct Entry {
  double value;
  double residual;
  std::int64_t search;  // rank among the searched pairs, or -1
  int family;           // class of a contrast
  std::int64_t contrast;
};

// The `wanted` largest of the searched pairs and the contrasts of the classes.
[[maybe_unused]] std::int64_t merge(const Graph& g, const double* theta, const double* residual,
                                    std::int64_t found, std::int64_t wanted, Entry* out) {
  std::int64_t used[3] = {0, 0, 0};
  std::int64_t size = 0;
  for (; size < wanted; ++size) {
    int best = -1;
    double value = -INFINITY;
    if (used[2] < found) {
      best = 2;
      value = theta[used[2]];
    }
    for (int f = 0; f < 2; ++f) {
      if (used[f] + 1 < g.counts[f] && g.values[f] > value) {
        best = f;
        value = g.values[f];
      }
    }
    if (best < 0) break;
    out[size] = best == 2 ? Entry{value, residual[used[2]], used[2], 0, 0}
                          : Entry{value, 0.0, -1, best, used[best]};
    ++used[best];
  }
  return size;
}

// Writes a contrast of a class (Helmert) to out[4 i].
[[maybe_unused]] void write_contrast(const Graph& g, const Entry& entry, double* out) {
  const std::int64_t* members = g.alike + (entry.family == 1 ? g.counts[0] : 0);
  const auto length = static_cast<double>(entry.contrast + 1);
  const double unit = 1 / std::sqrt(length * (length + 1));
  for (std::int64_t i = 0; i < g.n; ++i) out[4 * i] = 0;
  for (std::int64_t i = 0; i <= entry.contrast; ++i) out[4 * members[i]] = unit;
  out[4 * members[entry.contrast + 1]] = -length * unit;
}

// Tokens whose side of the mean of x = D^-1/2 y, y = `y[4 i]`, is not certified: Davis and Kahan
// with the residuals of the first and the second vector and the gap between their values.
[[maybe_unused]] std::int64_t undecided(const Graph& g, const double* y, double gap, double r,
                                        double r_next) {
  r = std::max(r, kFloor);
  r_next = std::max(r_next, kFloor);
  const double separation = gap - r_next;
  if (!(gap > kDegenerate) || !(separation > 0)) return g.n;
  double mean = 0;
  double square = 0;
  for (std::int64_t i = 0; i < g.n; ++i) {
    mean += y[4 * i] * g.scale[i];
    square += g.scale[i] * g.scale[i];
  }
  const auto count = static_cast<double>(g.n);
  mean /= count;
  const double delta = std::sqrt(2.0) * r / separation;
  std::int64_t open = 0;
  for (std::int64_t i = 0; i < g.n; ++i) {
    const double bound = delta * (g.scale[i] + std::sqrt(square) / count);
    open += std::abs(y[4 * i] * g.scale[i] - mean) <= bound ? 1 : 0;
  }
  return open;
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
