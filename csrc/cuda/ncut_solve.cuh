// Block Lanczos for the top of M = D^-1/2 W D^-1/2 without its trivial vector: width 4, full
// reorthogonalisation, thick restart, float64; the decisions of csrc/cpu/ncut_solve.cpp.
//
// A cluster solves one image. All its threads follow one path: what they branch on they read from
// global memory after a barrier. The small Ritz problem belongs to the first warp, vectors to rows.
#pragma once

#include "ncut_image.cuh"
#include "ncut_small.cuh"

namespace foveate {
namespace {

constexpr double kFloor = 4 * 2.220446049250313e-16;
constexpr double kExact = 1e-13;  // a residual that rounding does not let fall further
constexpr double kDegenerate = 1e-9;
constexpr double kDead = -1e3;  // Ritz value of a column that is zero

FOVEATE_DEVICE bool leads(const Image& g) { return g.rank == 0 && g.thread < 32; }

// Sets the degrees, the trivial vector and the classes of equal rows.
FOVEATE_SHARED_CODE void describe(Image& g) {
  const Memory& m = g.memory;
  const int n = g.n;
  each_row(g, [&](int i) {
    double degree = 0;
    int joined = 0;
    if (g.kind == 0) {
      for (int q = 0; q < (n + 31) / 32; ++q) {
        joined += device::bit_count(
            g.words[q * static_cast<std::int64_t>(g.words_step) + i - g.words_row]);
      }
      degree = g.eps * n + (1 - g.eps) * joined;
    } else {
      for (int j = 0; j < n; ++j) {
        const std::int64_t at = j * static_cast<std::int64_t>(g.stride) + i;
        degree += g.kind == 1 ? static_cast<double>(static_cast<const float*>(g.weights)[at])
                              : static_cast<const double*>(g.weights)[at];
      }
    }
    m.scale[i] = 1 / sqrt(degree);
    m.trivial[i] = degree;
    m.place[i] = joined;
  });
  reduce<2, Add>(g, 1, [&](int, int i, double* acc) {
    acc[0] += m.trivial[i];
    acc[1] += g.kind == 0 && m.place[i] == 0 ? 1 : 0;
  });
  const double size = sqrt(g.sums[0]);
  const int joined_of_a = g.sums[1] > 0 ? 0 : n;
  each_row(g, [&](int i) {
    m.trivial[i] = sqrt(m.trivial[i]) / size;
    m.label[i] = 0;
    if (g.kind != 0) return;
    if (m.place[i] == joined_of_a) m.label[i] = 1;
    if (m.place[i] == 1) {
      const std::uint32_t word =
          g.words[i / 32 * static_cast<std::int64_t>(g.words_step) + i - g.words_row];
      if ((word >> (i % 32) & 1U) != 0) m.label[i] = 2;
    }
  });
  reduce<2, Add>(g, 1, [&](int, int i, double* acc) {
    acc[0] += m.label[i] == 1 ? 1 : 0;
    acc[1] += m.label[i] == 2 ? 1 : 0;
  });
  g.counts[0] = static_cast<int>(g.sums[0]);
  g.counts[1] = static_cast<int>(g.sums[1]);
  g.class_mu[0] = 0;
  g.class_mu[1] = (1 - g.eps) / (1 - g.eps + n * g.eps);
  if (leads(g)) {
    int before[kClasses] = {};
    for (int first = 0; first < n; first += 32) {
      const int i = first + g.thread;
      for (int family = 0; family < kClasses; ++family) {
        const bool member = i < n && m.label[i] == 1 + family;
        const std::uint32_t members = device::ballot(member);
        const std::uint32_t earlier = members & ((1U << g.thread) - 1);
        if (member) m.place[i] = before[family] + device::bit_count(earlier);
        before[family] += device::bit_count(members);
      }
    }
  }
  device::sync_cluster();
}

// The `wanted` largest of the searched pairs and the contrasts of the classes; by one thread.
FOVEATE_SHARED_CODE int merge(const Image& g, int found, int wanted) {
  int used[kClasses + 1] = {};
  int size = 0;
  for (; size < wanted; ++size) {
    int best = -1;
    double value = -1e300;
    if (used[kClasses] < found) {
      best = kClasses;
      value = g.memory.theta[used[kClasses]];
    }
    for (int family = 0; family < kClasses; ++family) {
      if (used[family] + 1 < g.counts[family] && g.class_mu[family] > value) {
        best = family;
        value = g.class_mu[family];
      }
    }
    if (best < 0) break;
    const int number = used[best]++;
    g.memory.entries[size] = best == kClasses
                                 ? Entry{value, g.memory.residual[number], number, 0, 0}
                                 : Entry{value, 0.0, -1, best, number};
  }
  return size;
}

// Diagonalises a [m, m] and sorts; by one warp.
FOVEATE_SHARED_CODE void diagonalize(const Image& g, int m) {
  const Memory& s = g.memory;
  symmetric_eigen(s.a, m, g.thread, s.values, s.q, s.work, s.span);
  for (int i = g.thread; i < m; i += 32) {
    int rank = 0;
    for (int j = 0; j < m; ++j) {
      rank += s.values[j] > s.values[i] || (s.values[j] == s.values[i] && j < i) ? 1 : 0;
    }
    s.order[rank] = i;
    s.theta[rank] = s.values[i];
  }
  device::sync_warp();
}

// The Ritz pairs of `blocks` blocks, their residuals from the next block's factor, and whether the
// first k may stand; by one warp.
FOVEATE_SHARED_CODE void ritz(const Image& g, int blocks, int room, int k, double tol) {
  const Memory& s = g.memory;
  const int side = ritz_side(k);
  const int m = 4 * blocks;
  for (int i = 0; i < m; ++i) {
    for (int j = g.thread; j < m; j += 32) s.a[i * m + j] = s.t[i * side + j];
  }
  device::sync_warp();
  diagonalize(g, m);
  for (int f = g.thread; f < m; f += 32) {
    const double* last = s.q + s.order[f] * m + m - 4;
    double sum = 0;
    for (int p = 0; p < 4; ++p) {
      double row = 0;
      for (int c = p; c < 4; ++c) row += s.r[4 * p + c] * last[c];
      sum += row * row;
    }
    s.residual[f] = sqrt(sum);
  }
  device::sync_warp();
  if (g.thread != 0) return;
  Verdict verdict{};
  while (verdict.found < m && verdict.found < room && s.theta[verdict.found] > kDead / 10) {
    ++verdict.found;
  }
  const int wanted = k + 1;
  verdict.listed = merge(g, verdict.found, wanted);
  if (verdict.found >= (wanted < room ? wanted : room)) {
    double worst = 0;
    int searched = 0;
    for (int i = 0; i < verdict.listed; ++i) {
      searched += s.entries[i].search >= 0 ? 1 : 0;
      if (i < k) worst = fmax(worst, s.entries[i].residual);
    }
    const double step = s.entries[k - 1].value - s.entries[k].value;
    const double next = s.entries[k].residual;
    bool bounded = next <= kExact || next <= 0.1 * step;
    // A searched value that is still growing may enter the list.
    if (searched < verdict.found && searched < wanted) {
      bounded = bounded && (s.theta[searched] + s.residual[searched] < s.entries[k].value ||
                            s.residual[searched] <= kExact);
    }
    verdict.settled = worst <= tol && bounded ? 1 : 0;
    verdict.exact = worst <= kExact && next <= kExact ? 1 : 0;
    verdict.gap = s.entries[0].value - s.entries[1].value;
  }
  *s.verdict = verdict;
}

// The searched pair of a rank over m columns (n <= kDense: over the tokens) to out[stride i].
FOVEATE_SHARED_CODE void expand(const Image& g, int rank, int m, double* out, int stride) {
  const double* s = g.memory.q + g.memory.order[rank] * m;
  each_row(g, [&](int i) {
    double sum = 0;
    if (g.n <= kDense) {
      sum = s[i];
    } else {
      for (int b = 0; b < m / 4; ++b) {
        const double* row = g.memory.basis + 4 * (g.n * b + i);
        sum += (s[4 * b] * row[0] + s[4 * b + 1] * row[1]) +
               (s[4 * b + 2] * row[2] + s[4 * b + 3] * row[3]);
      }
    }
    out[stride * i] = sum;
  });
}

// Tokens whose side of the mean of x [n] is not certified (Davis and Kahan, 1970).
FOVEATE_SHARED_CODE int undecided(const Image& g, const double* x, double gap, double r,
                                  double next) {
  const double separation = gap - fmax(next, kFloor);
  if (gap <= kDegenerate || separation <= 0) return g.n;
  reduce<2, Add>(g, 1, [&](int, int i, double* acc) {
    acc[0] += x[i];
    acc[1] += g.memory.scale[i] * g.memory.scale[i];
  });
  const double mean = g.sums[0] / g.n;
  const double spread = sqrt(g.sums[1]) / g.n;
  const double delta = sqrt(2.0) * fmax(r, kFloor) / separation;
  reduce<1, Add>(g, 1, [&](int, int i, double* acc) {
    acc[0] += fabs(x[i] - mean) <= delta * (g.memory.scale[i] + spread) ? 1 : 0;
  });
  return static_cast<int>(g.sums[0]);
}

// The whole spectrum of a small image: M in the space of the search; the rest is moved below every
// eigenvalue.
FOVEATE_SHARED_CODE void solve_dense(const Image& g, int room, int k) {
  const Memory& s = g.memory;
  const int n = g.n;
  double* kept = s.basis;
  for (int j0 = 0; j0 < n; j0 += 4) {
    each_row(g, [&](int i) {
      for (int c = 0; c < 4; ++c) kept[4 * i + c] = i == j0 + c ? 1 : 0;
    });
    restrict_block(g, kept);
    apply(g, kept, s.image);
    restrict_block(g, s.image);
    each_row(g, [&](int i) {
      for (int c = 0; c < 4 && j0 + c < n; ++c) {
        s.t[i * n + j0 + c] = s.image[4 * i + c];
        s.q[i * n + j0 + c] = (i == j0 + c ? 1 : 0) - kept[4 * i + c];
      }
    });
  }
  reduce<1, Add>(g, 1, [&](int, int i, double* acc) {
    for (int j = 0; j < n; ++j) acc[0] += s.t[i * n + j] * s.t[i * n + j];
  });
  const double below = 2 + sqrt(g.sums[0]);
  each_row(g, [&](int i) {
    for (int j = 0; j < n; ++j) {
      s.a[i * n + j] =
          (s.t[i * n + j] + s.t[j * n + i]) / 2 - below * (s.q[i * n + j] + s.q[j * n + i]) / 2;
    }
  });
  device::sync_cluster();
  if (leads(g)) {
    diagonalize(g, n);
    for (int i = g.thread; i < n; i += 32) s.residual[i] = 0;
    device::sync_warp();
    if (g.thread == 0) *s.verdict = Verdict{room, merge(g, room, k + 1), 1, 1, 0};
  }
  device::sync_cluster();
}

// The last block's row and column of t, from the coefficients h of the m basis columns.
FOVEATE_DEVICE void extend(const Image& g, int m, int k, unsigned alive) {
  const Memory& s = g.memory;
  const int side = ritz_side(k);
  const int last = m - 4;
  for (int e = g.rank * g.threads + g.thread; e < 4 * m; e += g.blocks * g.threads) {
    const int i = e / 4;
    const int c = e % 4;
    if (i > last + c) continue;  // the upper triangle of the last block
    double value = s.h[e];
    if (i >= last) value = (value + s.h[4 * (last + c) + i - last]) / 2;
    if (i == last + c && (alive >> c & 1U) == 0) value = kDead;
    s.t[i * side + last + c] = value;
    s.t[(last + c) * side + i] = value;
  }
}

// Returns the passes over the affinity; the verdict, the entries and m say what was found.
FOVEATE_SHARED_CODE int search(const Image& g, int room, int k, double tol, int max_iter, int* m) {
  const Memory& s = g.memory;
  const int n = g.n;
  const int side = ritz_side(k);
  const int cap = basis_cap(k);
  const int everyone = g.blocks * g.threads;
  const int self = g.rank * g.threads + g.thread;
  int fresh = 4;
  each_row(g, [&](int i) {
    for (int c = 0; c < 4; ++c) s.basis[4 * i + c] = counter_hash(i, c);
  });
  for (int e = self; e < side * side; e += everyone) s.t[e] = 0;
  restrict_block(g, s.basis);
  restrict_block(g, s.basis);
  unsigned alive = orthonormalize(g, 0, s.basis, &fresh);
  bool verified = k <= 3;
  int passes = 0;
  for (int blocks = 1;;) {
    double* next = s.basis + 4 * n * blocks;
    apply(g, next - 4 * n, next);
    ++passes;
    restrict_block(g, next);
    *m = 4 * blocks;
    project(g, blocks, next);
    for (int e = self; e < 16 * blocks; e += everyone) s.h[e] = g.sums[e];
    project(g, blocks, next);
    for (int e = self; e < 16 * blocks; e += everyone) s.h[e] += g.sums[e];
    restrict_block(g, next);
    extend(g, *m, k, alive);
    alive = orthonormalize(g, blocks, next, &fresh);
    const bool full = blocks == cap;
    // However few passes are allowed, there are k + 1 pairs to return.
    const bool over = (passes >= max_iter && (*m > k || *m >= room)) || alive == 0;
    if (full || over || blocks >= 3) {
      if (leads(g)) ritz(g, blocks, room, k, tol);
      device::sync_cluster();
      if (over) return passes;
      const Verdict verdict = *s.verdict;
      bool done = verdict.settled != 0;
      if (done && verdict.exact == 0 && s.entries[0].search >= 0) {
        expand(g, s.entries[0].search, *m, s.spare, 1);
        each_row(g, [&](int i) { s.spare[i] *= s.scale[i]; });
        done =
            undecided(g, s.spare, verdict.gap, s.entries[0].residual, s.entries[1].residual) == 0;
      }
      // Equal eigenvalues hide from one start block: one more pass looks for them.
      if (done && (verified || full)) return passes;
      verified = verified || done;
    }
    ++blocks;
    if (full) {
      // Thick restart: the best Ritz vectors, then the block that continues them.
      int kept = (k + 4 + 3) / 4;
      for (int j = 0; j < 4 * kept; ++j) {
        expand(g, j, *m, s.pairs + 4 * n * (j / 4) + j % 4, 4);
      }
      device::sync_cluster();
      each_row(g, [&](int i) {
        for (int b = 0; b <= kept; ++b) {
          const double* from = b < kept ? s.pairs + 4 * n * b : next;
          for (int c = 0; c < 4; ++c) s.basis[4 * (n * b + i) + c] = from[4 * i + c];
        }
      });
      for (int e = self; e < side * side; e += everyone) {
        s.t[e] = e / side == e % side && e / side < 4 * kept ? s.theta[e / side] : 0;
      }
      blocks = kept + 1;
      device::sync_cluster();
    }
  }
}

// The unit vectors y of the entries, four to a block of memory.pairs, and their true residuals.
FOVEATE_SHARED_CODE void collect(const Image& g, int m, int listed) {
  const Memory& s = g.memory;
  for (int e = 0; e < listed; ++e) {
    double* y = s.pairs + 4 * g.n * (e / 4) + e % 4;
    const Entry entry = s.entries[e];
    if (entry.search >= 0) {
      expand(g, entry.search, m, y, 4);
      continue;
    }
    // Contrast c of a class: its first c + 1 members against the next one.
    const double length = entry.contrast + 1;
    const double unit = 1 / sqrt(length * (length + 1));
    each_row(g, [&](int i) {
      const bool member = s.label[i] == 1 + entry.family;
      y[4 * i] = !member || s.place[i] > entry.contrast + 1 ? 0
                 : s.place[i] <= entry.contrast             ? unit
                                                            : -length * unit;
    });
  }
  for (int e = 0; e < listed; e += 4) {
    const double* y = s.pairs + g.n * e;
    double mu[4];
    for (int v = 0; v < 4; ++v) mu[v] = e + v < listed ? s.entries[e + v].value : 0;
    apply(g, y, s.image);
    reduce<4, Add>(g, 1, [&](int, int i, double* acc) {
      FOVEATE_UNROLL
      for (int v = 0; v < 4; ++v) {
        const double d = s.image[4 * i + v] - mu[v] * y[4 * i + v];
        acc[v] += d * d;
      }
    });
    if (g.rank == 0 && g.thread == 0) {
      for (int v = 0; v < 4 && e + v < listed; ++v) s.entries[e + v].residual = sqrt(g.sums[v]);
    }
  }
  device::sync_cluster();
}

// x = D^-1/2 y with its largest entry positive, the first of those that tie; padding is 0.
FOVEATE_SHARED_CODE void signed_vector(const Image& g, const double* y, double* x) {
  each_row(g, [&](int i) { x[i] = y[4 * i] * g.memory.scale[i]; });
  reduce<1, Larger>(g, 1, [&](int, int i, double* acc) { acc[0] = fmax(acc[0], fabs(x[i])); });
  const double least = g.sums[0] - 1e-9 * g.sums[0];
  reduce<1, Larger>(g, 1, [&](int, int i, double* acc) {
    acc[0] = fmax(acc[0], fabs(x[i]) >= least ? g.n - i : 0.0);
  });
  const bool flip = x[g.n - static_cast<int>(g.sums[0])] < 0;
  device::sync_cluster();
  each_row(g, [&](int i) { x[i] = flip ? -x[i] : x[i]; });
  for (int i = g.n + g.rank * g.threads + g.thread; i < g.stride; i += g.blocks * g.threads) {
    x[i] = 0;
  }
}

FOVEATE_SHARED_CODE void report(const Image& g, const NcutBatch& batch, int image, int passes) {
  const Memory& s = g.memory;
  const int k = batch.k;
  double* x = batch.eigenvectors + static_cast<std::int64_t>(image) * k * batch.n;
  double gap = 4;
  bool converged = true;
  for (int e = 0; e < k; ++e) {
    const Entry entry = s.entries[e];
    signed_vector(g, s.pairs + 4 * g.n * (e / 4) + e % 4, x + e * batch.n);
    converged = converged && entry.residual <= batch.tol;
    gap = fmin(gap, entry.value - s.entries[e + 1].value);
    if (g.rank == 0 && g.thread == 0) {
      batch.eigenvalues[image * k + e] = 1 - entry.value;
      batch.residual[image * k + e] = entry.residual;
    }
  }
  device::sync_cluster();
  const int open = undecided(g, x, s.entries[0].value - s.entries[1].value, s.entries[0].residual,
                             s.entries[1].residual);
  if (g.rank == 0 && g.thread == 0) {
    batch.gap[image] = gap;
    batch.iterations[image] = passes;
    batch.converged[image] = converged ? 1 : 0;
    batch.degenerate[image] = gap <= kDegenerate ? 1 : 0;
    batch.uncertain[image] = open;
  }
}

// Solves the image of this cluster.
FOVEATE_DEVICE void ncut_solve(const NcutBatch& batch, bool resident) {
  const int image = device::cluster_index();
  const int rows = rows_of_block(batch.n, device::block_count());
  Image g{};
  g.kind = batch.kind;
  g.n = static_cast<int>(batch.tokens[image]);
  g.stride = batch.n;
  g.eps = batch.eps[image];
  g.thread = device::thread_index();
  g.threads = device::thread_count();
  g.rank = device::block_rank();
  g.blocks = device::block_count();
  g.row0 = g.rank * rows < g.n ? g.rank * rows : g.n;
  g.row1 = g.row0 + rows < g.n ? g.row0 + rows : g.n;
  g.tile = device::shared_memory();
  g.sums = g.tile + 4 * kTile;
  const int sums = 16 * (basis_cap(batch.k) + 1);
  g.half = sums * ((batch.n + kChunk - 1) / kChunk);
  const Memory whole = carve(nullptr, batch.n, batch.k);
  g.memory = carve(batch.scratch + image * whole.size, batch.n, batch.k);
  if (batch.kind == 0) {
    const int groups = (batch.n + 31) / 32;
    g.words = static_cast<const std::uint32_t*>(batch.operand) +
              static_cast<std::int64_t>(image) * groups * batch.n;
    g.words_step = batch.n;
    if (resident) {
      auto* kept = reinterpret_cast<std::uint32_t*>(g.sums + sums);
      for (int q = 0; q < (g.n + 31) / 32; ++q) {
        for (int i = g.row0 + g.thread; i < g.row1; i += g.threads) {
          kept[q * rows + i - g.row0] = g.words[static_cast<std::int64_t>(q) * batch.n + i];
        }
      }
      g.words = kept;
      g.words_step = rows;
      g.words_row = g.row0;
      device::sync_block();
    }
  } else {
    const std::int64_t first = static_cast<std::int64_t>(image) * batch.n * batch.n;
    g.weights = batch.kind == 1
                    ? static_cast<const void*>(static_cast<const float*>(batch.operand) + first)
                    : static_cast<const void*>(static_cast<const double*>(batch.operand) + first);
  }
  describe(g);
  int room = g.n - 1;
  for (const int count : g.counts) room -= count > 1 ? count - 1 : 0;
  int passes = 0;
  int m = g.n;
  if (g.n <= kDense) {
    solve_dense(g, room, batch.k);
    passes = 1;
  } else if (room > 0) {
    passes = search(g, room, batch.k, batch.tol, batch.max_iter, &m);
  } else {
    if (g.rank == 0 && g.thread == 0) {
      *g.memory.verdict = Verdict{0, merge(g, 0, batch.k + 1), 1, 1, 0};
    }
    device::sync_cluster();
  }
  collect(g, m, g.memory.verdict->listed);
  report(g, batch, image, passes);
}

}  // namespace
}  // namespace foveate
