// From eigenvectors to masks: the component of a seed, and the stages of MaskCut. Job fields of
// `ncut_maskcut` (addresses as integers), m stages, n = h w tokens:
//   0 h, 1 w, 2 bits of the image, nothing painted; outputs: 3 masks [m, n], 4 status [m],
//   5 candidates [m, n], 6 seeds [m], 7 eigenvalues [m], 8 gap [m], 9 residual [m], 10 integers
//   [m, 4] as those of `ncut_lanczos`, 11 eigenvectors [m, n]. Masks are bytes.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "ncut.h"
#include "ncut_graph.h"
#include "ncut_solver.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr double kTie = 1e-9;  // entries that differ by less, relative to the largest, are tied

enum Status { kOk = 0, kOverlap = 1, kSmall = 2, kCovered = 3, kRejected = 4, kStopped = 5 };
enum OnReject { kRetry = 0, kStop = 1, kSkip = 2 };

// The first entry of f(0 .. n) that ties with the largest.
template <typename F>
std::int64_t largest_entry(std::int64_t n, F f) {
  double top = f(0);
  for (std::int64_t i = 1; i < n; ++i) top = std::max(top, f(i));
  std::int64_t at = 0;
  while (at + 1 < n && !(f(at) >= top - kTie * std::abs(top))) ++at;
  return at;
}

std::int64_t size_of(const std::uint8_t* mask, std::int64_t n) {
  std::int64_t size = 0;
  for (std::int64_t i = 0; i < n; ++i) size += mask[i];
  return size;
}

// The candidate of a stage and its seed: a component of the side that avoids the corners.
std::int64_t candidate(const double* x, std::int64_t h, std::int64_t w, int corners,
                       std::uint8_t* side, std::uint8_t* found) {
  const std::int64_t n = h * w;
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += x[i];
  const double mean = sum / static_cast<double>(n);
  for (std::int64_t i = 0; i < n; ++i) side[i] = x[i] > mean ? 1 : 0;
  std::int64_t seed = largest_entry(n, [&](std::int64_t i) { return std::abs(x[i]); });
  const int held = side[0] + side[w - 1] + side[(h - 1) * w] + side[n - 1];
  if (corners > 0 && held >= corners) {
    for (std::int64_t i = 0; i < n; ++i) side[i] ^= 1U;
    seed = largest_entry(n, [&](std::int64_t i) { return -x[i]; });
  }
  ncut_component(side, seed, h, w, found);
  return seed;
}

