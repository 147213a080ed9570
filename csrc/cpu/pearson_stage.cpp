#include <algorithm>
#include <cmath>
#include <type_traits>

#include "pearson.h"
#include "pearson_source.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr int64_t kLanes = 64;   // channels of a block, channels last
constexpr int64_t kRows = 64;    // positions summed in compute precision before double
constexpr int64_t kChunk = 512;  // consecutive elements summed in compute precision

template <typename C>
struct Target {
  int64_t out_h, width_h;
  const int32_t* first_h;
  const C* weight_h;
  int64_t out_w, width_w;
  const int32_t* first_w;
  const C* weight_w;
  C* dst;
  int64_t ld;
  explicit Target(const int64_t* t)
      : out_h(t[0]),
        width_h(t[1]),
        first_h(reinterpret_cast<const int32_t*>(t[2])),
        weight_h(reinterpret_cast<const C*>(t[3])),
        out_w(t[4]),
        width_w(t[5]),
        first_w(reinterpret_cast<const int32_t*>(t[6])),
        weight_w(reinterpret_cast<const C*>(t[7])),
        dst(reinterpret_cast<C*>(t[8])),
        ld(t[9]) {}
  bool identity() const { return first_h == nullptr && first_w == nullptr; }
};

struct Moment {
  int64_t target;
  const double *wh, *ww, *gh, *gw;
  double *sum, *square;
  explicit Moment(const int64_t* m)
      : target(m[0]),
        wh(reinterpret_cast<const double*>(m[1])),
        ww(reinterpret_cast<const double*>(m[2])),
        gh(reinterpret_cast<const double*>(m[3])),
        gw(reinterpret_cast<const double*>(m[4])),
        sum(reinterpret_cast<double*>(m[5])),
        square(reinterpret_cast<double*>(m[6])) {}
};

// out[o, i] = sum_k weight[o, k] in[first[o] + k, i]: a banded matrix along the outer axis of rows
// of `inner` elements.
template <typename C>
void band_rows(const C* in, int64_t inner, int64_t out_rows, int64_t width, const int32_t* first,
               const C* weight, C* out) {
  for (int64_t o = 0; o < out_rows; ++o) {
    C* target = out + o * inner;
    const C* source = in + first[o] * inner;
    const C* taps = weight + o * width;
#pragma omp simd
    for (int64_t i = 0; i < inner; ++i) target[i] = taps[0] * source[i];
    for (int64_t k = 1; k < width; ++k) {
      const C tap = taps[k];
      const C* row = source + k * inner;
#pragma omp simd
      for (int64_t i = 0; i < inner; ++i) target[i] = std::fma(tap, row[i], target[i]);
    }
  }
}

// out[r, o] = sum_k weight[o, k] in[r, first[o] + k].
template <typename C>
void band_columns(const C* in, int64_t rows, int64_t in_w, int64_t out_w, int64_t width,
                  const int32_t* first, const C* weight, C* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const C* source = in + r * in_w;
    for (int64_t o = 0; o < out_w; ++o) {
      const C* taps = weight + o * width;
      const C* from = source + first[o];
      C total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < width; ++k) total += taps[k] * from[k];
      out[r * out_w + o] = total;
    }
  }
}

