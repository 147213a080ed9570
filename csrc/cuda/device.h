// What kernel text asks of the hardware: each function is an instruction or two. A host build
// (FOVEATE_SHIM) takes the same names from tests/shim/shim_device.h, where a thread is a fibre.
//
// A cluster is the set of blocks that work on one problem; a launch without clusters has one block
// in each. Every barrier is met by all threads of its block, cluster or warp.
#pragma once

#include <cstdint>

#if defined(FOVEATE_SHIM)

#include "shim_device.h"

#else

#define FOVEATE_DEVICE __device__ inline
#define FOVEATE_SHARED_CODE static __device__ __noinline__  // called from many places, kept once
#define FOVEATE_BOTH __host__ __device__ inline
#define FOVEATE_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define FOVEATE_UNROLL _Pragma("unroll")

namespace foveate::device {

FOVEATE_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FOVEATE_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }

// The block's place in its cluster, the cluster's blocks, and the cluster's place in the grid, for
// a grid of clusters x blocks.
FOVEATE_DEVICE int block_rank() { return static_cast<int>(blockIdx.x); }
FOVEATE_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
FOVEATE_DEVICE int cluster_index() { return static_cast<int>(blockIdx.y); }

// The block's dynamic shared memory.
FOVEATE_DEVICE double* shared_memory() {
  extern __shared__ double memory[];
  return memory;
}

FOVEATE_DEVICE void sync_warp() { __syncwarp(); }
FOVEATE_DEVICE void sync_block() { __syncthreads(); }

// Also makes what the cluster wrote to global memory visible to all of it.
FOVEATE_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  if (gridDim.x > 1) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

FOVEATE_DEVICE double shuffle_xor(double value, int mask) {
  return __shfl_xor_sync(0xffffffffU, value, mask);
}
FOVEATE_DEVICE std::uint32_t ballot(bool flag) { return __ballot_sync(0xffffffffU, flag); }
FOVEATE_DEVICE int bit_count(std::uint32_t word) { return __popc(word); }

}  // namespace foveate::device

#endif
