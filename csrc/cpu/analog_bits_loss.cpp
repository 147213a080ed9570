#include <cmath>

#include "analog_bits.h"
#include "analog_bits_tiles.h"
#include "elementary.h"
#include "memory.h"

namespace foveate::FOVEATE_ISA {
namespace {

// Python's counterpart: foveate/ops/analog_bits/layout.py, LOSS_KINDS.
// `smoothed` is the sigmoid with eps > 0: its logarithm would keep the other from vectorising.
enum class Kind : int { x = 0, eps = 1, v = 2, sigmoid = 3, smoothed = 4 };

template <typename C>
struct Term {
  C loss;
  C slope;  // d loss / d prediction
};

// What a pixel's sample contributes: the signal of a set and a clear bit, and the noise factor. For
// "v" these are sqrt(1 - g) s and sqrt(g).
template <typename C>
struct Pixel {
  C set;
  C clear;
  C root;
};

template <Kind kind, typename C>
[[gnu::always_inline]] inline Term<C> term(C f, bool bit, Pixel<C> pixel, C e, C eps) {
  if constexpr (kind == Kind::sigmoid || kind == Kind::smoothed) {
    // z = f if bit else -f. -log(sigmoid(z) + eps); for eps = 0 softplus(-z) from e^-|z|.
    const C z = bit ? f : -f;
    const C decay = fast_exp(z < 0 ? z : -z);
    const C small = decay / (1 + decay);  // sigmoid(-|z|)
    const C q = z < 0 ? small : 1 - small;
    const C other = z < 0 ? 1 - small : small;  // sigmoid(-z)
    C loss = (z < 0 ? -z : C(0)) + log1p_unit(decay);
    C slope = -other;
    if constexpr (kind == Kind::smoothed) {
      loss = -std::log(q + eps);
      slope = -q * other / (q + eps);
    }
    return {loss, bit ? slope : -slope};
  } else {
    const C s = bit ? pixel.set : pixel.clear;
    C target = s;
    if constexpr (kind == Kind::eps) target = e;
    if constexpr (kind == Kind::v) target = std::fma(pixel.root, e, -s);
    const C d = f - target;
    return {d * d, 2 * d};
  }
}

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
Compute<T> load(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}

template <typename T>
T rounded(Compute<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <typename T>
struct Problem {
  using C = Compute<T>;
  Ids ids;
  Shape shape;
  const T* pred;
  double high;
  double low;
  const double* gamma;  // [samples] or null
  int64_t pixels_per_sample;
  const C* noise;  // or null: the stream of key
  NoiseKey key;
  const C* weight;  // or null
  int64_t pixels_per_weight;
  C eps;
  const C* upstream;  // or null
  bool upstream_per_pixel;
  double slope_scale;
  int threads;
  double* partial;  // [tiles]
  C* pixel_loss;    // [P] or null: weighted, summed over the channels
  T* slope;         // or null
};

// What a tile's pixels contribute, one array each.
template <typename C>
struct Coefficients {
  alignas(64) C set[kTilePixels];
  alignas(64) C clear[kTilePixels];
  alignas(64) C root[kTilePixels];
  alignas(64) C weight[kTilePixels];
  alignas(64) C factor[kTilePixels];  // of the slope
};

// At most 32 channels of one pixel, whose bits are `word`. sum[j] += w loss.
template <Kind kind, bool sloped, typename T, typename E>
void line_of_pixel(const T* pred, int64_t n, uint32_t word, Pixel<Compute<T>> pixel, const E* noise,
                   Compute<T> eps, Compute<T> weight, Compute<T> factor, T* slope,
                   Compute<T>* sum) {
  using C = Compute<T>;
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const C e = kind == Kind::eps || kind == Kind::v ? static_cast<C>(noise[j]) : C(0);
    const bool bit = ((word >> j) & 1U) != 0;
    const Term<C> t = term<kind, C>(load(pred[j]), bit, pixel, e, eps);
    sum[j] += weight * t.loss;
    if constexpr (sloped) slope[j] = rounded<T>(factor * t.slope);
  }
}

// One channel of n pixels; its bit is bit `shift` of each pixel's word. sum[p] += loss.
template <Kind kind, bool sloped, typename T, typename E>
void line_of_channel(const T* pred, int64_t n, const uint32_t* words, int shift,
                     const Coefficients<Compute<T>>& at, const E* noise, Compute<T> eps, T* slope,
                     Compute<T>* sum) {
  using C = Compute<T>;
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) {
    const C e = kind == Kind::eps || kind == Kind::v ? static_cast<C>(noise[p]) : C(0);
    const bool bit = ((words[p] >> shift) & 1U) != 0;
    const Pixel<C> pixel{at.set[p], at.clear[p], at.root[p]};
    const Term<C> t = term<kind, C>(load(pred[p]), bit, pixel, e, eps);
    sum[p] += t.loss;
    if constexpr (sloped) slope[p] = rounded<T>(at.factor[p] * t.slope);
  }
}

template <Kind kind, typename T>
void tile_coefficients(const Problem<T>& problem, const Tile& tile, Coefficients<Compute<T>>& at) {
  using C = Compute<T>;
  for (int64_t p = 0; p < tile.n; ++p) {
    const int64_t index = tile.pixel + p;
    double signal = 1.0;
    double root = 0.0;
    if constexpr (kind == Kind::v) {
      const double g = problem.gamma[index / problem.pixels_per_sample];
      signal = std::sqrt(1.0 - g);
      root = std::sqrt(g);
    }
    at.set[p] = static_cast<C>(signal * problem.high);
    at.clear[p] = static_cast<C>(signal * problem.low);
    at.root[p] = static_cast<C>(root);
    at.weight[p] = C(1);
    if (problem.weight != nullptr) at.weight[p] = problem.weight[index / problem.pixels_per_weight];
    C upstream = 1;
    if (problem.upstream != nullptr) {
      upstream = problem.upstream[problem.upstream_per_pixel ? index : 0];
    }
    at.factor[p] = static_cast<C>(problem.slope_scale) * upstream * at.weight[p];
  }
}

// Channels last: the lines are pixels. `noise` is that of the tile, [n, channels].
template <Kind kind, bool sloped, typename T, typename E>
double tile_by_pixels(const Problem<T>& problem, const Tile& tile, const uint32_t* words,
                      const Coefficients<Compute<T>>& at, const E* noise) {
  using C = Compute<T>;
  const int64_t channels = problem.shape.channels;
  const int64_t lanes = std::min<int64_t>(32, channels);
  const bool by_pixel = problem.pixel_loss != nullptr;
  alignas(64) C sum[32] = {};
  double total = 0.0;
  for (int64_t p = 0; p < tile.n; ++p) {
    const int64_t line = tile.start + p * channels;
    for (int64_t c = 0; c < channels; c += 32) {
      line_of_pixel<kind, sloped>(problem.pred + line + c, std::min<int64_t>(32, channels - c),
                                  words[c / 32 * tile.word_stride + p],
                                  Pixel<C>{at.set[p], at.clear[p], at.root[p]},
                                  noise == nullptr ? nullptr : noise + p * channels + c,
                                  problem.eps, by_pixel ? C(1) : at.weight[p], at.factor[p],
                                  sloped ? problem.slope + line + c : nullptr, sum);
    }
    if (by_pixel) {
      C loss = 0;
      for (int64_t j = 0; j < lanes; ++j) {
        loss += sum[j];
        sum[j] = 0;
      }
      problem.pixel_loss[tile.pixel + p] = at.weight[p] * loss;
      total += static_cast<double>(at.weight[p] * loss);
    }
  }
  for (int64_t j = 0; j < lanes; ++j) total += static_cast<double>(sum[j]);
  return total;
}

// Channels first: the lines are channels. `noise` is that of the tile, lines noise_stride apart.
template <Kind kind, bool sloped, typename T, typename E>
double tile_by_channels(const Problem<T>& problem, const Tile& tile, const uint32_t* words,
                        const Coefficients<Compute<T>>& at, const E* noise, int64_t noise_stride) {
  using C = Compute<T>;
  alignas(64) C sum[kTilePixels] = {};
  for (int64_t c = 0; c < problem.shape.channels; ++c) {
    const int64_t line = tile.start + c * tile.channel_stride;
    line_of_channel<kind, sloped>(problem.pred + line, tile.n, words + c / 32 * tile.word_stride,
                                  static_cast<int>(c % 32), at,
                                  noise == nullptr ? nullptr : noise + c * noise_stride,
                                  problem.eps, sloped ? problem.slope + line : nullptr, sum);
  }
  double total = 0.0;
  for (int64_t p = 0; p < tile.n; ++p) {
    const C loss = at.weight[p] * sum[p];
    if (problem.pixel_loss != nullptr) problem.pixel_loss[tile.pixel + p] = loss;
    total += static_cast<double>(loss);
  }
  return total;
}

template <Kind kind, bool sloped, typename T>
uint64_t run(const Problem<T>& problem) {
  using C = Compute<T>;
  constexpr bool kNoisy = kind == Kind::eps || kind == Kind::v;
  const Shape& shape = problem.shape;
  const bool last = shape.last();
  const int64_t tiles = shape.tiles();
  uint64_t excess = 0;
#pragma omp parallel for schedule(static) num_threads(problem.threads) if (problem.threads > 1) \
    reduction(| : excess)
  for (int64_t index = 0; index < tiles; ++index) {
    const Tile tile = tile_at(shape, index);
    alignas(64) uint32_t words[kWords];
    alignas(64) float z[kNoisy ? kTileValues : 1];
    Coefficients<C> at;
    excess |= tile_words(problem.ids, shape, tile, words);
    tile_coefficients<kind>(problem, tile, at);
    // The generated noise is float32, a given one has the type of the arithmetic.
    const auto visit = [&](const auto* noise, int64_t noise_stride) {
      if (last) return tile_by_pixels<kind, sloped>(problem, tile, words, at, noise);
      return tile_by_channels<kind, sloped>(problem, tile, words, at, noise, noise_stride);
    };
    if (kNoisy && problem.noise != nullptr) {
      problem.partial[index] = visit(problem.noise + tile.start, tile.channel_stride);
    } else if (kNoisy) {
      tile_noise(tile, shape.channels, problem.key, last ? 1 : tile.n, last ? shape.channels : 1,
                 z);
      problem.partial[index] = visit(static_cast<const float*>(z), tile.n);
    } else {
      problem.partial[index] = visit(static_cast<const float*>(nullptr), 0);
    }
  }
  return excess;
}

}  // namespace

