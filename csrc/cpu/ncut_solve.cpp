// The top of M = D^-1/2 W D^-1/2 without its trivial vector, float64. Job fields (addresses as
// integers):
//   0 n, 1 operand, 2 kind (0 bits, 1 float32 weights, 2 float64 weights), 3 degrees (int32 set
//   bits of a row, or float64 row sums), 4 start vectors y [2, n] or 0, 5 eigenvalues [k], 6
//   vectors x [k, n], 7 residuals [k], 8 gap [1], 9 integers [4]: passes, converged, degenerate,
//   uncertain, 10 last vectors y [2, n] or 0, 11 unused.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ncut.h"
#include "ncut_dense.h"
#include "ncut_graph.h"
#include "ncut_pairs.h"
#include "ncut_search.h"
#include "ncut_solver.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr std::int64_t kCheck = 12;   // blocks that look for missed vectors before a longer search
constexpr std::int64_t kBeside = 16;  // most Ritz vectors beyond the list that are locked meanwhile
constexpr double kClear = 2e-4;       // how far below the list such a search must end
constexpr double kEqual = 1e-10;      // eigenvalues that differ by less are not told apart

// What is searched: the wanted pairs so far, vectors y in blocks [n][4] of four columns.
struct List {
  std::int64_t size;
  double theta[20];
  double residual[20];
  double* y;
};

// Whether k pairs are accurate enough to stop, by the Ritz values alone.
bool accurate(const Search& s, int k, double tol, const Entry* entries, std::int64_t listed) {
  double worst = 0;
  std::int64_t searched = 0;
  for (std::int64_t i = 0; i < listed; ++i) {
    searched += entries[i].search >= 0 ? 1 : 0;
    if (i < k) worst = std::max(worst, entries[i].residual);
  }
  const double step = entries[k - 1].value - entries[k].value;
  const double r_next = entries[k].residual;
  bool bounded = r_next <= kExact || r_next <= 0.1 * step;
  // A searched value that lost its place to a contrast may still grow into the list.
  if (searched < s.found && searched < k + 1) {
    bounded = bounded && (s.theta[searched] + s.residual[searched] < entries[k].value ||
                          s.residual[searched] <= kExact);
  }
  return worst <= tol && bounded;
}

// Runs the search until k pairs and the one after them are known. Returns whether they are.
bool find_pairs(Search& s, int k, double tol, int max_iter) {
  const Graph& g = s.v.g;
  const std::int64_t wanted = std::min<std::int64_t>(k + 1, g.room);
  Entry entries[20];
  Memory first(4 * g.n);
  std::int64_t looked = 0;
  for (;;) {
    const int alive = advance(s);
    const bool full = s.blocks == s.cap;
    const std::int64_t m = 4 * s.blocks;
    const bool over = s.passes >= max_iter || alive == 0;
    // A dense problem costs more than a pass on a small graph.
    const std::int64_t pause =
        std::min<std::int64_t>(4, std::max<std::int64_t>(1, 4 * m * m * m / (g.n * g.n)));
    if (over) {
      ritz(s, true);
      return alive == 0;
    }
    if (full || (m >= 12 && m >= wanted + 8 && s.blocks - looked >= pause)) {
      looked = s.blocks;
      ritz(s, false);
      if (s.found >= wanted) {
        const std::int64_t listed = merge(g, s.theta, s.residual, s.found, k + 1, entries);
        bool exact = true;
        for (std::int64_t i = 0; i < listed; ++i) exact = exact && entries[i].residual <= kExact;
        if (accurate(s, k, tol, entries, listed)) {
          ritz(s, true);
          if (exact || entries[0].search < 0) return true;
          expand(s, entries[0].search, entries[0].search + 1, first.data);
          if (undecided(g, first.data, entries[0].value - entries[1].value, entries[0].residual,
                        entries[1].residual) == 0) {
            return true;
          }
        }
      }
    }
    if (full) {
      ritz(s, true);
      restart(s, k + 4);
      looked = s.blocks;
    }
  }
}

