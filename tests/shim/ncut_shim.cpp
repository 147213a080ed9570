// The CUDA solver of csrc/cuda/ncut_solve.cuh on the host, for tests/test_ncut_cuda.py.
#include <string>

#include "cuda/ncut_solve.cuh"

namespace {
std::string error;
}

extern "C" std::int64_t ncut_shim_scratch(int n, int k) {
  return foveate::carve(nullptr, n, k).size;
}

// Blocks of a cluster for an image of bits, negative where the bits are not resident.
extern "C" int ncut_shim_shape(int kind, int b, int n, int k, int room, int processors, int most,
                               int widest) {
  const foveate::Shape shape = foveate::shape_of(kind, b, n, k, room, processors, most, widest);
  return shape.resident ? shape.blocks : -shape.blocks;
}

// `blocks` of `threads` an image; order 0 ascending, 1 descending, 2 random. Returns what went
// wrong, or an empty string.
extern "C" const char* ncut_shim(const void* operand, int kind, const std::int64_t* tokens,
                                 const double* eps, int b, int n, int k, double tol, int max_iter,
                                 double* scratch, int blocks, int threads, int resident, int order,
                                 double* eigenvalues, double* eigenvectors, double* residual,
                                 double* gap, std::int64_t* iterations, std::uint8_t* converged,
                                 std::uint8_t* degenerate, std::int64_t* uncertain) {
  const foveate::NcutBatch batch{operand,   kind,     tokens,      eps,          n,        k,
                                 tol,       max_iter, scratch,     eigenvalues,  eigenvectors,
                                 residual,  gap,      iterations,  converged,    degenerate,
                                 uncertain};
  const auto shared =
      static_cast<std::size_t>(foveate::shared_doubles(n, k, blocks, resident != 0));
  error.clear();
  for (int image = 0; image < b && error.empty(); ++image) {
    error = foveate::shim::run_cluster(image, blocks, threads, shared,
                                       static_cast<foveate::shim::Order>(order),
                                       static_cast<std::uint64_t>(image),
                                       [&] { foveate::ncut_solve(batch, resident != 0); });
  }
  return error.c_str();
}