int64_t bits_loss_tiles(int64_t outer, int64_t channels, int64_t inner) {
  return Shape{outer, channels, inner}.tiles();
}

uint64_t bits_loss(const void* pred, int dtype, const void* x, int x_dtype, int64_t x_outer_stride,
                   int64_t x_map_stride, int64_t x_inner_stride, const int32_t* n_bits,
                   int64_t maps, int64_t outer, int64_t inner, bool msb, int kind, double high,
                   double low, const double* gamma, int64_t pixels_per_sample, const void* noise,
                   uint64_t seed, uint32_t offset, const void* weight, int64_t pixels_per_weight,
                   double eps, const void* upstream, bool upstream_per_pixel, double slope_scale,
                   int threads, double* partial, double* total, void* pixel_loss, void* slope) {
  const Shape shape{outer, channels_of(n_bits, maps), inner};
  *total = 0.0;
  if (outer * inner * shape.channels == 0) return 0;
  const auto run_as = [&]<typename T>(T*) {
    using C = Compute<T>;
    Problem<T> problem{
        {x, x_dtype, x_outer_stride, x_map_stride, x_inner_stride, n_bits, maps, msb},
        shape,
        static_cast<const T*>(pred),
        high,
        low,
        gamma,
        pixels_per_sample,
        static_cast<const C*>(noise),
        {seed, offset},
        static_cast<const C*>(weight),
        pixels_per_weight,
        static_cast<C>(eps),
        static_cast<const C*>(upstream),
        upstream_per_pixel,
        slope_scale,
        threads,
        partial,
        static_cast<C*>(pixel_loss),
        static_cast<T*>(slope)};
    if (slope != nullptr) {
      advise_huge_pages(slope, size_t(outer * inner * shape.channels) * sizeof(T));
    }
    switch (eps > 0 && kind == static_cast<int>(Kind::sigmoid) ? Kind::smoothed
                                                               : static_cast<Kind>(kind)) {
      case Kind::eps:
        return slope == nullptr ? run<Kind::eps, false>(problem) : run<Kind::eps, true>(problem);
      case Kind::v:
        return slope == nullptr ? run<Kind::v, false>(problem) : run<Kind::v, true>(problem);
      case Kind::smoothed:
        return slope == nullptr ? run<Kind::smoothed, false>(problem)
                                : run<Kind::smoothed, true>(problem);
      case Kind::sigmoid:
        return slope == nullptr ? run<Kind::sigmoid, false>(problem)
                                : run<Kind::sigmoid, true>(problem);
      default:
        return slope == nullptr ? run<Kind::x, false>(problem) : run<Kind::x, true>(problem);
    }
  };
  uint64_t excess = 0;
  switch (static_cast<DType>(dtype)) {
    case DType::f64:
      excess = run_as(static_cast<double*>(nullptr));
      break;
    case DType::bf16:
      excess = run_as(static_cast<bf16*>(nullptr));
      break;
    case DType::f16:
      excess = run_as(static_cast<f16*>(nullptr));
      break;
    default:
      excess = run_as(static_cast<float*>(nullptr));
  }
  for (int64_t i = 0; i < shape.tiles(); ++i) *total += partial[i];
  return excess;
}

}  // namespace foveate::FOVEATE_ISA
