#include <cuda_runtime.h>

#include "ncut.h"
#include "ncut_solve.cuh"

namespace foveate {
namespace {

constexpr int kThreads = 512;
constexpr int kMostBlocks = 8;      // of a cluster, without asking for more than is portable
constexpr int kWidest = 16;         // of a cluster, where the device takes one
constexpr int kMostImages = 65535;  // of a launch

FOVEATE_KERNEL(kThreads) ncut_lanczos_kernel(const NcutBatch batch, const bool resident) {
  ncut_solve(batch, resident);
}

struct Launch {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t config;
};

void prepare(int n, int k, int images, const Shape& shape, cudaStream_t stream, Launch* launch) {
  launch->cluster = cudaLaunchAttribute{};
  launch->cluster.id = cudaLaunchAttributeClusterDimension;
  launch->cluster.val.clusterDim.x = static_cast<unsigned>(shape.blocks);
  launch->cluster.val.clusterDim.y = 1;
  launch->cluster.val.clusterDim.z = 1;
  launch->config = cudaLaunchConfig_t{};
  launch->config.gridDim = dim3(static_cast<unsigned>(shape.blocks), static_cast<unsigned>(images));
  launch->config.blockDim = dim3(kThreads);
  launch->config.dynamicSmemBytes =
      sizeof(double) * static_cast<std::size_t>(shared_doubles(n, k, shape.blocks, shape.resident));
  launch->config.stream = stream;
  launch->config.attrs = &launch->cluster;
  launch->config.numAttrs = shape.blocks > 1 ? 1 : 0;
}

// The most blocks of a cluster that this device runs with the bits of n tokens resident: more than
// are portable need its leave.
int widest_cluster(int n, int k) {
  Launch wide;
  prepare(n, k, 1, Shape{kWidest, true}, nullptr, &wide);
  int clusters = 0;
  const bool fine =
      cudaFuncSetAttribute(ncut_lanczos_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed,
                           1) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, ncut_lanczos_kernel, &wide.config) == cudaSuccess &&
      clusters > 0;
  if (!fine) cudaGetLastError();  // the refusal is an answer, not an error of the launch to come
  return fine ? kWidest : kMostBlocks;
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
                 std::uintptr_t stream, double* eigenvalues, double* eigenvectors, double* residual,
                 double* gap, std::int64_t* iterations, std::uint8_t* converged,
                 std::uint8_t* degenerate, std::int64_t* uncertain) {
  const NcutBatch batch{operand,   kind,       tokens,      eps,          n,        k,   tol,
                        max_iter,  scratch,    eigenvalues, eigenvectors, residual, gap, iterations,
                        converged, degenerate, uncertain};
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
  status =
      cudaFuncSetAttribute(ncut_lanczos_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
  if (status != cudaSuccess) return static_cast<int>(status);
  const int most = major >= 9 ? kMostBlocks : 1;
  Shape shape = shape_of(kind, b, n, k, room, processors, most, most);
  if (kind == 0 && !shape.resident && most == kMostBlocks) {
    shape = shape_of(kind, b, n, k, room, processors, most, widest_cluster(n, k));
  }
  for (int first = 0; first < b; first += kMostImages) {
    const int images = b - first < kMostImages ? b - first : kMostImages;
    Launch part;
    prepare(n, k, images, shape, reinterpret_cast<cudaStream_t>(stream), &part);
    status =
        cudaLaunchKernelEx(&part.config, ncut_lanczos_kernel, from(batch, first), shape.resident);
    if (status != cudaSuccess) return static_cast<int>(status);
  }
  return 0;
}

}  // namespace foveate