// S and Q of one map z [h, w]: z^T (wh x ww) and z^T (Gh x Gw) z with tridiagonal G.
template <typename C>
void map_moments(const Moment& m, const C* z, int64_t h, int64_t w, C* line, double* sum,
                 double* square) {
  double s = 0;
  double q = 0;
  const bool plain = m.wh == nullptr && m.ww == nullptr && m.gh == nullptr && m.gw == nullptr;
  const int64_t rows = plain ? 1 : h;
  const int64_t length = plain ? h * w : w;
  for (int64_t y = 0; y < rows; ++y) {
    const C* row = z + y * length;
    const C* pair = row;  // G_w z, or z
    if (m.gw != nullptr) {
      for (int64_t i = 0; i < length; ++i) {
        C value = static_cast<C>(m.gw[2 * i]) * row[i];
        if (i > 0) value += static_cast<C>(m.gw[2 * i - 1]) * row[i - 1];
        if (i + 1 < length) value += static_cast<C>(m.gw[2 * i + 1]) * row[i + 1];
        line[i] = value;
      }
      pair = line;
    }
    double row_sum = 0;
    double own = 0;
    double next = 0;
    const bool coupled = m.gh != nullptr && y + 1 < rows;
    for (int64_t begin = 0; begin < length; begin += kChunk) {
      const int64_t end = std::min(begin + kChunk, length);
      C part = 0;
      C part_own = 0;
      C part_next = 0;
      if (m.ww == nullptr) {
#pragma omp simd reduction(+ : part, part_own)
        for (int64_t i = begin; i < end; ++i) {
          part += row[i];
          part_own += row[i] * pair[i];
        }
      } else {
#pragma omp simd reduction(+ : part, part_own)
        for (int64_t i = begin; i < end; ++i) {
          part += static_cast<C>(m.ww[i]) * row[i];
          part_own += row[i] * pair[i];
        }
      }
      if (coupled) {
        const C* below = row + length;
#pragma omp simd reduction(+ : part_next)
        for (int64_t i = begin; i < end; ++i) part_next += below[i] * pair[i];
      }
      row_sum += static_cast<double>(part);
      own += static_cast<double>(part_own);
      next += static_cast<double>(part_next);
    }
    s += (m.wh != nullptr ? m.wh[y] : 1.0) * row_sum;
    q += m.gh != nullptr ? m.gh[2 * y] * own + 2 * (coupled ? m.gh[2 * y + 1] : 0.0) * next : own;
  }
  *sum = s;
  *square = q;
}

// One thread owns a unit; a map is read once into L1 or L2 and feeds every target and moment.
template <typename Src, typename C>
void stage_maps(const Src* x, const Shape& s, const double* pivot, const double* scale,
                const double* weight, const int64_t* targets, int64_t n_targets,
                const int64_t* moments, int64_t n_moments, int threads, double* largest) {
  int64_t most = s.h * s.w;
  int64_t total = 0;
  for (int64_t t = 0; t < n_targets; ++t) {
    const Target<C> target(targets + 10 * t);
    most = std::max({most, target.out_h * s.w});
    total += target.out_h * target.out_w;
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Scratch<C> map(s.h * s.w);
    const Scratch<C> middle(most);
    const Scratch<C> results(total);
    const Scratch<C> line(s.w + 16);
#pragma omp for schedule(static)
    for (int64_t c = 0; c < s.c; ++c) {
      const C centre = static_cast<C>(pivot[c]);
      const C s1 = static_cast<C>(scale[c]);
      const C s2 = static_cast<C>(scale[s.c + c]);
      for (int64_t m = 0; m < n_moments; ++m) {
        const Moment moment(moments + 7 * m);
        moment.sum[c] = 0;
        moment.square[c] = 0;
      }
      C peak = 0;
      for (int64_t n = 0; n < s.n; ++n) {
        for (int64_t y = 0; y < s.h; ++y) {
          const Src* row = x + n * s.stride_n + c * s.stride_c + y * s.stride_h;
          C* d = map.data + y * s.w;
          C top = peak;
#pragma omp simd reduction(max : top)
          for (int64_t i = 0; i < s.w; ++i) {
            const C value = (convert<C>(row[i]) - centre) * s1 * s2;
            d[i] = value;
            const C size = std::fabs(value);
            top = size > top ? size : top;
          }
          peak = top;
        }
        const double v = weight == nullptr ? 1.0 : weight[n];
        const C root = static_cast<C>(std::sqrt(v));
        C* result = results.data;
        for (int64_t t = 0; t < n_targets; ++t) {
          const Target<C> target(targets + 10 * t);
          const C* from = map.data;
          const int64_t size = target.out_h * target.out_w;
          if (target.first_h != nullptr) {
            C* to = target.first_w != nullptr ? middle.data : result;
            band_rows(from, s.w, target.out_h, target.width_h, target.first_h, target.weight_h, to);
            from = to;
          }
          if (target.first_w != nullptr) {
            band_columns(from, target.out_h, s.w, target.out_w, target.width_w, target.first_w,
                         target.weight_w, result);
            from = result;
          }
          if (target.dst != nullptr) {
            C* dst = target.dst + c * target.ld + n * size;
#pragma omp simd
            for (int64_t i = 0; i < size; ++i) dst[i] = from[i] * root;
          }
          result += size;
        }
        for (int64_t m = 0; m < n_moments; ++m) {
          const Moment moment(moments + 7 * m);
          const C* z = map.data;
          int64_t h = s.h;
          int64_t w = s.w;
          if (moment.target >= 0) {
            z = results.data;
            for (int64_t t = 0; t < moment.target; ++t) {
              const Target<C> target(targets + 10 * t);
              z += target.out_h * target.out_w;
            }
            const Target<C> target(targets + 10 * moment.target);
            h = target.out_h;
            w = target.out_w;
          }
          double sum;
          double square;
          map_moments(moment, z, h, w, line.data, &sum, &square);
          moment.sum[c] += v * sum;
          moment.square[c] += v * square;
        }
      }
      largest[c] = static_cast<double>(peak);
    }
  }
}

