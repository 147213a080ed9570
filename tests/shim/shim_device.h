// Runs kernel text on the host, one fibre per thread, one cluster after the other.
//
// A barrier hands over to the next fibre in a chosen order and opens when all threads of its group
// have come to it, on one line of the source; a mismatch, or a thread that never comes, is an
// error. Blocks of a cluster run together over an array of shared memories. ucontext starts a
// fibre; setjmp and longjmp switch, which unlike swapcontext need no system call.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>
#include <algorithm>
#include <bit>
#include <functional>

#define FOVEATE_DEVICE inline
#define FOVEATE_SHARED_CODE static
#define FOVEATE_BOTH inline
#define FOVEATE_KERNEL(threads) inline void
#define FOVEATE_UNROLL

namespace foveate::shim {

enum Order { kAscending, kDescending, kRandom };

struct Group {
  int size = 0;
  int arrived = 0;
  int line = 0;
  std::uint64_t opened = 0;
};

struct Warp : Group {
  double slots[2][32] = {};
};

struct Block : Group {
  std::vector<double> memory;
  std::vector<Warp> warps;
};

struct Fibre {
  ucontext_t start;
  std::jmp_buf place;
  std::unique_ptr<char[]> stack;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int rank = 0;
  int thread = 0;
  int shuffles = 0;
  bool started = false;
  bool finished = false;
  const Group* waits = nullptr;
  std::uint64_t ticket = 0;
};

struct Cluster : Group {
  std::vector<Block> blocks;
  std::vector<Fibre> fibres;
  const std::function<void()>* kernel = nullptr;
  int index = 0;
  int threads = 0;
  std::jmp_buf scheduler;
  std::string error;
};

inline Cluster* cluster = nullptr;
inline Fibre* self = nullptr;

// Back to the scheduler, until it resumes this fibre.
[[gnu::noinline]] inline void yield() {
  Fibre* const fibre = self;
  if (_setjmp(fibre->place) == 0) _longjmp(cluster->scheduler, 1);
}

[[gnu::noinline]] inline void fail(const std::string& reason) {
  if (cluster->error.empty()) cluster->error = reason;
  self->finished = true;
  yield();
}

[[gnu::noinline]] inline void wait(Group& group, const char* name, int line) {
  if (group.arrived > 0 && group.line != line) {
    fail(std::string(name) + " barriers of lines " + std::to_string(group.line) + " and " +
         std::to_string(line) + " meet");
  }
  group.line = line;
  self->waits = &group;
  self->ticket = group.opened;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.opened;
  }
  yield();
  self->waits = nullptr;
}

inline void enter() {
  (*cluster->kernel)();
  self->finished = true;
  _longjmp(cluster->scheduler, 1);
}

[[gnu::noinline]] inline void resume(Fibre& fibre) {
  self = &fibre;
  if (_setjmp(cluster->scheduler) != 0) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  setcontext(&fibre.start);
}

[[gnu::noinline]] inline void prepare(Fibre& fibre) {
  constexpr std::size_t kStack = 64 * 1024;
  fibre.stack.reset(new char[kStack]);
  getcontext(&fibre.start);
  fibre.start.uc_stack.ss_sp = fibre.stack.get();
  fibre.start.uc_stack.ss_size = kStack;
  fibre.start.uc_link = nullptr;
  makecontext(&fibre.start, enter, 0);
}

// Runs the kernel for one cluster; returns what went wrong, or nothing. Shared memory holds NaN.
inline std::string run_cluster(int index, int blocks, int threads, std::size_t shared_doubles,
                               Order order, std::uint64_t seed,
                               const std::function<void()>& kernel) {
  Cluster team;
  team.size = blocks * threads;
  team.kernel = &kernel;
  team.index = index;
  team.threads = threads;
  team.blocks.resize(static_cast<std::size_t>(blocks));
  team.fibres = std::vector<Fibre>(static_cast<std::size_t>(blocks * threads));
  std::size_t at = 0;
  for (int b = 0; b < blocks; ++b) {
    Block& block = team.blocks[static_cast<std::size_t>(b)];
    block.size = threads;
    block.memory.assign(shared_doubles, std::numeric_limits<double>::quiet_NaN());
    block.warps.resize(static_cast<std::size_t>(threads / 32));
    for (int t = 0; t < threads; ++t, ++at) {
      Fibre& fibre = team.fibres[at];
      fibre.block = &block;
      fibre.warp = &block.warps[static_cast<std::size_t>(t / 32)];
      fibre.warp->size = 32;
      fibre.rank = b;
      fibre.thread = t;
      prepare(fibre);
    }
  }
  cluster = &team;
  std::vector<std::size_t> turns(team.fibres.size());
  for (std::size_t i = 0; i < turns.size(); ++i) {
    turns[i] = order == kDescending ? turns.size() - 1 - i : i;
  }
  std::mt19937_64 random(seed);
  for (bool live = true; live && team.error.empty();) {
    if (order == kRandom) std::shuffle(turns.begin(), turns.end(), random);
    live = false;
    bool moved = false;
    for (const std::size_t turn : turns) {
      Fibre& fibre = team.fibres[turn];
      if (fibre.finished) continue;
      live = true;
      if (fibre.waits != nullptr && fibre.waits->opened == fibre.ticket) continue;
      moved = true;
      resume(fibre);
      if (!team.error.empty()) break;
    }
    if (live && !moved) {
      for (const Fibre& fibre : team.fibres) {
        if (!fibre.finished && team.error.empty()) {
          team.error = "a thread waits at the barrier of line " +
                       std::to_string(fibre.waits->line) + " that others never reach";
        }
      }
    }
  }
  cluster = nullptr;
  self = nullptr;
  return team.error;
}

}  // namespace foveate::shim

namespace foveate::device {

inline int thread_index() { return shim::self->thread; }
inline int thread_count() { return shim::cluster->threads; }
inline int block_rank() { return shim::self->rank; }
inline int block_count() { return static_cast<int>(shim::cluster->blocks.size()); }
inline int cluster_index() { return shim::cluster->index; }
inline double* shared_memory() { return shim::self->block->memory.data(); }

inline void sync_warp(int line = __builtin_LINE()) { shim::wait(*shim::self->warp, "warp", line); }
inline void sync_block(int line = __builtin_LINE()) {
  shim::wait(*shim::self->block, "block", line);
}
inline void sync_cluster(int line = __builtin_LINE()) {
  shim::wait(*shim::cluster, "cluster", line);
}

// What each lane of the warp gave, in slots that the next but one exchange overwrites.
inline const double* exchange(double value, int line) {
  double* slots = shim::self->warp->slots[shim::self->shuffles++ % 2];
  slots[shim::self->thread % 32] = value;
  shim::wait(*shim::self->warp, "warp", line);
  return slots;
}
inline double shuffle_xor(double value, int mask, int line = __builtin_LINE()) {
  return exchange(value, line)[(shim::self->thread % 32) ^ mask];
}
inline std::uint32_t ballot(bool flag, int line = __builtin_LINE()) {
  const double* slots = exchange(flag ? 1 : 0, line);
  std::uint32_t word = 0;
  for (int lane = 0; lane < 32; ++lane) word |= (slots[lane] != 0 ? 1U : 0U) << lane;
  return word;
}
inline int bit_count(std::uint32_t word) { return std::popcount(word); }

}  // namespace foveate::device
