// Block Lanczos for the top of M = D^-1/2 W D^-1/2 without its trivial vector: width 4, full
// reorthogonalisation, thick restart, float64. Job fields (addresses as integers):
//   0 n, 1 operand, 2 kind (0 bits, 1 float32 weights, 2 float64 weights), 3 degrees (int32 set bits
//   of a row, or float64 row sums), 4 start vectors y [2, n] or 0, 5 eigenvalues [k], 6 vectors x
//   [k, n], 7 residuals [k], 8 gap [1], 9 integers [4]: passes, converged, degenerate, uncertain,
//   10 last vectors y [2, n] or 0, 11 unused.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ncut.h"
#include "ncut_block.h"
#include "ncut_graph.h"
#include "ncut_multiply.h"
#include "ncut_pairs.h"
#include "ncut_small.h"

namespace foveate::FOVEATE_ISA {
namespace {

void solve(const std::int64_t* job, double eps, int k, double tol, int max_iter, int threads) {
  const std::int64_t n = job[0];
  Graph g{};
  g.n = n;
  g.operand = reinterpret_cast<const void*>(job[1]);
  g.kind = static_cast<int>(job[2]);
  g.eps = eps;
  g.threads = threads;
  const std::int64_t cap = 16 + k;
  Memory vectors(2 * n), classes(2 * n), basis_memory(4 * n * (cap + 1)), scratch(8 * n);
  Memory table_memory(4096 * threads + 8), part_memory(16 * (cap + 2));
  g.scale = vectors.data;
  g.trivial = vectors.data + n;
  g.alike = reinterpret_cast<std::int64_t*>(classes.data);
  double size = 0;
  std::int64_t none = 0;
  const auto* joined = reinterpret_cast<const std::int32_t*>(job[3]);
  const auto* bits = static_cast<const std::uint32_t*>(g.operand);
  for (std::int64_t i = 0; i < n; ++i) {
    const double degree =
        g.kind == 0 ? eps * static_cast<double>(n) + (1 - eps) * static_cast<double>(joined[i])
                    : reinterpret_cast<const double*>(job[3])[i];
    g.scale[i] = 1 / std::sqrt(degree);
    g.trivial[i] = std::sqrt(degree);
    size += degree;
    if (g.kind == 0 && joined[i] == 0) ++none;
  }
  for (std::int64_t i = 0; i < n; ++i) g.trivial[i] /= std::sqrt(size);
  if (g.kind == 0) {
    const std::int64_t rows = none > 0 ? 0 : n;  // what class a's tokens are joined to
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      if (joined[i] == rows) g.alike[at++] = i;
    }
    g.counts[0] = at;
    for (std::int64_t i = 0; i < n; ++i) {
      if (joined[i] == 1 && ((bits[(i / 32) * n + i] >> (i % 32)) & 1U) != 0) g.alike[at++] = i;
    }
    g.counts[1] = at - g.counts[0];
    g.values[1] = (1 - eps) / (1 - eps + static_cast<double>(n) * eps);
  }
  std::int64_t room = n - 1;
  for (std::int64_t count : g.counts) room -= count > 1 ? count - 1 : 0;