// S and Q of `lanes` channels of z [h, w, kLanes], added to sum and square.
template <typename C>
void token_moments(const Moment& m, const C* z, int64_t h, int64_t w, int64_t lanes, double v,
                   double* sum, double* square) {
  for (int64_t y = 0; y < h; ++y) {
    for (int64_t x0 = 0; x0 < w; x0 += kRows) {
      alignas(64) C s[kLanes] = {};
      alignas(64) C q[kLanes] = {};
      for (int64_t i = x0; i < std::min(x0 + kRows, w); ++i) {
        const C* at = z + (y * w + i) * kLanes;
        const C ws =
            static_cast<C>((m.wh != nullptr ? m.wh[y] : 1.0) * (m.ww != nullptr ? m.ww[i] : 1.0));
        const double gh0 = m.gh != nullptr ? m.gh[2 * y] : 1.0;
        const double gw0 = m.gw != nullptr ? m.gw[2 * i] : 1.0;
        const double gh1 = m.gh != nullptr && y + 1 < h ? m.gh[2 * y + 1] : 0.0;
        const double gw1 = m.gw != nullptr && i + 1 < w ? m.gw[2 * i + 1] : 0.0;
        const double gw_1 = m.gw != nullptr && i > 0 ? m.gw[2 * i - 1] : 0.0;
        const C own = static_cast<C>(gh0 * gw0);
#pragma omp simd
        for (int64_t l = 0; l < kLanes; ++l) {
          s[l] += ws * at[l];
          q[l] += own * at[l] * at[l];
        }
        const auto couple = [&](double factor, const C* other) {
          if (factor == 0.0) return;
          const C twice = static_cast<C>(2 * factor);
#pragma omp simd
          for (int64_t l = 0; l < kLanes; ++l) q[l] += twice * at[l] * other[l];
        };
        if (gw1 != 0.0) couple(gh0 * gw1, at + kLanes);
        if (gh1 != 0.0) {
          const C* below = at + w * kLanes;
          couple(gh1 * gw0, below);
          if (gw1 != 0.0) couple(gh1 * gw1, below + kLanes);
          if (gw_1 != 0.0) couple(gh1 * gw_1, below - kLanes);
        }
      }
      for (int64_t l = 0; l < lanes; ++l) {
        sum[l] += v * static_cast<double>(s[l]);
        square[l] += v * static_cast<double>(q[l]);
      }
    }
  }
}

