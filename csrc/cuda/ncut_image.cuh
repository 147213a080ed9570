// One image's graph in the hands of its cluster: sums, products and orthogonalisation.
//
// A block owns a range of rows and keeps their bits in shared memory where they fit; a thread owns
// a row of them at a time. Four vectors are [n][4] in global memory. Sums over rows are taken in
// chunks of kChunk by one warp each, so that no result depends on the number of threads or blocks;
// a block sums its own rows, so that one cluster barrier is enough.
#pragma once

#include "device.h"
#include "ncut.h"

namespace foveate {
namespace {

constexpr int kChunk = 128;     // rows of one partial sum; a block owns whole chunks
constexpr int kTile = 512;      // tokens whose entries are in shared memory at a time
constexpr int kDense = 64;      // tokens up to which the whole spectrum is computed
constexpr int kClasses = 2;     // tokens of equal rows: a, joined to none or all; b, isolated
constexpr int kPairBlocks = 5;  // blocks of four that hold k + 1 pairs, or what a restart keeps

FOVEATE_BOTH int basis_cap(int k) { return 16 + k; }
FOVEATE_BOTH int ritz_side(int k) {
  const int side = 4 * (basis_cap(k) + 1);
  return side > kDense ? side : kDense;
}

// An eigenpair of the list: searched, or a contrast of a class, which is exact.
struct Entry {
  double value;
  double residual;
  int search;    // rank among the searched pairs, or -1
  int family;    // class of a contrast
  int contrast;  // its number
};

// What the warp that solves the Ritz problem tells the others.
struct Verdict {
  int found;    // searched pairs
  int listed;   // entries
  int settled;  // residuals are small enough
  int exact;    // and as small as rounding lets them be
  double gap;   // between the first two entries
};

// An image's scratch, in global memory.
struct Memory {
  double* scale;      // [n] D^-1/2
  double* trivial;    // [n] unit
  int* label;         // [n] 1 + class, or 0
  int* place;         // [n] number of the token in its class; before that, its bits
  double* spare;      // [n][4]
  double* image;      // [n][4] a product
  double* basis;      // [cap + 1][n][4]
  double* pairs;      // [kPairBlocks][n][4]
  double* t;          // [side, side] the projected matrix
  double* a;          // [side, side] overwritten by its diagonalisation
  double* q;          // [side, side] its eigenvectors
  double* values;     // [side] its eigenvalues
  double* work;       // [5 side]
  double* theta;      // [side] Ritz values, descending
  double* residual;   // [side]
  double* h;          // [side][4] products of the last block with the basis
  double* r;          // [4, 4] triangular factor of the next block
  double* partial;    // [2, 16 (cap + 1) chunks] sums over chunks, of this reduction and the last
  int* order;         // [side] row of q of each Ritz value
  int* span;          // [2]
  Entry* entries;     // [k + 1]
  Verdict* verdict;   // [1]
  std::int64_t size;  // doubles in all
};

FOVEATE_BOTH Memory carve(double* base, int n, int k) {
  const std::int64_t side = ritz_side(k);
  const std::int64_t blocks = basis_cap(k) + 1;
  const std::int64_t chunks = (n + kChunk - 1) / kChunk;
  std::int64_t used = 0;
  const auto take = [&](std::int64_t count) {
    const std::int64_t at = used;
    used += (count + 3) / 4 * 4;
    return base == nullptr ? nullptr : base + at;
  };
  Memory m{};
  m.scale = take(n);
  m.trivial = take(n);
  m.label = reinterpret_cast<int*>(take((n + 1) / 2));
  m.place = reinterpret_cast<int*>(take((n + 1) / 2));
  m.spare = take(4 * static_cast<std::int64_t>(n));
  m.image = take(4 * static_cast<std::int64_t>(n));
  m.basis = take(4 * blocks * n);
  m.pairs = take(4 * static_cast<std::int64_t>(kPairBlocks) * n);
  m.t = take(side * side);
  m.a = take(side * side);
  m.q = take(side * side);
  m.values = take(side);
  m.work = take(5 * side);
  m.theta = take(side);
  m.residual = take(side);
  m.h = take(4 * side);
  m.r = take(16);
  m.partial = take(2 * 16 * blocks * chunks);
  m.order = reinterpret_cast<int*>(take(side));
  m.span = reinterpret_cast<int*>(take(1));
  m.entries = reinterpret_cast<Entry*>(take(4 * (k + 1)));
  m.verdict = reinterpret_cast<Verdict*>(take(4));
  m.size = used;
  return m;
}
static_assert(sizeof(Entry) <= 4 * sizeof(double) && sizeof(Verdict) <= 4 * sizeof(double));

struct Image {
  // the graph
  int kind;
  int n;
  int stride;  // of the operand and of the eigenvectors
  double eps;
  const void* weights;         // [n, stride]
  const std::uint32_t* words;  // word (q, i) is words[q words_step + i - words_row]
  int words_step;
  int words_row;
  int counts[kClasses];
  double class_mu[kClasses];
  // the team
  int thread;  // in the block
  int threads;
  int rank;  // of the block
  int blocks;
  int row0;  // the block's rows
  int row1;
  double* tile;  // [kTile][4] shared
  double* sums;  // [16 (cap + 1)] shared, of the last reduction
  int half;      // doubles of half of memory.partial
  mutable int reductions;
  Memory memory;
};

// Calls f(i) for each row of the image, in the thread that owns it.
template <typename F>
FOVEATE_DEVICE void each_row(const Image& g, F f) {
  for (int i = g.row0 + g.thread; i < g.row1; i += g.threads) f(i);
}

struct Add {
  FOVEATE_DEVICE static double both(double a, double b) { return a + b; }
};
struct Larger {
  FOVEATE_DEVICE static double both(double a, double b) { return fmax(a, b); }
};

// sums[W item + t] = what term(item, i, acc) makes of acc[t], from 0 on, over all rows i:
// accumulated by lanes, combined in a fixed order. A term reads rows of its own block alone. What
// any block wrote before is visible to all after it; the sums stand until the next reduction.
template <int W, typename Combine, typename Term>
FOVEATE_DEVICE void reduce(const Image& g, int items, Term term) {
  const int chunks = (g.n + kChunk - 1) / kChunk;
  const int own = (g.row1 - g.row0 + kChunk - 1) / kChunk;
  const int lane = g.thread % 32;
  double* partial = g.memory.partial + g.reductions++ % 2 * g.half;
  device::sync_block();
  for (int job = g.thread / 32; job < items * own; job += g.threads / 32) {
    const int item = job / own;
    const int first = g.row0 + job % own * kChunk;
    const int last = first + kChunk < g.n ? first + kChunk : g.n;
    double acc[W] = {};
    for (int i = first + lane; i < last; i += 32) term(item, i, acc);
    FOVEATE_UNROLL
    for (int t = 0; t < W; ++t) {
      for (int mask = 16; mask > 0; mask /= 2) {
        acc[t] = Combine::both(acc[t], device::shuffle_xor(acc[t], mask));
      }
    }
    if (lane == 0) {
      FOVEATE_UNROLL
      for (int t = 0; t < W; ++t) partial[W * (item * chunks + first / kChunk) + t] = acc[t];
    }
  }
  device::sync_cluster();
  for (int j = g.thread; j < W * items; j += g.threads) {
    const double* part = partial + j / W * chunks * W + j % W;
    double sum = part[0];
    for (int c = 1; c < chunks; ++c) sum = Combine::both(sum, part[c * W]);
    g.sums[j] = sum;
  }
  device::sync_block();
}

// acc[v] += the row's bits times the tile that begins with word q0.
FOVEATE_DEVICE void add_bits(const Image& g, int row, int q0, int q1, double* acc) {
  for (int q = q0; q < q1; ++q) {
    const std::uint32_t word =
        g.words[q * static_cast<std::int64_t>(g.words_step) + row - g.words_row];
    const double* x = g.tile + 128 * (q - q0);
    FOVEATE_UNROLL
    for (int t = 0; t < 32; ++t) {
      if ((word >> t & 1U) != 0) {
        FOVEATE_UNROLL
        for (int v = 0; v < 4; ++v) acc[v] += x[4 * t + v];
      }
    }
  }
}

// The same for weights, read by columns: W is symmetric.
template <typename T>
FOVEATE_DEVICE void add_weights(const Image& g, int row, int first, int last, double* acc) {
  const T* column = static_cast<const T*>(g.weights) + row;
  for (int j = first; j < last; ++j) {
    const double w = static_cast<double>(column[j * static_cast<std::int64_t>(g.stride)]);
    FOVEATE_UNROLL
    for (int v = 0; v < 4; ++v) acc[v] += w * g.tile[4 * (j - first) + v];
  }
}

// out = M y for four vectors, [n][4] each.
FOVEATE_SHARED_CODE void apply(const Image& g, const double* y, double* out) {
  const double* scale = g.memory.scale;
  double total[4] = {};
  if (g.kind == 0) {
    reduce<4, Add>(g, 1, [&](int, int i, double* acc) {
      FOVEATE_UNROLL
      for (int v = 0; v < 4; ++v) acc[v] += scale[i] * y[4 * i + v];
    });
    FOVEATE_UNROLL
    for (int v = 0; v < 4; ++v) total[v] = g.eps * g.sums[v];
  } else {
    device::sync_cluster();
  }
  for (int base = g.row0; base < g.row1; base += g.threads) {
    const int row = base + g.thread;
    double acc[4] = {};
    for (int first = 0; first < g.n; first += kTile) {
      const int last = first + kTile < g.n ? first + kTile : g.n;
      device::sync_block();
      for (int e = g.thread; e < 4 * kTile; e += g.threads) {
        const int i = first + e / 4;
        g.tile[e] = i < last ? scale[i] * y[4 * i + e % 4] : 0.0;
      }
      device::sync_block();
      if (row < g.row1) {
        if (g.kind == 0) add_bits(g, row, first / 32, (last + 31) / 32, acc);
        if (g.kind == 1) add_weights<float>(g, row, first, last, acc);
        if (g.kind == 2) add_weights<double>(g, row, first, last, acc);
      }
    }
    if (row < g.row1) {
      const double factor = g.kind == 0 ? 1 - g.eps : 1.0;
      FOVEATE_UNROLL
      for (int v = 0; v < 4; ++v) out[4 * row + v] = scale[row] * (total[v] + factor * acc[v]);
    }
  }
}

// Class averages, and nothing along the trivial vector.
FOVEATE_SHARED_CODE void restrict_block(const Image& g, double* w) {
  const int* label = g.memory.label;
  const double* trivial = g.memory.trivial;
  const double* sums = g.sums;
  if (g.counts[0] > 1 || g.counts[1] > 1) {
    reduce<4, Add>(g, kClasses, [&](int family, int i, double* acc) {
      if (label[i] == 1 + family) {
        FOVEATE_UNROLL
        for (int v = 0; v < 4; ++v) acc[v] += w[4 * i + v];
      }
    });
    each_row(g, [&](int i) {
      if (label[i] == 0) return;
      const int count = g.counts[label[i] - 1];
      if (count < 2) return;
      for (int v = 0; v < 4; ++v) w[4 * i + v] = sums[4 * (label[i] - 1) + v] / count;
    });
  }
  reduce<4, Add>(g, 1, [&](int, int i, double* acc) {
    FOVEATE_UNROLL
    for (int v = 0; v < 4; ++v) acc[v] += trivial[i] * w[4 * i + v];
  });
  each_row(g, [&](int i) {
    for (int v = 0; v < 4; ++v) w[4 * i + v] -= sums[v] * trivial[i];
  });
}

// w -= V (V^T w) for `blocks` blocks of the basis; V^T w [4 blocks][4] is left in sums.
FOVEATE_SHARED_CODE void project(const Image& g, int blocks, double* w) {
  const double* basis = g.memory.basis;
  const int n = g.n;
  reduce<16, Add>(g, blocks, [&](int b, int i, double* acc) {
    const double* v = basis + 4 * (n * b + i);
    FOVEATE_UNROLL
    for (int r = 0; r < 4; ++r) {
      FOVEATE_UNROLL
      for (int c = 0; c < 4; ++c) acc[4 * r + c] += v[r] * w[4 * i + c];
    }
  });
  const double* part = g.sums;
  each_row(g, [&](int i) {
    double rest[4];
    for (int c = 0; c < 4; ++c) rest[c] = w[4 * i + c];
    for (int b = 0; b < blocks; ++b) {
      const double* v = basis + 4 * (n * b + i);
      FOVEATE_UNROLL
      for (int r = 0; r < 4; ++r) {
        FOVEATE_UNROLL
        for (int c = 0; c < 4; ++c) rest[c] -= v[r] * part[16 * b + 4 * r + c];
      }
    }
    for (int c = 0; c < 4; ++c) w[4 * i + c] = rest[c];
  });
}

FOVEATE_SHARED_CODE double column_norm(const Image& g, const double* w, int c) {
  reduce<1, Add>(g, 1, [&](int, int i, double* acc) { acc[0] += w[4 * i + c] * w[4 * i + c]; });
  return sqrt(g.sums[0]);
}

// Column c of w less its parts along the columns before it, whose products are left in sums.
FOVEATE_SHARED_CODE void project_column(const Image& g, double* w, int c) {
  reduce<4, Add>(g, 1, [&](int, int i, double* acc) {
    for (int p = 0; p < 3; ++p) acc[p] += p < c ? w[4 * i + p] * w[4 * i + c] : 0.0;
  });
  each_row(g, [&](int i) {
    for (int p = 0; p < c; ++p) w[4 * i + c] -= g.sums[p] * w[4 * i + p];
  });
}

// In [-1, 1): splitmix64 of index and column.
FOVEATE_DEVICE double counter_hash(int index, int column) {
  std::uint64_t x = (static_cast<std::uint64_t>(index) << 20) + static_cast<std::uint64_t>(column) +
                    0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-52 - 1.0;
}

// A hash vector, orthogonal to everything there is, in column 0 of memory.spare.
FOVEATE_SHARED_CODE void fresh_direction(const Image& g, int blocks, int number) {
  double* spare = g.memory.spare;
  each_row(g, [&](int i) {
    spare[4 * i] = counter_hash(i, number);
    for (int v = 1; v < 4; ++v) spare[4 * i + v] = 0;
  });
  restrict_block(g, spare);
  const double size = column_norm(g, spare, 0);
  each_row(g, [&](int i) { spare[4 * i] /= size > 0 ? size : 1; });
  project(g, blocks, spare);
  project(g, blocks, spare);
}

// Orthonormal columns in place, w = q R with R in memory.r; a column that vanishes is replaced by a
// fresh one (its row of R is 0), or by zeros when the space is exhausted. Returns a bit for each
// column that is left.
FOVEATE_SHARED_CODE unsigned orthonormalize(const Image& g, int blocks, double* w, int* fresh) {
  double* r = g.memory.r;
  const bool writes = g.rank == 0 && g.thread == 0;
  unsigned alive = 0;
  bool small = false;
  if (writes) {
    for (int e = 0; e < 16; ++e) r[e] = 0;
  }
  for (int c = 0; c < 4; ++c) {
    for (int attempt = 0; attempt < 2; ++attempt) {
      for (int round = 0; round < 2 && c > 0; ++round) {
        project_column(g, w, c);
        for (int p = 0; writes && attempt == 0 && p < c; ++p) r[4 * p + c] += g.sums[p];
      }
      const double norm = column_norm(g, w, c);
      if (norm > (attempt == 0 ? 1e-12 : 1e-8)) {
        small = small || norm < 1e-3;
        each_row(g, [&](int i) { w[4 * i + c] /= norm; });
        if (writes && attempt == 0) r[4 * c + c] = norm;
        alive |= 1U << c;
        break;
      }
      if (writes) {
        for (int p = 0; p < c; ++p) r[4 * p + c] = 0;
      }
      if (attempt == 0) fresh_direction(g, blocks, (*fresh)++);
      each_row(g, [&](int i) { w[4 * i + c] = attempt == 0 ? g.memory.spare[4 * i] : 0.0; });
    }
  }
  if (small) {
    // Normalising a small remainder magnified what rounding left along the basis.
    restrict_block(g, w);
    project(g, blocks, w);
    for (int c = 0; c < 4; ++c) {
      if (c > 0) project_column(g, w, c);
      const double norm = column_norm(g, w, c);
      each_row(g, [&](int i) {
        if (norm > 0.5) w[4 * i + c] /= norm;
      });
    }
  }
  device::sync_cluster();
  return alive;
}

// The rows that a block owns of n tokens shared by `blocks` blocks.
FOVEATE_BOTH int rows_of_block(int n, int blocks) {
  const int rows = (n + blocks - 1) / blocks;
  return (rows + kChunk - 1) / kChunk * kChunk;
}

// Doubles of shared memory: the tile, the sums and, where they are resident, the block's bits.
FOVEATE_BOTH int shared_doubles(int n, int k, int blocks, bool resident) {
  const int words = resident ? (n + 31) / 32 * rows_of_block(n, blocks) : 0;
  return 4 * kTile + 16 * (basis_cap(k) + 1) + (words + 1) / 2;
}

struct Shape {
  int blocks;     // of a cluster
  bool resident;  // the bits stay in shared memory
};

// The smallest cluster whose shared memory of `room` bytes a block holds the bits, doubled up to
// `most` blocks while the device has processors to spare; `widest` where only that many hold them.
// Weights, and bits that fit into no cluster, are read from global memory at every pass.
FOVEATE_BOTH Shape shape_of(int kind, int b, int n, int k, int room, int processors, int most,
                            int widest) {
  const auto fits = [&](int blocks) {
    return kind == 0 && 8 * shared_doubles(n, k, blocks, true) <= room;
  };
  int blocks = 1;
  while (blocks < most && (!fits(blocks) || 2 * blocks * b <= processors)) blocks *= 2;
  if (!fits(blocks) && fits(widest)) blocks = widest;
  return Shape{blocks, fits(blocks)};
}

}  // namespace
}  // namespace foveate