  double* basis = basis_memory.data;
  double* z = scratch.data;
  double* spare = scratch.data + 4 * n;
  double* tables = table_memory.data;
  double* part = part_memory.data;
  const std::int64_t wanted = k + 1;
  const std::int64_t side = std::max<std::int64_t>(4 * (cap + 1), kDense);
  Memory t_memory(side * side), a_memory(side * side), q_memory(side * side), small(12 * side);
  double* t = t_memory.data;
  double* a = a_memory.data;
  double* q = q_memory.data;
  double* theta = small.data;               // sorted Ritz values
  double* residual = small.data + side;     // their residuals
  double* values = small.data + 2 * side;
  double* work = small.data + 3 * side;
  double* h = small.data + 6 * side;        // [side][4]
  auto* order = reinterpret_cast<std::int64_t*>(small.data + 10 * side);
  Entry entries[32];
  std::int64_t found = 0;
  std::int64_t passes = 0;
  std::int64_t m = 0;                       // columns the Ritz problem has
  const auto sort = [&](std::int64_t columns) {
    for (std::int64_t i = 0; i < columns; ++i) {
      std::int64_t j = i;
      for (; j > 0 && values[order[j - 1]] < values[i]; --j) order[j] = order[j - 1];
      order[j] = i;
    }
    for (std::int64_t i = 0; i < columns; ++i) theta[i] = values[order[i]];
  };
  // Writes the searched pair of a rank to out[stride * i].
  const auto expand = [&](std::int64_t rank, double* out, std::int64_t stride) {
    const double* s = q + order[rank] * m;
    for (std::int64_t i = 0; i < n; ++i) {
      double sum = 0;
      if (n <= kDense) {
        sum = s[i];
      } else {
        for (std::int64_t b = 0; b < m / 4; ++b) {
          const double* row = basis + 4 * (n * b + i);
          sum += (s[4 * b] * row[0] + s[4 * b + 1] * row[1]) +
                 (s[4 * b + 2] * row[2] + s[4 * b + 3] * row[3]);
        }
      }
      out[stride * i] = sum;
    }
  };

