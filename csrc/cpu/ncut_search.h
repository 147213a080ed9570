// Block Lanczos of width 4 with full reorthogonalisation and thick restart, in the class-constant
// vectors orthogonal to the trivial one and to locked blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ncut_block.h"
#include "ncut_graph.h"
#include "ncut_multiply.h"
#include "ncut_small.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr double kAbsent = -1e3;  // Ritz value of a column that is zero

// The Krylov basis stands in blocks locked .. locked + blocks of the memory; the block after it,
// orthonormal to all, continues it.
struct Search {
  Basis v;
  std::int64_t cap;     // most Krylov blocks
  std::int64_t side;    // row length of t
  double* t;            // [side][side] projected M
  double* a;            // [side][side] scratch
  double* q;            // [side][side] Ritz vectors, or their last four entries
  double* theta;        // [side] Ritz values, descending
  double* residual;     // [side]
  double* values;       // [side] scratch
  double* work;         // [3 side]
  double* h;            // [blocks of the memory][16]
  std::int64_t* order;  // [side]
  double r[16];         // couples the last block to the next
  std::int64_t locked;
  std::int64_t blocks;     // of the basis
  std::int64_t kept;       // Ritz vectors that a restart left at its start, in blocks
  std::int64_t found;      // Ritz pairs
  std::int64_t dimension;  // of the space that is searched
  std::int64_t passes;
  std::uint64_t fresh;  // next hash column
};

// Hash columns, or two given vectors [2, n] and hash columns, as the first block behind `locked`.
[[maybe_unused]] void start(Search& s, std::int64_t locked, std::int64_t dimension,
                            const double* given) {
  const Graph& g = s.v.g;
  s.locked = locked;
  s.blocks = s.kept = s.found = 0;
  s.dimension = dimension;
  double* w = s.v.block(locked);
  for (std::int64_t i = 0; i < g.n; ++i) {
    for (int c = 0; c < 4; ++c) {
      w[4 * i + c] = given != nullptr && c < 2
                         ? given[c * g.n + i]
                         : counter_hash(static_cast<std::uint64_t>(i),
                                        s.fresh + static_cast<std::uint64_t>(c));
    }
  }
  s.fresh += 4;
  double gram[16];
  for (int c = 0; c < 4; ++c) {
    const double size = column_norm(g, w, c);
    for (std::int64_t i = 0; i < g.n; ++i) w[4 * i + c] /= size > 0 ? size : 1;
  }
  for (int round = 0; round < 2; ++round) {
    average_classes(g, w);
    orthogonalize(s.v, 0, locked, w, s.h, gram);
  }
  orthonormalize(s.v, locked, gram, w, s.r, &s.fresh);
  std::memset(s.t, 0, static_cast<std::size_t>(s.side * s.side) * sizeof(double));
}

// One pass: takes the next block into the basis. Returns the columns of the block after it.
[[maybe_unused]] int advance(Search& s) {
  const Graph& g = s.v.g;
  const std::int64_t last = s.blocks;
  const double* block = s.v.block(s.locked + last);
  double* next = s.v.block(s.locked + last + 1);
  apply(g, block, next);
  ++s.passes;
  average_classes(g, next);
  const std::int64_t count = s.locked + last + 1;
  // What was multiplied couples to its neighbours only, a block after a restart to all kept ones;
  // unfinished blocks may be locked while there are few blocks.
  const std::int64_t near = last <= s.kept || last < 2 ? 0 : count - 2;
  double gram[16];
  orthogonalize(s.v, near, count, next, s.h, gram);
  ++s.blocks;
  const std::int64_t m = 4 * s.blocks;
  const double* h = s.h + 16 * s.locked;
  for (std::int64_t i = 0; i < m; ++i) {
    for (int c = 0; c < 4; ++c) {
      const std::int64_t d = 4 * last + c;
      s.t[i * s.side + d] = s.t[d * s.side + i] = h[4 * i + c];
    }
  }
  for (int c = 0; c < 4; ++c) {
    const std::int64_t d = 4 * last + c;
    for (int p = 0; p < c; ++p) {
      const double both = (h[4 * (4 * last + p) + c] + h[4 * d + p]) / 2;
      s.t[(4 * last + p) * s.side + d] = s.t[d * s.side + 4 * last + p] = both;
    }
    if (block[c] == 0 && column_norm(g, block, c) < 0.5) s.t[d * s.side + d] = kAbsent;
  }
  return orthonormalize(s.v, count, gram, next, s.r, &s.fresh);
}

// Ritz values and residuals; the vectors too, or only what the residuals need.
[[maybe_unused]] void ritz(Search& s, bool vectors) {
  const std::int64_t m = 4 * s.blocks;
  for (std::int64_t i = 0; i < m; ++i) {
    std::memcpy(s.a + i * m, s.t + i * s.side, static_cast<std::size_t>(m) * sizeof(double));
  }
  const std::int64_t width = vectors ? m : 4;
  symmetric_eigen(s.a, m, width, s.values, s.q, s.work);
  for (std::int64_t i = 0; i < m; ++i) {
    std::int64_t j = i;
    for (; j > 0 && s.values[s.order[j - 1]] < s.values[i]; --j) s.order[j] = s.order[j - 1];
    s.order[j] = i;
  }
  for (std::int64_t i = 0; i < m; ++i) s.theta[i] = s.values[s.order[i]];
  for (s.found = 0; s.found < std::min(m, s.dimension); ++s.found) {
    if (s.theta[s.found] < kAbsent / 2) break;
    const double* last = s.q + s.order[s.found] * width + width - 4;
    double sum = 0;
    for (int p = 0; p < 4; ++p) {
      double row = 0;
      for (int c = p; c < 4; ++c) row += s.r[4 * p + c] * last[c];
      sum += row * row;
    }
    s.residual[s.found] = std::sqrt(sum);
  }
}

// Ritz vectors of ranks first .. first + 4, columns of out [n][4], after ritz(s, true); zero beyond
// `count`.
[[maybe_unused]] void expand(const Search& s, std::int64_t first, std::int64_t count, double* out) {
  const std::int64_t m = 4 * s.blocks;
  Memory chosen(4 * m);
  for (std::int64_t c = 0; c < 4 && first + c < count; ++c) {
    const double* vector = s.q + s.order[first + c] * m;
    for (std::int64_t i = 0; i < m; ++i) chosen.data[4 * i + c] = vector[i];
  }
  combine(s.v, s.locked, s.locked + s.blocks, chosen.data, out);
}

// Thick restart, after ritz(s, true): the best `columns` Ritz vectors, then the block that
// continues them.
[[maybe_unused]] void restart(Search& s, std::int64_t columns) {
  const std::int64_t n = s.v.g.n;
  const std::int64_t kept = std::min((columns + 3) / 4, s.cap - 2);
  Memory best(4 * n * kept);
  for (std::int64_t b = 0; b < kept; ++b) expand(s, 4 * b, 4 * kept, best.data + 4 * n * b);
  const auto size = static_cast<std::size_t>(4 * n) * sizeof(double);
  std::memcpy(s.v.block(s.locked), best.data, size * static_cast<std::size_t>(kept));
  std::memmove(s.v.block(s.locked + kept), s.v.block(s.locked + s.blocks), size);
  std::memset(s.t, 0, static_cast<std::size_t>(s.side * s.side) * sizeof(double));
  for (std::int64_t j = 0; j < 4 * kept; ++j) s.t[j * s.side + j] = s.theta[j];
  s.blocks = s.kept = kept;
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