// Searches the complement of locked blocks for values above `limit`. Returns how many were found,
// converged to `tol`; 0 if the largest settled more than `clear` below; -1 if `most` blocks could
// not tell.
std::int64_t find_above(Search& s, double limit, double clear, double tol, std::int64_t most,
                        int max_iter) {
  for (;;) {
    const int alive = advance(s);
    const bool full = s.blocks >= std::min(most, s.cap);
    ritz(s, false);
    if (s.found == 0) return 0;
    // A residual bounds the distance to some eigenvalue: it must have settled before it tells that
    // none is above.
    const double below = limit + kEqual - s.theta[0];
    if (s.blocks >= 3 && below > clear && s.residual[0] <= 0.1 * below) return 0;
    std::int64_t above = 0;
    while (above < s.found && s.theta[above] > limit + kEqual && s.residual[above] <= tol) ++above;
    if (above > 0 || alive == 0 || s.passes >= max_iter) {
      ritz(s, true);
      return above;
    }
    if (full && most < s.cap) return -1;
    if (full) {
      ritz(s, true);
      restart(s, 8);
    }
  }
}

// The `wanted` largest of the list and the first `count` Ritz pairs of the search.
void insert(List& list, const Search& s, std::int64_t count, std::int64_t wanted) {
  const std::int64_t n = s.v.g.n;
  Memory block(4 * n), old(4 * n * ((wanted + 3) / 4));
  std::memcpy(old.data, list.y,
              static_cast<std::size_t>(4 * n * ((wanted + 3) / 4)) * sizeof(double));
  const List before = list;
  std::int64_t a = 0;
  std::int64_t b = 0;
  for (list.size = 0; list.size < wanted && (a < before.size || b < count); ++list.size) {
    const bool theirs = a >= before.size || (b < count && s.theta[b] > before.theta[a]);
    if (theirs && b % 4 == 0) expand(s, b, count, block.data);
    const double* from = theirs ? block.data + b % 4 : old.data + 4 * n * (a / 4) + a % 4;
    double* to = list.y + 4 * n * (list.size / 4) + list.size % 4;
    for (std::int64_t i = 0; i < n; ++i) to[4 * i] = from[4 * i];
    list.theta[list.size] = theirs ? s.theta[b] : before.theta[a];
    list.residual[list.size] = theirs ? s.residual[b] : before.residual[a];
    if (theirs) {
      ++b;
    } else {
      ++a;
    }
  }
}

// A block of four columns sees at most four copies of an eigenvalue: looks for missed ones with a
// fresh block orthogonal to the list. At first the Ritz vectors that follow the list are locked
// too, so that little is left and few passes tell; they are so accurate (see `settled`) that they
// cannot hide a missed vector.
void find_missed(Search& s, List& list, int k, double tol, int max_iter) {
  const Graph& g = s.v.g;
  const std::int64_t wanted = k + 1;
  const auto size = static_cast<std::size_t>(4 * g.n) * sizeof(double);
  Entry entries[20];
  const auto limit = [&] {
    return entries[merge(g, list.theta, list.residual, list.size, wanted, entries) - 1].value;
  };
  const auto settled = [&](std::int64_t j) {
    return s.residual[j] <= 1e-3 * (limit() - s.theta[j]);
  };
  std::int64_t locked = list.size;
  while (locked < s.found && locked < list.size + kBeside && settled(locked)) ++locked;
  const std::int64_t whole = (locked + 3) / 4;
  if (g.room <= locked || s.passes >= max_iter) return;
  Memory front(4 * g.n * whole);
  for (std::int64_t b = 0; b < whole; ++b) expand(s, 4 * b, locked, front.data + 4 * g.n * b);
  std::memcpy(s.v.block(0), front.data, size * static_cast<std::size_t>(whole));
  start(s, whole, g.room - locked, nullptr);
  if (find_above(s, limit(), kClear, 0, kCheck, max_iter) == 0) return;
  while (s.passes < max_iter && list.size < g.room) {
    const std::int64_t count = (list.size + 3) / 4;
    std::memcpy(s.v.block(0), list.y, size * static_cast<std::size_t>(count));
    start(s, count, g.room - list.size, nullptr);
    const std::int64_t above = find_above(s, limit(), 0, tol / 4, s.cap, max_iter);
    if (above <= 0) return;
    insert(list, s, above, wanted);
  }
}