// Positions of one channel block, straight to dst: every target the identity, every moment plain.
template <typename Src, typename C>
void stage_rows(const Src* x, const Shape& s, int64_t first, int64_t last, int64_t c0,
                int64_t width, const double* pivot, const double* scale, const double* weight,
                const int64_t* targets, int64_t n_targets, double* sum, double* square,
                double* peak) {
  alignas(64) C centre[kLanes] = {};
  alignas(64) C s1[kLanes] = {};
  alignas(64) C s2[kLanes] = {};
  alignas(64) C top[kLanes] = {};
  for (int64_t l = 0; l < width; ++l) {
    centre[l] = static_cast<C>(pivot[c0 + l]);
    s1[l] = static_cast<C>(scale[c0 + l]);
    s2[l] = static_cast<C>(scale[s.c + c0 + l]);
  }
  const int64_t grid = s.h * s.w;
  for (int64_t k0 = first; k0 < last; k0 += kRows) {
    alignas(64) C sums[kLanes] = {};
    alignas(64) C squares[kLanes] = {};
    for (int64_t k = k0; k < std::min(k0 + kRows, last); ++k) {
      const int64_t image = grid == 1 ? k : k / grid;
      const int64_t position = k - image * grid;
      const Src* row = x + image * s.stride_n + c0;
      if (grid != 1) row += position / s.w * s.stride_h + position % s.w * s.stride_w;
      const C root = weight == nullptr ? C(1) : static_cast<C>(std::sqrt(weight[image]));
      alignas(64) C d[kLanes];
#pragma omp simd
      for (int64_t l = 0; l < width; ++l) {
        const C value = (convert<C>(row[l]) - centre[l]) * s1[l] * s2[l];
        d[l] = value * root;
        sums[l] += d[l] * root;
        squares[l] += d[l] * d[l];
        const C size = std::fabs(value);
        top[l] = size > top[l] ? size : top[l];
      }
      for (int64_t t = 0; t < n_targets; ++t) {
        const Target<C> target(targets + 10 * t);
        if (target.dst == nullptr) continue;
        C* dst = target.dst + k * target.ld + c0;
#pragma omp simd
        for (int64_t l = 0; l < width; ++l) dst[l] = d[l];
      }
    }
    for (int64_t l = 0; l < width; ++l) {
      sum[l] += static_cast<double>(sums[l]);
      square[l] += static_cast<double>(squares[l]);
    }
  }
  for (int64_t l = 0; l < width; ++l) peak[l] = std::max(peak[l], static_cast<double>(top[l]));
}

