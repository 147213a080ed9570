#include "ncut.h"

#include <cuda_runtime.h>

#include "ncut_solve.cuh"

namespace foveate {
namespace {

constexpr int kThreads = 512;
constexpr int kMostBlocks = 8;      // of a cluster, without asking for more than is portable
constexpr int kMostImages = 65535;  // of a launch

FOVEATE_KERNEL(kThreads) ncut_lanczos_kernel(const NcutBatch batch, const bool resident) {
  ncut_solve(batch, resident);
}

struct Shape {
  int blocks;     // of a cluster
  bool resident;  // the bits stay in shared memory
};

// The smallest cluster whose shared memory holds the bits, doubled while the device has blocks to
// spare. Weights, and bits that fit into no cluster, are read from global memory at every pass.
Shape shape_of(int kind, int b, int n, int k, int room, int processors, int most_blocks) {
  const auto fits = [&](int blocks) {
    return kind == 0 && 8 * shared_doubles(n, k, blocks, true) <= room;
  };
  Shape shape{1, fits(1)};
  while (shape.blocks < most_blocks &&
         (!fits(shape.blocks) || 2 * shape.blocks * b <= processors)) {
    shape.blocks *= 2;
  }
  shape.resident = fits(shape.blocks);
  return shape;
}

cudaError_t launch(const NcutBatch& batch, int images, const Shape& shape, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.blocks);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(images));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes =
      sizeof(double) *
      static_cast<std::size_t>(shared_doubles(batch.n, batch.k, shape.blocks, shape.resident));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, ncut_lanczos_kernel, batch, shape.resident);
}

// The part of a batch from image `first` on.
NcutBatch from(const NcutBatch& batch, std::int64_t first) {
  NcutBatch part = batch;
  const std::int64_t n = batch.n;
  const std::int64_t bytes[] = {(n + 31) / 32 * n * 4, n * n * 4, n * n * 8};
  part.operand = static_cast<const char*>(batch.operand) + first * bytes[batch.kind];
  part.tokens += first;
  part.eps += first;
  part.scratch += first * ncut_scratch(batch.n, batch.k);
  part.eigenvalues += first * batch.k;
  part.eigenvectors += first * batch.k * n;
  part.residual += first * batch.k;
  part.gap += first;
  part.iterations += first;
  part.converged += first;
  part.degenerate += first;
  part.uncertain += first;
  return part;
}

}  // namespace

std::int64_t ncut_scratch(int n, int k) { return carve(nullptr, n, k).size; }

int ncut_lanczos(const void* operand, int kind, const std::int64_t* tokens, const double* eps,
                 int b, int n, int k, double tol, int max_iter, double* scratch,
                 std::uintptr_t stream, double* eigenvalues, double* eigenvectors,
                 double* residual, double* gap, std::int64_t* iterations, std::uint8_t* converged,
                 std::uint8_t* degenerate, std::int64_t* uncertain) {
  const NcutBatch batch{operand,      kind,     tokens, eps,        n,         k,
                        tol,          max_iter, scratch, eigenvalues, eigenvectors, residual,
                        gap,          iterations, converged, degenerate, uncertain};
  int device = 0;
  int room = 0;
  int processors = 0;
  int major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return static_cast<int>(status);
  status = cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return static_cast<int>(status);
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return static_cast<int>(status);
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return static_cast<int>(status);
  status = cudaFuncSetAttribute(ncut_lanczos_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                room);
  if (status != cudaSuccess) return static_cast<int>(status);
  const Shape shape = shape_of(kind, b, n, k, room, processors, major >= 9 ? kMostBlocks : 1);
  for (int first = 0; first < b; first += kMostImages) {
    const int images = b - first < kMostImages ? b - first : kMostImages;
    status = launch(from(batch, first), images, shape, reinterpret_cast<cudaStream_t>(stream));
    if (status != cudaSuccess) return static_cast<int>(status);
  }
  return 0;
}

}  // namespace foveate