// What a search that was stopped has not found: Rayleigh quotients of columns that are orthonormal
// to all of it. Evaluating them is not a pass of the search.
void complete(Search& s, List& list, std::int64_t wanted) {
  const Graph& g = s.v.g;
  Memory image(4 * g.n);
  while (list.size < wanted) {
    double* block = s.v.block(s.blocks);
    apply(g, block, image.data);
    for (int c = 0; c < 4 && list.size < wanted; ++c) {
      if (column_norm(g, block, c) < 0.5) continue;
      double value = 0;
      for (std::int64_t i = 0; i < g.n; ++i) value += block[4 * i + c] * image.data[4 * i + c];
      std::int64_t at = list.size++;
      const auto entry = [&](std::int64_t rank, std::int64_t i) -> double& {
        return list.y[4 * g.n * (rank / 4) + 4 * i + rank % 4];
      };
      for (; at > 0 && list.theta[at - 1] < value; --at) {
        list.theta[at] = list.theta[at - 1];
        list.residual[at] = list.residual[at - 1];
        for (std::int64_t i = 0; i < g.n; ++i) entry(at, i) = entry(at - 1, i);
      }
      list.theta[at] = value;
      list.residual[at] = 1;
      for (std::int64_t i = 0; i < g.n; ++i) entry(at, i) = block[4 * i + c];
    }
    const std::int64_t count = ++s.blocks;
    start(s, count, g.room, nullptr);
    s.blocks = count;
    s.locked = 0;
  }
}

void search_pairs(const Graph& g, const double* given, int k, double tol, int max_iter, List& list,
                  std::int64_t* passes) {
  const std::int64_t cap = 16 + k;
  const std::int64_t memory = cap + 3 + (k + 4) / 4;  // a full basis behind the locked list
  const std::int64_t side = 4 * (cap + 1);
  const std::int64_t chunks = (g.n + kChunk - 1) / kChunk;
  Memory basis(4 * g.n * memory), parts(chunks * 16 * (memory + 2)), sums(16 * (memory + 2));
  Memory t(side * side), a(side * side), q(side * side), small(7 * side), h(16 * memory);
  Search s{{g, basis.data, parts.data, sums.data},
           cap,
           side,
           t.data,
           a.data,
           q.data,
           small.data,
           small.data + side,
           small.data + 2 * side,
           small.data + 3 * side,
           h.data,
           reinterpret_cast<std::int64_t*>(small.data + 6 * side),
           {},
           0,
           0,
           0,
           0,
           0,
           0,
           0};
  start(s, 0, g.room, given);
  const bool done = find_pairs(s, k, tol, max_iter);
  const std::int64_t wanted = k + 1;
  list.size = std::min(s.found, wanted);
  std::int64_t equal = 1;
  std::int64_t run = 1;
  for (std::int64_t i = 0; i < list.size; ++i) {
    if (i % 4 == 0) expand(s, i, list.size, list.y + 4 * g.n * (i / 4));
    list.theta[i] = s.theta[i];
    list.residual[i] = s.residual[i];
    run = i > 0 && s.theta[i - 1] - s.theta[i] <= kDegenerate ? run + 1 : 1;
    equal = std::max(equal, run);
  }
  if (done && (k > 3 || equal >= 4)) find_missed(s, list, k, tol, max_iter);
  if (list.size < std::min<std::int64_t>(wanted, g.room)) {
    complete(s, list, std::min<std::int64_t>(wanted, g.room));
  }
  *passes = s.passes;
}

