// Normalized cuts on a CUDA device: a batched block Lanczos solver, one cluster of blocks an image.
#pragma once

#include <cstdint>

namespace foveate {

// The graphs of a batch and where their eigenpairs go; every pointer is of the device.
struct NcutBatch {
  const void* operand;         // bits [b, ceil(n / 32), n] uint32, or weights [b, n, n]
  int kind;                    // 0 bits, 1 float32 weights, 2 float64 weights
  const std::int64_t* tokens;  // [b], at most n: the rest is padding, whose bits are 0
  const double* eps;           // [b] W = eps + (1 - eps) B; weights do not use it
  int n;
  int k;
  double tol;
  int max_iter;
  double* scratch;  // [b, ncut_scratch(n, k)]
  // outputs
  double* eigenvalues;       // [b, k]
  double* eigenvectors;      // [b, k, n]
  double* residual;          // [b, k]
  double* gap;               // [b]
  std::int64_t* iterations;  // [b]
  std::uint8_t* converged;   // [b]
  std::uint8_t* degenerate;  // [b]
  std::int64_t* uncertain;   // [b]
};

// Doubles of scratch that an image needs.
std::int64_t ncut_scratch(int n, int k);

// The k first eigenpairs of each of b images, without the trivial one, on the current device.
// `stream` is a cudaStream_t. Returns a CUDA status.
int ncut_lanczos(const void* operand, int kind, const std::int64_t* tokens, const double* eps,
                 int b, int n, int k, double tol, int max_iter, double* scratch,
                 std::uintptr_t stream,
                 // outputs
                 double* eigenvalues, double* eigenvectors, double* residual, double* gap,
                 std::int64_t* iterations, std::uint8_t* converged, std::uint8_t* degenerate,
                 std::int64_t* uncertain);

}  // namespace foveate