// One image, every stage of it.
void cut_masks(const std::int64_t* job, int n_masks, double eps, int joined, double iou_threshold,
               double min_area, int corners, int on_reject, double tol, int max_iter, int threads) {
  const std::int64_t h = job[0];
  const std::int64_t w = job[1];
  const std::int64_t n = h * w;
  const auto bytes = static_cast<std::size_t>(n);
  const std::size_t words = static_cast<std::size_t>((n + 31) / 32 * n) * 4;
  const auto* whole = reinterpret_cast<const void*>(job[2]);
  auto* masks = reinterpret_cast<std::uint8_t*>(job[3]);
  auto* status = reinterpret_cast<std::int64_t*>(job[4]);
  auto* candidates = reinterpret_cast<std::uint8_t*>(job[5]);
  auto* seeds = reinterpret_cast<std::int64_t*>(job[6]);
  auto* integers = reinterpret_cast<std::int64_t*>(job[10]);
  double* reals[3];
  for (int t = 0; t < 3; ++t) reals[t] = reinterpret_cast<double*>(job[7 + t]);
  auto* vectors = reinterpret_cast<double*>(job[11]);
  Memory bits_memory((n + 31) / 32 * n / 2 + 1), degree_memory(n / 2 + 1), last(2 * n);
  Memory cells(n / 2 + 4);  // side, painted, previous, used
  auto* bits = reinterpret_cast<std::uint32_t*>(bits_memory.data);
  auto* degrees = reinterpret_cast<std::int32_t*>(degree_memory.data);
  auto* side = reinterpret_cast<std::uint8_t*>(cells.data);
  std::uint8_t* painted = side + n;
  std::uint8_t* previous = painted + n;
  std::uint8_t* used = previous + n;

  bool solve = true;
  for (int stage = 0; stage < n_masks; ++stage) {
    std::uint8_t* mask = masks + stage * n;
    std::uint8_t* found = candidates + stage * n;
    double* x = vectors + stage * n;
    std::memset(mask, 0, bytes);
    std::memset(found, 0, bytes);
    if (solve) {
      std::memcpy(bits, whole, words);
      ncut_paint(painted, joined, n, bits);
      ncut_degrees(bits, n, degrees);
      const auto address = [](auto* pointer) { return reinterpret_cast<std::int64_t>(pointer); };
      const std::int64_t given[12] = {n,
                                      address(bits),
                                      kBits,
                                      address(degrees),
                                      stage > 0 ? address(last.data) : 0,
                                      address(reals[0] + stage),
                                      address(x),
                                      address(reals[2] + stage),
                                      address(reals[1] + stage),
                                      address(integers + 4 * stage),
                                      address(last.data),
                                      0};
      ncut_solve(given, eps, 1, tol, max_iter, threads);
    } else {
      for (double* values : reals) values[stage] = values[stage - 1];
      std::memcpy(integers + 4 * stage, integers + 4 * stage - 4, 4 * sizeof(std::int64_t));
      std::memcpy(x, x - n, bytes * sizeof(double));
    }
    solve = false;
    seeds[stage] = -1;
    status[stage] = kRejected;
    if (integers[4 * stage + 2] == 0) {
      seeds[stage] = candidate(x, h, w, corners, side, found);
      std::int64_t both = 0;
      std::int64_t either = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        both += found[i] & previous[i];
        either += found[i] | previous[i];
      }
      const double overlap =
          either > 0 ? static_cast<double>(both) / static_cast<double>(either) : 0;
      const double area = static_cast<double>(size_of(found, n)) / static_cast<double>(n);
      status[stage] = kOk;
      if (stage > 0 && either > 0 && overlap > iou_threshold) {
        status[stage] = kOverlap;
      } else if (stage > 0 && area <= min_area) {
        status[stage] = kSmall;
      }
    }
    const bool rejected = status[stage] != kOk;
    if (!rejected) {
      for (std::int64_t i = 0; i < n; ++i) {
        mask[i] = found[i] & (used[i] ^ 1U);
        used[i] |= found[i];
      }
      if (size_of(mask, n) == 0) status[stage] = kCovered;
    }
    if (rejected && on_reject == kRetry) {
      std::memset(previous, 0, bytes);
      continue;
    }
    if (rejected && on_reject == kStop) {
      for (int left = stage + 1; left < n_masks; ++left) {
        status[left] = kStopped;
        seeds[left] = -1;
        for (double* values : reals) values[left] = 0;
        std::memset(integers + 4 * left, 0, 4 * sizeof(std::int64_t));
        std::memset(masks + left * n, 0, bytes);
        std::memset(candidates + left * n, 0, bytes);
        std::memset(vectors + left * n, 0, bytes * sizeof(double));
      }
      return;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      solve = solve || (found[i] != 0 && painted[i] == 0);
      painted[i] |= found[i];
    }
    std::memcpy(previous, found, bytes);
  }
}

}  // namespace

int ncut_component(const std::uint8_t* side, std::int64_t seed, std::int64_t h, std::int64_t w,
                   std::uint8_t* component) {
  const std::int64_t n = h * w;
  std::memset(component, 0, static_cast<std::size_t>(n));
  auto* stack = new std::int64_t[static_cast<std::size_t>(n) + 1];
  std::int64_t depth = 0;
  const auto visit = [&](std::int64_t cell) {
    if (side[cell] != 0 && component[cell] == 0) {
      component[cell] = 1;
      stack[depth++] = cell;
    }
  };
  visit(seed);
  while (depth > 0) {
    const std::int64_t cell = stack[--depth];
    if (cell >= w) visit(cell - w);
    if (cell + w < n) visit(cell + w);
    if (cell % w > 0) visit(cell - 1);
    if (cell % w + 1 < w) visit(cell + 1);
  }
  delete[] stack;
  return 0;
}

int ncut_maskcut(const std::int64_t* jobs, std::int64_t count, int n_masks, double eps, int joined,
                 double iou_threshold, double min_area, int corners, int on_reject, double tol,
                 int max_iter, int threads) {
  const bool across = count >= threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (across && threads > 1)
  for (std::int64_t j = 0; j < count; ++j) {
    cut_masks(jobs + 12 * j, n_masks, eps, joined, iou_threshold, min_area, corners, on_reject, tol,
              max_iter, across ? 1 : threads);
  }
  return 0;
}

}  // namespace foveate::FOVEATE_ISA
