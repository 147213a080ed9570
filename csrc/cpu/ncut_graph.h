// A graph as the solver of ncut sees it: its operand, its degrees, its classes of equal rows.
#pragma once

#include <cstdint>
#include <cstring>

namespace foveate::FOVEATE_ISA {
namespace {

[[maybe_unused]] constexpr std::int64_t kDense = 64;      // tokens up to which the whole spectrum is computed
[[maybe_unused]] constexpr double kFloor = 4 * 2.220446049250313e-16;
[[maybe_unused]] constexpr double kExact = 1e-13;         // a residual that rounding does not let fall further
[[maybe_unused]] constexpr double kDegenerate = 1e-9;

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

struct Graph {
  std::int64_t n;
  const void* operand;
  int kind;
  double eps;
  double* scale;           // [n] D^-1/2
  double* trivial;         // [n] unit
  std::int64_t* alike;     // tokens of equal rows: class a, then class b
  std::int64_t counts[2];
  double values[2];        // mu of their contrasts
  int threads;
};

}  // namespace
}  // namespace foveate::FOVEATE_ISA