// A graph with a degree that is no positive number has no spectrum.
void write_undefined(const std::int64_t* job, std::int64_t n, int k) {
  const std::int64_t counts[4] = {k, k * n, k, 1};  // of the outputs from field 5 on
  for (int t = 0; t < 4; ++t) {
    std::fill_n(reinterpret_cast<double*>(job[5 + t]), counts[t], NAN);
  }
  if (job[10] != 0) std::fill_n(reinterpret_cast<double*>(job[10]), 2 * n, NAN);
  auto* integers = reinterpret_cast<std::int64_t*>(job[9]);
  integers[0] = integers[1] = integers[2] = 0;
  integers[3] = n;
}

}  // namespace

void ncut_solve(const std::int64_t* job, double eps, int k, double tol, int max_iter, int threads) {
  const std::int64_t n = job[0];
  Graph g{};
  g.n = n;
  g.operand = reinterpret_cast<const void*>(job[1]);
  g.kind = static_cast<int>(job[2]);
  g.eps = eps;
  // A pass of about 2 ms is worth sharing: another pool of threads that spins in the process, as
  // that of NumPy's BLAS does for 30 ms after a call, can hold a shared one up for longer.
  g.threads = n >= (g.kind == kBits ? 6144 : 2048) ? threads : 1;
  g.row_threads = n >= 16384 ? threads : 1;
  const std::int64_t scratch_size = g.kind == kBits ? 4096 * g.threads : 4 * n * weight_parts(n);
  Memory vectors(2 * n), classes(n), input(4 * n), scratch(scratch_size);
  g.scale = vectors.data;
  g.trivial = vectors.data + n;
  g.alike = reinterpret_cast<std::int64_t*>(classes.data);
  g.input = input.data;
  g.scratch = scratch.data;
  if (!describe(g, reinterpret_cast<const void*>(job[3]))) {
    write_undefined(job, n, k);
    return;
  }

  const std::int64_t wanted = k + 1;
  const std::int64_t groups = (wanted + 3) / 4;
  Memory searched(4 * n * groups), pairs(4 * n * groups), image(4 * n);
  List list{0, {}, {}, searched.data};
  std::int64_t passes = 1;
  if (n <= kDense) {
    list.size = solve_dense(g, wanted, list.theta, list.y);
  } else if (g.room > 0) {
    search_pairs(g, reinterpret_cast<const double*>(job[4]), k, tol, max_iter, list, &passes);
  }

  Entry entries[20];
  const std::int64_t listed = merge(g, list.theta, list.residual, list.size, wanted, entries);
  for (std::int64_t e = 0; e < listed; ++e) {
    double* y = pairs.data + 4 * n * (e / 4) + e % 4;
    const std::int64_t from = entries[e].search;
    if (from < 0) {
      write_contrast(g, entries[e], y);
    } else {
      const double* source = list.y + 4 * n * (from / 4) + from % 4;
      for (std::int64_t i = 0; i < n; ++i) y[4 * i] = source[4 * i];
    }
  }
  for (std::int64_t e = 0; e < listed; ++e) {
    if (e % 4 == 0) apply(g, pairs.data + n * e, image.data);
    const double* y = pairs.data + 4 * n * (e / 4) + e % 4;
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const double d = image.data[4 * i + e % 4] - entries[e].value * y[4 * i];
      sum += d * d;
    }
    entries[e].residual = std::sqrt(sum);
  }

  auto* out_values = reinterpret_cast<double*>(job[5]);
  auto* out_vectors = reinterpret_cast<double*>(job[6]);
  auto* out_residual = reinterpret_cast<double*>(job[7]);
  auto* last_vectors = reinterpret_cast<double*>(job[10]);
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
    if (x[top] < 0) {
      for (std::int64_t i = 0; i < n; ++i) x[i] = -x[i];
    }
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
  integers[3] = undecided(g, pairs.data, entries[0].value - entries[1].value, entries[0].residual,
                          entries[1].residual);
}

int ncut_lanczos(const std::int64_t* jobs, std::int64_t count, double eps, int k, double tol,
                 int max_iter, int threads) {
  const bool across = count >= threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (across && threads > 1)
  for (std::int64_t j = 0; j < count; ++j) {
    ncut_solve(jobs + 12 * j, eps, k, tol, max_iter, across ? 1 : threads);
  }
  return 0;
}

}  // namespace foveate::FOVEATE_ISA