// A thread owns a range of images and private sums; a block of kLanes channels of one image is
// taken to scratch, the vector axis, and feeds every target and moment.
template <typename Src, typename C>
void stage_tokens(const Src* x, const Shape& s, const double* pivot, const double* scale,
                  const double* weight, const int64_t* targets, int64_t n_targets,
                  const int64_t* moments, int64_t n_moments, int threads, double* largest) {
  int64_t middle_size = 0;
  int64_t total = 0;
  bool plain = true;
  for (int64_t t = 0; t < n_targets; ++t) {
    const Target<C> target(targets + 10 * t);
    middle_size = std::max(middle_size, target.out_h * s.w);
    total += target.out_h * target.out_w;
    plain = plain && target.identity();
  }
  for (int64_t m = 0; m < n_moments; ++m) {
    const Moment moment(moments + 7 * m);
    plain = plain && moment.wh == nullptr && moment.ww == nullptr && moment.gh == nullptr &&
            moment.gw == nullptr;
  }
  const int64_t per_thread = (2 * n_moments + 1) * s.c;
  const Scratch<double> parts(per_thread * threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static, 1)
  for (int p = 0; p < threads; ++p) {
    double* part = parts.data + per_thread * p;
    std::fill(part, part + per_thread, 0.0);
    const int64_t begin = s.n * p / threads;
    const int64_t end = s.n * (p + 1) / threads;
    const Scratch<C> map(plain ? 0 : s.h * s.w * kLanes);
    const Scratch<C> middle(plain ? 0 : middle_size * kLanes);
    const Scratch<C> results(plain ? 0 : total * kLanes);
    double* peaks = part + 2 * n_moments * s.c;
    if (plain) {
      constexpr int64_t kBand = 256;  // positions of a band: its rows stay in L2 between blocks
      for (int64_t k = begin * s.h * s.w; k < end * s.h * s.w; k += kBand) {
        for (int64_t c0 = 0; c0 < s.c; c0 += kLanes) {
          stage_rows<Src, C>(x, s, k, std::min(k + kBand, end * s.h * s.w), c0,
                             std::min(kLanes, s.c - c0), pivot, scale, weight, targets, n_targets,
                             part + c0, part + n_moments * s.c + c0, peaks + c0);
        }
      }
      for (int64_t m = 1; m < n_moments; ++m) {
        std::copy(part, part + s.c, part + m * s.c);
        std::copy(part + n_moments * s.c, part + (n_moments + 1) * s.c,
                  part + (n_moments + m) * s.c);
      }
      continue;
    }
    for (int64_t n = begin; n < end; ++n) {
      const double v = weight == nullptr ? 1.0 : weight[n];
      const C root = static_cast<C>(std::sqrt(v));
      for (int64_t c0 = 0; c0 < s.c; c0 += kLanes) {
        const int64_t width = std::min(kLanes, s.c - c0);
        for (int64_t k = 0; k < s.h * s.w; ++k) {
          const Src* row = x + n * s.stride_n + k / s.w * s.stride_h + k % s.w * s.stride_w + c0;
          C* d = map.data + k * kLanes;
          for (int64_t l = 0; l < width; ++l) {
            d[l] = (convert<C>(row[l]) - static_cast<C>(pivot[c0 + l])) *
                   static_cast<C>(scale[c0 + l]) * static_cast<C>(scale[s.c + c0 + l]);
            peaks[c0 + l] = std::max(peaks[c0 + l], static_cast<double>(std::fabs(d[l])));
          }
          std::fill(d + width, d + kLanes, C(0));
        }
        C* result = results.data;
        for (int64_t t = 0; t < n_targets; ++t) {
          const Target<C> target(targets + 10 * t);
          const int64_t size = target.out_h * target.out_w;
          const C* from = map.data;
          if (target.first_h != nullptr) {
            C* to = target.first_w != nullptr ? middle.data : result;
            band_rows(from, s.w * kLanes, target.out_h, target.width_h, target.first_h,
                      target.weight_h, to);
            from = to;
          }
          if (target.first_w != nullptr) {
            for (int64_t y = 0; y < target.out_h; ++y) {
              band_rows(from + y * s.w * kLanes, kLanes, target.out_w, target.width_w,
                        target.first_w, target.weight_w, result + y * target.out_w * kLanes);
            }
            from = result;
          }
          for (int64_t k = 0; target.dst != nullptr && k < size; ++k) {
            C* dst = target.dst + (n * size + k) * target.ld + c0;
            for (int64_t l = 0; l < width; ++l) dst[l] = from[k * kLanes + l] * root;
          }
          result += size * kLanes;
        }
        for (int64_t m = 0; m < n_moments; ++m) {
          const Moment moment(moments + 7 * m);
          const C* z = map.data;
          int64_t h = s.h;
          int64_t w = s.w;
          if (moment.target >= 0) {
            z = results.data;
            for (int64_t t = 0; t < moment.target; ++t) {
              const Target<C> target(targets + 10 * t);
              z += target.out_h * target.out_w * kLanes;
            }
            const Target<C> target(targets + 10 * moment.target);
            h = target.out_h;
            w = target.out_w;
          }
          token_moments(moment, z, h, w, width, v, part + m * s.c + c0,
                        part + (n_moments + m) * s.c + c0);
        }
      }
    }
  }
  const auto merged = [&](int64_t index, double* out) {
    for (int64_t c = 0; c < s.c; ++c) {
      double value = 0;
      for (int p = 0; p < threads; ++p) value += parts.data[per_thread * p + index * s.c + c];
      out[c] = value;
    }
  };
  for (int64_t m = 0; m < n_moments; ++m) {
    const Moment moment(moments + 7 * m);
    merged(m, moment.sum);
    merged(n_moments + m, moment.square);
  }
  for (int64_t c = 0; c < s.c; ++c) {
    largest[c] = 0;
    for (int p = 0; p < threads; ++p) {
      largest[c] = std::max(largest[c], parts.data[per_thread * p + 2 * n_moments * s.c + c]);
    }
  }
}

}  // namespace

void pearson_stage(const void* x, int x_dtype, bool wide, bool last, int64_t n, int64_t c,
                   int64_t h, int64_t w, int64_t stride_n, int64_t stride_c, int64_t stride_h,
                   int64_t stride_w, const double* pivot, const double* scale, const double* weight,
                   const int64_t* targets, int64_t n_targets, const int64_t* moments,
                   int64_t n_moments, int threads, double* largest) {
  const Shape shape{n, c, h, w, stride_n, stride_c, stride_h, stride_w};
  with_source(x_dtype, [&](auto type) {
    using Src = std::remove_cvref_t<decltype(*type)>;
    const auto* source = static_cast<const Src*>(x);
    const auto run = [&](auto compute) {
      using C = decltype(compute);
      const auto stage = last ? stage_tokens<Src, C> : stage_maps<Src, C>;
      stage(source, shape, pivot, scale, weight, targets, n_targets, moments, n_moments, threads,
            largest);
    };
    if (wide) {
      run(double{});
    } else if constexpr (!std::is_same_v<Src, double>) {
      run(float{});
    }
  });
}

}  // namespace foveate::FOVEATE_ISA
