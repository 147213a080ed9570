// Kernels with planted faults, for tests/test_shim.py: what the shim must see.
#include <string>

#include "cuda/device.h"

namespace {

namespace device = foveate::device;
std::string error;

// The block's sum of its thread indices, by a tree in shared memory, with or without its barriers.
void tree_sum(double* out, bool first_barrier, bool loop_barrier) {
  double* memory = device::shared_memory();
  const int thread = device::thread_index();
  memory[thread] = thread;
  if (first_barrier) device::sync_block();
  for (int half = device::thread_count() / 2; half > 0; half /= 2) {
    if (thread < half) memory[thread] += memory[thread + half];
    if (loop_barrier) device::sync_block();
  }
  if (thread == 0) out[device::block_rank()] = memory[0];
}

// A warp's sum, and the lanes whose index is odd.
void warp_sum(double* out) {
  double value = device::thread_index();
  for (int mask = 16; mask > 0; mask /= 2) value += device::shuffle_xor(value, mask);
  const std::uint32_t odd = device::ballot(device::thread_index() % 2 != 0);
  if (device::thread_index() % 32 == 5) {
    out[2 * (device::thread_index() / 32)] = value;
    out[2 * (device::thread_index() / 32) + 1] = odd;
  }
}

// Half of the threads meet another barrier than the rest, or none.
void split(bool meets) {
  if (device::thread_index() % 2 == 0) {
    device::sync_block();
  } else if (meets) {
    device::sync_block();
  }
}

// Each block reads what the other wrote to global memory.
void swap(double* out, bool barrier) {
  const int rank = device::block_rank();
  if (device::thread_index() == 0) out[rank] = rank + 1;
  if (barrier) device::sync_cluster();
  const double other = out[1 - rank];
  device::sync_cluster();
  if (device::thread_index() == 0) out[rank] = other;
}

}  // namespace

extern "C" const char* faults_shim(const char* name, int blocks, int threads, int order, int seed,
                                   double* out) {
  const std::string kernel(name);
  error = foveate::shim::run_cluster(
      0, blocks, threads, static_cast<std::size_t>(threads),
      static_cast<foveate::shim::Order>(order), static_cast<std::uint64_t>(seed), [&] {
        if (kernel == "tree sum") tree_sum(out, true, true);
        if (kernel == "tree sum without its first barrier") tree_sum(out, false, true);
        if (kernel == "tree sum without its loop's barrier") tree_sum(out, true, false);
        if (kernel == "warp sum") warp_sum(out);
        if (kernel == "two barriers") split(true);
        if (kernel == "half a barrier") split(false);
        if (kernel == "swap") swap(out, true);
        if (kernel == "swap without a barrier") swap(out, false);
      });
  return error.c_str();
}
