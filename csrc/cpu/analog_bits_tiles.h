// Tiles of pixels that the noise, q_sample and loss kernels work through: small enough that ids,
// noise and coefficients of a tile stay in L1.
// Internal linkage only: this header is compiled into every instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "code_words.h"
#include "philox.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr int64_t kTilePixels = 256;
constexpr int64_t kTileValues = 16384;  // pixels times channels
static_assert(kTilePixels % kNoiseLanes == 0);

// A contiguous tensor [outer, channels, inner]; channels last is inner == 1. Pixel (o, i) has index
// o * inner + i. A tile is a run of pixels that are neighbours in memory.
struct Shape {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  bool last() const { return inner == 1; }
  int64_t n_words() const { return (channels + 31) / 32; }
  int64_t tile_pixels() const {
    return std::clamp<int64_t>(kTileValues / std::max<int64_t>(channels, 1), 1, kTilePixels);
  }
  int64_t rows() const { return last() ? 1 : outer; }
  int64_t row_pixels() const { return last() ? outer : inner; }
  int64_t tiles_per_row() const { return (row_pixels() + tile_pixels() - 1) / tile_pixels(); }
  int64_t tiles() const { return rows() * tiles_per_row(); }
};

struct Tile {
  int64_t pixel;   // index of the first pixel
  int64_t n;       // pixels
  int64_t row;     // of a channels-first tensor
  int64_t column;  // first pixel in the row
  int64_t start;   // of the first value in the tensor
  int64_t channel_stride;
  int64_t pixel_stride;
  int64_t word_stride;  // of code words [n_words, word_stride]
};

[[maybe_unused]] inline Tile tile_at(const Shape& shape, int64_t index) {
  const int64_t per_row = shape.tiles_per_row();
  Tile tile{};
  tile.row = index / per_row;
  tile.column = index % per_row * shape.tile_pixels();
  tile.n = std::min(shape.tile_pixels(), shape.row_pixels() - tile.column);
  tile.pixel = tile.row * shape.row_pixels() + tile.column;
  tile.word_stride = shape.tile_pixels();
  if (shape.last()) {
    tile.start = tile.column * shape.channels;
    tile.channel_stride = 1;
    tile.pixel_stride = shape.channels;
  } else {
    tile.start = tile.row * shape.channels * shape.inner + tile.column;
    tile.channel_stride = shape.inner;
    tile.pixel_stride = 1;
  }
  return tile;
}

[[maybe_unused]] inline uint64_t tile_words(const Ids& ids, const Shape& shape, const Tile& tile,
                                            uint32_t* words) {
  const bool last = shape.last();
  return ids.pack_words(last ? tile.column : tile.row, last ? 0 : tile.column, last, tile.n,
                        shape.n_words(), tile.word_stride, words);
}

// The noise of a tile: out[c * channel_stride + p * pixel_stride], one stride being 1.
[[maybe_unused]] inline void tile_noise(const Tile& tile, int64_t channels, NoiseKey key,
                                        int64_t channel_stride, int64_t pixel_stride, float* out) {
  alignas(64) float z[4][kNoiseLanes];
  for (int64_t begin = 0; begin < tile.n; begin += kNoiseLanes) {
    const int64_t n = std::min<int64_t>(kNoiseLanes, tile.n - begin);
    for (int64_t c = 0; c < channels; c += 4) {
      normals(static_cast<uint64_t>(tile.pixel + begin), static_cast<uint32_t>(c / 4), key, z);
      const int64_t m = std::min<int64_t>(4, channels - c);
      float* to = out + c * channel_stride + begin * pixel_stride;
      if (channel_stride == 1) {
        int64_t p = 0;
        if (m == 4) {
          for (; p + 4 <= n; p += 4) {
            simd::transpose4(&z[0][p], kNoiseLanes, to + p * pixel_stride, pixel_stride);
          }
        }
        for (; p < n; ++p) {
          for (int64_t j = 0; j < m; ++j) to[p * pixel_stride + j] = z[j][p];
        }
      } else {
        for (int64_t j = 0; j < m; ++j) {
          std::memcpy(to + j * channel_stride, z[j], size_t(n) * sizeof(float));
        }
      }
    }
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