  if (n <= kDense) {
    // M in the space of the search; the rest is moved below every eigenvalue.
    double norm = 0;
    for (std::int64_t j0 = 0; j0 < n; j0 += 4) {
      std::memset(spare, 0, static_cast<std::size_t>(4 * n) * sizeof(double));
      for (std::int64_t c = 0; c < 4 && j0 + c < n; ++c) spare[4 * (j0 + c) + c] = 1;
      Memory kept(4 * n), image(4 * n);
      std::memcpy(kept.data, spare, static_cast<std::size_t>(4 * n) * sizeof(double));
      restrict_block(g, kept.data);
      apply(g, kept.data, image.data, z, tables);
      restrict_block(g, image.data);
      for (std::int64_t c = 0; c < 4 && j0 + c < n; ++c) {
        for (std::int64_t i = 0; i < n; ++i) {
          t[i * n + j0 + c] = image.data[4 * i + c];
          q[i * n + j0 + c] = spare[4 * i + c] - kept.data[4 * i + c];
          norm += image.data[4 * i + c] * image.data[4 * i + c];
        }
      }
    }
    const double below = 2 + std::sqrt(norm);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) {
        a[i * n + j] = (t[i * n + j] + t[j * n + i]) / 2 -
                       below * (q[i * n + j] + q[j * n + i]) / 2;
      }
    }
    symmetric_eigen(a, n, values, q, work);
    m = n;
    sort(n);
    found = room;
    passes = 1;
    std::memset(residual, 0, static_cast<std::size_t>(side) * sizeof(double));
  } else if (room > 0) {
    std::uint64_t fresh = 4;
    const auto* start = reinterpret_cast<const double*>(job[4]);
    for (std::int64_t i = 0; i < n; ++i) {
      for (int c = 0; c < 4; ++c) {
        basis[4 * i + c] =
            start != nullptr && c < 2
                ? start[c * n + i]
                : counter_hash(static_cast<std::uint64_t>(i), static_cast<std::uint64_t>(c));
      }
    }
    double r[16];
    restrict_block(g, basis);
    restrict_block(g, basis);
    orthonormalize(g, basis, 0, basis, r, part, spare, &fresh);
    std::int64_t blocks = 1;  // blocks of the basis, the last one not yet multiplied
    bool verified = k <= 3;
    for (;;) {
      const std::int64_t last = blocks - 1;
      double* next = basis + 4 * n * blocks;
      apply(g, basis + 4 * n * last, next, z, tables);
      ++passes;
      restrict_block(g, next);
      std::memset(h, 0, static_cast<std::size_t>(16 * blocks) * sizeof(double));
      project(g, basis, blocks, next, h, part);
      project(g, basis, blocks, next, h, part);
      restrict_block(g, next);
      m = 4 * blocks;
      for (std::int64_t i = 0; i < m; ++i) {
        for (int c = 0; c < 4; ++c) {
          t[i * side + 4 * last + c] = h[4 * i + c];
          t[(4 * last + c) * side + i] = h[4 * i + c];
        }
      }
      for (int c = 0; c < 4; ++c) {
        const std::int64_t d = 4 * last + c;
        for (int p = 0; p < c; ++p) {
          const double both = (h[4 * (4 * last + p) + c] + h[4 * d + p]) / 2;
          t[(4 * last + p) * side + d] = t[d * side + 4 * last + p] = both;
        }
        if (column_norm(g, basis + 4 * n * last, c) < 0.5) t[d * side + d] = -1e3;
      }
      const int alive = orthonormalize(g, basis, blocks, next, r, part, spare, &fresh);
      const bool full = blocks == cap;
      const bool over = passes >= max_iter || alive == 0;
      if (full || over || blocks >= 3) {
        for (std::int64_t i = 0; i < m; ++i) {
          std::memcpy(a + i * m, t + i * side, static_cast<std::size_t>(m) * sizeof(double));
        }
        symmetric_eigen(a, m, values, q, work);
        sort(m);
        for (found = 0; found < m && theta[found] > -100 && found < room; ++found) {
          const double* s = q + order[found] * m + 4 * last;
          double sum = 0;
          for (int p = 0; p < 4; ++p) {
            double row = 0;
            for (int c = p; c < 4; ++c) row += r[4 * p + c] * s[c];
            sum += row * row;
          }
          residual[found] = std::sqrt(sum);
        }
        if (over) break;
        bool done = found >= std::min(wanted, room);
        if (done) {
          const std::int64_t listed = merge(g, theta, residual, found, wanted, entries);
          double worst = 0;
          std::int64_t searched = 0;
          for (std::int64_t i = 0; i < listed; ++i) {
            searched += entries[i].search >= 0 ? 1 : 0;
            if (i < k) worst = std::max(worst, entries[i].residual);
          }
          const double gap = entries[0].value - entries[1].value;
          const double step = entries[k - 1].value - entries[k].value;
          const double r_next = entries[k].residual;
          bool bounded = r_next <= kExact || r_next <= 0.1 * step;
          // A searched value that is still growing may enter the list.
          if (searched < found && searched < wanted) {
            bounded = bounded && (theta[searched] + residual[searched] < entries[k].value ||
                                  residual[searched] <= kExact);
          }
          const bool exact = worst <= kExact && r_next <= kExact;
          done = worst <= tol && bounded;
          if (done && !exact && entries[0].search >= 0) {
            expand(entries[0].search, spare, 1);
            for (std::int64_t i = 0; i < n; ++i) spare[i] *= g.scale[i];
            done = undecided(g, spare, 1, gap, entries[0].residual, entries[1].residual) == 0;
          }
          if (done && !verified && blocks < cap) {
            // Equal eigenvalues hide from one start block: lock what is there, begin afresh.
            verified = true;
            done = false;
          } else if (done) {
            std::int64_t equal = 1;
            for (std::int64_t i = 1; i < searched; ++i) {
              equal = theta[i - 1] - theta[i] <= kDegenerate ? equal + 1 : 1;
            }
            if (equal < 4 || verified) break;
          }
          if (done) break;
        }
      }
      ++blocks;
      if (full) {
        // Thick restart: the best Ritz vectors, then the block that continues them.
        const std::int64_t kept = std::min<std::int64_t>((k + 4 + 3) / 4, cap - 2);
        for (std::int64_t i = 0; i < n; ++i) {
          double row[160];
          for (std::int64_t j = 0; j < 4 * kept; ++j) {
            const double* s = q + order[j] * m;
            double sum = 0;
            for (std::int64_t b = 0; b < m; ++b) sum += s[b] * basis[4 * (n * (b / 4) + i) + b % 4];
            row[j] = sum;
          }
          for (std::int64_t j = 0; j < 4 * kept; ++j) {
            basis[4 * (n * (j / 4) + i) + j % 4] = row[j];
          }
        }
        std::memcpy(basis + 4 * n * kept, next, static_cast<std::size_t>(4 * n) * sizeof(double));
        std::memset(t, 0, static_cast<std::size_t>(side * side) * sizeof(double));
        for (std::int64_t j = 0; j < 4 * kept; ++j) t[j * side + j] = theta[j];
        blocks = kept + 1;
      }
    }
  }

  const std::int64_t listed = merge(g, theta, residual, found, wanted, entries);
  Memory pairs(4 * n * ((wanted + 3) / 4)), image(4 * n);
  auto* out_values = reinterpret_cast<double*>(job[5]);
  auto* out_vectors = reinterpret_cast<double*>(job[6]);
  auto* out_residual = reinterpret_cast<double*>(job[7]);
  auto* last_vectors = reinterpret_cast<double*>(job[10]);
  for (std::int64_t e = 0; e < listed; ++e) {
    double* y = pairs.data + 4 * n * (e / 4) + e % 4;
    const Entry& entry = entries[e];
    if (entry.search >= 0) {
      expand(entry.search, y, 4);
    } else {
      const std::int64_t* members = g.alike + (entry.family == 1 ? g.counts[0] : 0);
      const auto length = static_cast<double>(entry.contrast + 1);
      const double unit = 1 / std::sqrt(length * (length + 1));
      for (std::int64_t i = 0; i <= entry.contrast; ++i) y[4 * members[i]] = unit;
      y[4 * members[entry.contrast + 1]] = -length * unit;
    }
  }
  for (std::int64_t e = 0; e < listed; ++e) {
    if (e % 4 == 0) apply(g, pairs.data + n * e, image.data, z, tables);
    const double* y = pairs.data + 4 * n * (e / 4) + e % 4;
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const double d = image.data[4 * i + e % 4] - entries[e].value * y[4 * i];
      sum += d * d;
    }
    entries[e].residual = std::sqrt(sum);
  }
  double gap = 4;
  bool converged = true;
  for (int e = 0; e < k; ++e) {
    const double* y = pairs.data + 4 * n * (e / 4) + e % 4;
    double* x = out_vectors + e * n;
    double largest = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      x[i] = y[4 * i] * g.scale[i];
      largest = std::max(largest, std::abs(x[i]));
    }
    std::int64_t top = 0;
    while (top + 1 < n && !(std::abs(x[top]) >= largest - 1e-9 * largest)) ++top;
    for (std::int64_t i = 0; i < n && x[top] < 0; ++i) spare[i] = -x[i];
    if (x[top] < 0) std::memcpy(x, spare, static_cast<std::size_t>(n) * sizeof(double));
    out_values[e] = 1 - entries[e].value;
    out_residual[e] = entries[e].residual;
    converged = converged && entries[e].residual <= tol;
    gap = std::min(gap, entries[e].value - entries[e + 1].value);
  }
  if (last_vectors != nullptr) {
    for (int e = 0; e < 2; ++e) {
      for (std::int64_t i = 0; i < n; ++i) last_vectors[e * n + i] = pairs.data[4 * i + e];
    }
  }
  *reinterpret_cast<double*>(job[8]) = gap;
  auto* integers = reinterpret_cast<std::int64_t*>(job[9]);
  integers[0] = passes;
  integers[1] = converged ? 1 : 0;
  integers[2] = gap <= kDegenerate ? 1 : 0;
  integers[3] = undecided(g, out_vectors, 1, entries[0].value - entries[1].value,
                          entries[0].residual, entries[1].residual);
}

}  // namespace

int ncut_lanczos(const std::int64_t* jobs, std::int64_t count, double eps, int k, double tol,
                 int max_iter, int threads) {
  const bool across = count >= threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (across && threads > 1)
  for (std::int64_t j = 0; j < count; ++j) {
    solve(jobs + 12 * j, eps, k, tol, max_iter, across ? 1 : threads);
  }
  return 0;
}

}  // namespace foveate::FOVEATE_ISA
