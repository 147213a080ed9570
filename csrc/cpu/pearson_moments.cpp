#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "pearson.h"
#include "pearson_source.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr int64_t kChannels = 128;  // channels of a block: its sums stay in L1
constexpr int64_t kRows = 64;       // positions summed in compute precision before double

// One thread owns a unit: its maps are read in turn, a row's sum in compute precision.
template <typename Src, typename C>
void moments_of_maps(const Src* x, const Shape& s, const double* wh, const double* ww, int threads,
                     double* sum, double* low, double* high) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t c = 0; c < s.c; ++c) {
    double total = 0;
    C least = std::numeric_limits<C>::infinity();
    C most = -least;
    for (int64_t n = 0; n < s.n; ++n) {
      for (int64_t y = 0; y < s.h; ++y) {
        const Src* row = x + n * s.stride_n + c * s.stride_c + y * s.stride_h;
        for (int64_t begin = 0; begin < s.w; begin += 512) {
          const int64_t end = std::min(begin + 512, s.w);
          C part = 0;
          C lo = least;
          C hi = most;
#pragma omp simd reduction(+ : part) reduction(min : lo) reduction(max : hi)
          for (int64_t i = begin; i < end; ++i) {
            const C value = convert<C>(row[i]);
            part += static_cast<C>(ww[i]) * value;
            lo = value < lo ? value : lo;
            hi = value > hi ? value : hi;
          }
          least = lo;
          most = hi;
          total += wh[y] * static_cast<double>(part);
        }
      }
    }
    sum[c] = total;
    low[c] = static_cast<double>(least);
    high[c] = static_cast<double>(most);
  }
}

// A thread owns a range of images and a private [3, c]; the ranges are merged in order.
template <typename Src, typename C>
void moments_of_tokens(const Src* x, const Shape& s, const double* wh, const double* ww,
                       int threads, double* sum, double* low, double* high) {
  const Scratch<double> parts(3 * s.c * threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
  for (int t = 0; t < threads; ++t) {
    double* part = parts.data + 3 * s.c * t;
    std::fill(part, part + s.c, 0.0);
    std::fill(part + s.c, part + 2 * s.c, std::numeric_limits<double>::infinity());
    std::fill(part + 2 * s.c, part + 3 * s.c, -std::numeric_limits<double>::infinity());
    const int64_t grid = s.h * s.w;
    const int64_t begin = s.n * t / threads * grid;
    const int64_t end = s.n * (t + 1) / threads * grid;
    for (int64_t c0 = 0; c0 < s.c; c0 += kChannels) {
      const int64_t width = std::min(kChannels, s.c - c0);
      for (int64_t k0 = begin; k0 < end; k0 += kRows) {
        alignas(64) C acc[kChannels] = {};
        alignas(64) C lo[kChannels];
        alignas(64) C hi[kChannels];
        std::fill(lo, lo + kChannels, std::numeric_limits<C>::infinity());
        std::fill(hi, hi + kChannels, -std::numeric_limits<C>::infinity());
        for (int64_t k = k0; k < std::min(k0 + kRows, end); ++k) {
          const int64_t y = grid == 1 ? 0 : k % grid / s.w;
          const int64_t column = grid == 1 ? 0 : k % s.w;
          const int64_t image = grid == 1 ? k : k / grid;
          const Src* row = x + image * s.stride_n + y * s.stride_h + column * s.stride_w + c0;
          const C weight = static_cast<C>(wh[y] * ww[column]);
#pragma omp simd
          for (int64_t i = 0; i < width; ++i) {
            const C value = convert<C>(row[i]);
            acc[i] += weight * value;
            lo[i] = value < lo[i] ? value : lo[i];
            hi[i] = value > hi[i] ? value : hi[i];
          }
        }
        for (int64_t i = 0; i < width; ++i) {
          part[c0 + i] += static_cast<double>(acc[i]);
          part[s.c + c0 + i] = std::min(part[s.c + c0 + i], static_cast<double>(lo[i]));
          part[2 * s.c + c0 + i] = std::max(part[2 * s.c + c0 + i], static_cast<double>(hi[i]));
        }
      }
    }
  }
  for (int64_t c = 0; c < s.c; ++c) {
    sum[c] = parts.data[c];
    low[c] = parts.data[s.c + c];
    high[c] = parts.data[2 * s.c + c];
    for (int t = 1; t < threads; ++t) {
      const double* part = parts.data + 3 * s.c * t;
      sum[c] += part[c];
      low[c] = std::min(low[c], part[s.c + c]);
      high[c] = std::max(high[c], part[2 * s.c + c]);
    }
  }
}

}  // namespace

void pearson_moments(const void* x, int x_dtype, bool wide, bool last, int64_t n, int64_t c,
                     int64_t h, int64_t w, int64_t stride_n, int64_t stride_c, int64_t stride_h,
                     int64_t stride_w, const double* wh, const double* ww, int threads, double* sum,
                     double* low, double* high) {
  const Shape shape{n, c, h, w, stride_n, stride_c, stride_h, stride_w};
  with_source(x_dtype, [&](auto type) {
    using Src = std::remove_cvref_t<decltype(*type)>;
    const auto* source = static_cast<const Src*>(x);
    const auto run = [&](auto compute) {
      using C = decltype(compute);
      if (last) {
        moments_of_tokens<Src, C>(source, shape, wh, ww, threads, sum, low, high);
      } else {
        moments_of_maps<Src, C>(source, shape, wh, ww, threads, sum, low, high);
      }
    };
    if (wide) {
      run(double{});
    } else if constexpr (!std::is_same_v<Src, double>) {
      run(float{});
    }
  });
}

}  // namespace foveate::FOVEATE_ISA
