#include <cmath>

#include "analog_bits.h"
#include "analog_bits_tiles.h"
#include "memory.h"

namespace foveate::FOVEATE_ISA {
namespace {

template <typename T>
void noise(const Shape& shape, NoiseKey key, int threads, T* out) {
  const int64_t tiles = shape.tiles();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t index = 0; index < tiles; ++index) {
    const Tile tile = tile_at(shape, index);
    if constexpr (std::is_same_v<T, float>) {
      tile_noise(tile, shape.channels, key, tile.channel_stride, tile.pixel_stride,
                 out + tile.start);
    } else {
      alignas(64) float z[kTileValues];
      const bool last = shape.last();
      const int64_t channel_stride = last ? 1 : tile.n;
      const int64_t pixel_stride = last ? shape.channels : 1;
      tile_noise(tile, shape.channels, key, channel_stride, pixel_stride, z);
      const int64_t rows = last ? 1 : shape.channels;
      const int64_t length = last ? tile.n * shape.channels : tile.n;
      for (int64_t r = 0; r < rows; ++r) {
        T* to = out + tile.start + r * tile.channel_stride;
        const float* from = z + r * length;
        for (int64_t i = 0; i < length; ++i) to[i] = from_float<T>(from[i]);
      }
    }
  }
}

// The type of the arithmetic: float64 for float64 results, else float32 rounded once at the end.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
T rounded(Compute<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

template <typename T>
uint64_t q_sample(const Ids& ids, const Shape& shape, double high, double low, const double* gamma,
                  int64_t pixels_per_sample, const Compute<T>* noise_in, NoiseKey key, int threads,
                  T* out, Compute<T>* noise_out) {
  using C = Compute<T>;
  const int64_t tiles = shape.tiles();
  uint64_t excess = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(| : excess)
  for (int64_t index = 0; index < tiles; ++index) {
    const Tile tile = tile_at(shape, index);
    alignas(64) uint32_t words[kWords];
    alignas(64) float z[kTileValues];
    alignas(64) C set[kTilePixels];
    alignas(64) C clear[kTilePixels];
    alignas(64) C spread[kTilePixels];
    excess |= tile_words(ids, shape, tile, words);
    for (int64_t p = 0; p < tile.n; ++p) {
      const double g = gamma[(tile.pixel + p) / pixels_per_sample];
      const double root = std::sqrt(g);
      set[p] = static_cast<C>(root * high);
      clear[p] = static_cast<C>(root * low);
      spread[p] = static_cast<C>(std::sqrt(1.0 - g));
    }
    const bool last = shape.last();
    // Lines run along the fast axis: pixels of channels-last tensors, channels of the others.
    const int64_t lines = last ? tile.n : shape.channels;
    const int64_t length = last ? shape.channels : tile.n;
    const int64_t line_stride = last ? tile.pixel_stride : tile.channel_stride;
    if (noise_in == nullptr) {
      tile_noise(tile, shape.channels, key, last ? 1 : length, last ? length : 1, z);
    }
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t at = tile.start + line * line_stride;
      T* to = out + at;
      // The generated noise is float32; a given one has the type of the arithmetic.
      const auto combine = [&](auto* e) {
        if (last) {
          for (int64_t begin = 0; begin < length; begin += 32) {
            const uint32_t word = words[begin / 32 * tile.word_stride + line];
            const int64_t n = std::min<int64_t>(32, length - begin);
            const C a = set[line];
            const C b = clear[line];
            const C c = spread[line];
#pragma omp simd
            for (int64_t j = 0; j < n; ++j) {
              const C s = (word >> j) & 1U ? a : b;
              to[begin + j] = rounded<T>(std::fma(c, static_cast<C>(e[begin + j]), s));
            }
          }
        } else {
          const uint32_t* word = words + line / 32 * tile.word_stride;
          const int shift = static_cast<int>(line % 32);
#pragma omp simd
          for (int64_t p = 0; p < length; ++p) {
            const C s = (word[p] >> shift) & 1U ? set[p] : clear[p];
            to[p] = rounded<T>(std::fma(spread[p], static_cast<C>(e[p]), s));
          }
        }
        if (noise_out != nullptr) {
          for (int64_t j = 0; j < length; ++j) noise_out[at + j] = static_cast<C>(e[j]);
        }
      };
      if (noise_in == nullptr) {
        combine(static_cast<const float*>(z + line * length));
      } else {
        combine(noise_in + at);
      }
    }
  }
  return excess;
}

}  // namespace

void bits_noise(int64_t outer, int64_t channels, int64_t inner, uint64_t seed, uint32_t offset,
                int out_dtype, int threads, void* out) {
  const Shape shape{outer, channels, inner};
  if (outer * channels * inner == 0) return;
  const auto run = [&]<typename T>(T* to) {
    advise_huge_pages(to, size_t(outer * channels * inner) * sizeof(T));
    noise(shape, NoiseKey{seed, offset}, threads, to);
  };
  switch (static_cast<DType>(out_dtype)) {
    case DType::f64:
      return run(static_cast<double*>(out));
    case DType::bf16:
      return run(static_cast<bf16*>(out));
    case DType::f16:
      return run(static_cast<f16*>(out));
    default:
      return run(static_cast<float*>(out));
  }
}

uint64_t bits_q_sample(const void* x, int x_dtype, int64_t x_outer_stride, int64_t x_map_stride,
                       int64_t x_inner_stride, const int32_t* n_bits, int64_t maps, int64_t outer,
                       int64_t inner, bool msb, double high, double low, const double* gamma,
                       int64_t pixels_per_sample, const void* noise_in, uint64_t seed,
                       uint32_t offset, int out_dtype, int threads, void* out, void* noise_out) {
  const Shape shape{outer, channels_of(n_bits, maps), inner};
  if (outer * inner * shape.channels == 0) return 0;
  const Ids ids{x, x_dtype, x_outer_stride, x_map_stride, x_inner_stride, n_bits, maps, msb};
  const auto run = [&]<typename T>(T* to) {
    const size_t values = size_t(outer * shape.channels * inner);
    advise_huge_pages(to, values * sizeof(T));
    if (noise_out != nullptr) advise_huge_pages(noise_out, values * sizeof(Compute<T>));
    return q_sample<T>(ids, shape, high, low, gamma, pixels_per_sample,
                       static_cast<const Compute<T>*>(noise_in), NoiseKey{seed, offset}, threads,
                       to, static_cast<Compute<T>*>(noise_out));
  };
  switch (static_cast<DType>(out_dtype)) {
    case DType::f64:
      return run(static_cast<double*>(out));
    case DType::bf16:
      return run(static_cast<bf16*>(out));
    case DType::f16:
      return run(static_cast<f16*>(out));
    default:
      return run(static_cast<float*>(out));
  }
}

}  // namespace foveate::FOVEATE_ISA
