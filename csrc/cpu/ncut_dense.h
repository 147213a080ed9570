// The whole spectrum of a small graph, in the space that larger ones search.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "ncut_block.h"
#include "ncut_graph.h"
#include "ncut_multiply.h"
#include "ncut_small.h"

namespace foveate::FOVEATE_ISA {
namespace {

// The `wanted` largest pairs, vectors y in blocks of four columns [n][4]. Returns how many there
// are.
[[maybe_unused]] std::int64_t solve_dense(const Graph& g, std::int64_t wanted, double* theta,
                                          double* vectors) {
  const std::int64_t n = g.n;
  Memory m_memory(n * n), rest_memory(n * n), q_memory(n * n), values(n), work(3 * n);
  Memory given(4 * n), kept(4 * n), image(4 * n), sums(16 * 8);
  const Basis none{g, nullptr, sums.data, sums.data + 64};
  double* m = m_memory.data;
  double* rest = rest_memory.data;
  double norm = 0;
  double unused[16];
  double gram[16];
  for (std::int64_t j0 = 0; j0 < n; j0 += 4) {
    std::memset(given.data, 0, static_cast<std::size_t>(4 * n) * sizeof(double));
    for (std::int64_t c = 0; c < 4 && j0 + c < n; ++c) given.data[4 * (j0 + c) + c] = 1;
    std::memcpy(kept.data, given.data, static_cast<std::size_t>(4 * n) * sizeof(double));
    average_classes(g, kept.data);
    orthogonalize(none, 0, 0, kept.data, unused, gram);
    apply(g, kept.data, image.data);
    average_classes(g, image.data);
    orthogonalize(none, 0, 0, image.data, unused, gram);
    for (std::int64_t c = 0; c < 4 && j0 + c < n; ++c) {
      for (std::int64_t i = 0; i < n; ++i) {
        m[i * n + j0 + c] = image.data[4 * i + c];
        rest[i * n + j0 + c] = given.data[4 * i + c] - kept.data[4 * i + c];
        norm += image.data[4 * i + c] * image.data[4 * i + c];
      }
    }
  }
  // What is not searched is moved below every eigenvalue.
  const double below = 2 + std::sqrt(norm);
  Memory shifted(n * n);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      shifted.data[i * n + j] =
          (m[i * n + j] + m[j * n + i]) / 2 - below * (rest[i * n + j] + rest[j * n + i]) / 2;
    }
  }
  symmetric_eigen(shifted.data, n, n, values.data, q_memory.data, work.data);
  const std::int64_t count = wanted < g.room ? wanted : g.room;
  for (std::int64_t l = 0; l < count; ++l) {
    std::int64_t best = 0;
    for (std::int64_t i = 1; i < n; ++i) {
      if (values.data[i] > values.data[best]) best = i;
    }
    theta[l] = values.data[best];
    values.data[best] = -INFINITY;
    for (std::int64_t i = 0; i < n; ++i) {
      vectors[4 * n * (l / 4) + 4 * i + l % 4] = q_memory.data[best * n + i];
    }
  }
  return count;
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
