// A graph as the solver of ncut sees it: its operand, its degrees, its classes of equal rows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace foveate::FOVEATE_ISA {
namespace {

[[maybe_unused]] constexpr std::int64_t kDense = 64;  // tokens up to which all is diagonalised
[[maybe_unused]] constexpr double kFloor = 4 * 2.220446049250313e-16;
[[maybe_unused]] constexpr double kExact = 1e-13;  // a residual that rounding lets fall no further
[[maybe_unused]] constexpr double kDegenerate = 1e-9;
[[maybe_unused]] constexpr std::int64_t kChunk = 128;  // rows whose sums are added in one piece

struct Memory {
  double* data;
  explicit Memory(std::int64_t count) : data(new double[static_cast<std::size_t>(count) + 8]) {
    std::memset(data, 0, (static_cast<std::size_t>(count) + 8) * sizeof(double));
  }
  ~Memory() { delete[] data; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
};

[[maybe_unused]] double counter_hash(std::uint64_t index, std::uint64_t column) {
  std::uint64_t x = (index << 20) + column + 0x9e3779b97f4a7c15ULL;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1p-52 - 1.0;
}

enum Kind { kBits = 0, kWeights32 = 1, kWeights64 = 2 };

struct Graph {
  std::int64_t n;
  const void* operand;
  int kind;
  double eps;
  double* scale;        // [n] D^-1/2
  double* trivial;      // [n] unit
  std::int64_t* alike;  // tokens of equal rows: class a, then class b
  std::int64_t counts[2];
  double values[2];   // mu of their contrasts
  std::int64_t room;  // dimension of the class-constant vectors without the trivial one
  int threads;        // of a product
  int row_threads;    // of sums over a few vectors
  double* input;      // [n][4], scratch of `apply`
  double* scratch;    // of `apply`: [threads][4096] for bits, [weight_parts(n)][n][4] for weights
};

// Fills scale, trivial, alike, counts, values and room from degrees: int32 set bits of a row, or
// float64 row sums. Returns false where one of them is not a positive number.
[[maybe_unused]] bool describe(Graph& g, const void* degrees) {
  const std::int64_t n = g.n;
  const auto* joined = static_cast<const std::int32_t*>(degrees);
  const auto* sums = static_cast<const double*>(degrees);
  double size = 0;
  std::int64_t none = 0;
  bool positive = true;
  for (std::int64_t i = 0; i < n; ++i) {
    const double degree = g.kind == kBits ? g.eps * static_cast<double>(n) +
                                                (1 - g.eps) * static_cast<double>(joined[i])
                                          : sums[i];
    positive = positive && degree > 0 && degree < INFINITY;
    g.scale[i] = 1 / std::sqrt(degree);
    g.trivial[i] = std::sqrt(degree);
    size += degree;
    if (g.kind == kBits && joined[i] == 0) ++none;
  }
  for (std::int64_t i = 0; i < n; ++i) g.trivial[i] /= std::sqrt(size);
  g.counts[0] = g.counts[1] = 0;
  if (g.kind == kBits) {
    const auto* bits = static_cast<const std::uint32_t*>(g.operand);
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
    g.values[0] = 0;
    g.values[1] = (1 - g.eps) / (1 - g.eps + static_cast<double>(n) * g.eps);
  }
  g.room = n - 1;
  for (std::int64_t count : g.counts) g.room -= count > 1 ? count - 1 : 0;
  return positive;
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
