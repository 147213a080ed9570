// Code words: the ids of a block of pixels packed to 32-bit words [n_words, pixels], where bit c %
// 32 of word c / 32 is channel c. Maps, widths, strides, id dtypes, bit order and the range check
// end here; every kernel reads words alone. Internal linkage only: this header is compiled into
// every instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtypes.h"

namespace foveate::FOVEATE_ISA {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint64_t;

// A block of pixels is packed to 32-bit words [n_words, pixels] that stay in L1: bit c % 32 of word
// c / 32 is channel c.
constexpr int64_t kWords = 8192;
constexpr int64_t kPixels = 2048;

inline int64_t channels_of(const int32_t* n_bits, int64_t maps) {
  int64_t channels = 0;
  for (int64_t k = 0; k < maps; ++k) channels += n_bits[k];
  return channels;
}

inline int64_t block_pixels(int64_t n_words) {
  return std::clamp<int64_t>(kWords / n_words, 1, kPixels);
}

inline uint32_t reverse32(uint32_t v) {
  v = ((v >> 1) & 0x55555555U) | ((v & 0x55555555U) << 1);
  v = ((v >> 2) & 0x33333333U) | ((v & 0x33333333U) << 2);
  v = ((v >> 4) & 0x0f0f0f0fU) | ((v & 0x0f0f0f0fU) << 4);
  v = ((v >> 8) & 0x00ff00ffU) | ((v & 0x00ff00ffU) << 8);
  return (v >> 16) | (v << 16);
}

inline uint64_t reverse64(uint64_t v) {
  return (static_cast<uint64_t>(reverse32(static_cast<uint32_t>(v))) << 32) |
         reverse32(static_cast<uint32_t>(v >> 32));
}

// One map whose bits lie in one word. Stride is a compile-time constant where that vectorises.
template <typename Id, int64_t Stride>
uint64_t pack_narrow(const Id* x, int64_t stride, int64_t n, int n_bits, int shift, bool msb,
                     uint32_t* word) {
  if constexpr (Stride > 0) stride = Stride;
  const uint32_t keep = n_bits == 32 ? ~0U : (1U << n_bits) - 1U;
  const int drop = 32 - n_bits;
  // Ids are compared in their own width: bits above n_bits, which include the sign.
  using Wide = std::conditional_t<sizeof(Id) == 8, uint64_t, uint32_t>;
  Wide all = 0;
  if (msb) {
#pragma omp simd reduction(| : all)
    for (int64_t p = 0; p < n; ++p) {
      const Wide v = static_cast<Wide>(static_cast<int64_t>(x[p * stride]));
      all |= v;
      word[p] |= (reverse32(static_cast<uint32_t>(v) & keep) >> drop) << shift;
    }
  } else {
#pragma omp simd reduction(| : all)
    for (int64_t p = 0; p < n; ++p) {
      const Wide v = static_cast<Wide>(static_cast<int64_t>(x[p * stride]));
      all |= v;
      word[p] |= (static_cast<uint32_t>(v) & keep) << shift;
    }
  }
  return static_cast<uint64_t>(all) >> n_bits;
}

// One map whose bits straddle words.
template <typename Id>
uint64_t pack_wide(const Id* x, int64_t stride, int64_t n, int n_bits, int shift, bool msb,
                   int64_t pixels, uint32_t* words) {
  const int last = (shift + n_bits - 1) / 32;
  uint64_t all = 0;
  for (int64_t p = 0; p < n; ++p) {
    uint64_t v = static_cast<uint64_t>(static_cast<int64_t>(x[p * stride]));
    all |= v;
    v &= (uint64_t{1} << n_bits) - 1;
    if (msb) v = reverse64(v) >> (64 - n_bits);
    words[p] |= static_cast<uint32_t>(v << shift);
    if (last >= 1) words[pixels + p] |= static_cast<uint32_t>((v << shift) >> 32);
    if (last >= 2) words[2 * pixels + p] |= static_cast<uint32_t>(v >> (64 - shift));
  }
  return all >> n_bits;
}

// Packs n pixels; words is [n_words, pixels]. Returns the bits that did not fit.
template <typename Id>
uint64_t pack(const Id* x, int64_t pixel_stride, int64_t map_stride, const int32_t* n_bits,
              int64_t maps, bool msb, int64_t n, int64_t n_words, int64_t pixels, uint32_t* words) {
  for (int64_t w = 0; w < n_words; ++w) std::memset(words + w * pixels, 0, size_t(n) * 4);
  uint64_t excess = 0;
  int64_t offset = 0;
  for (int64_t k = 0; k < maps; ++k) {
    const Id* ids = x + k * map_stride;
    const int shift = static_cast<int>(offset % 32);
    uint32_t* word = words + offset / 32 * pixels;
    if (shift + n_bits[k] > 32 || n_bits[k] == 32) {  // 32: the sign of an int32 lies beyond
      excess |= pack_wide(ids, pixel_stride, n, n_bits[k], shift, msb, pixels, word);
    } else if (pixel_stride == 1) {
      excess |= pack_narrow<Id, 1>(ids, 1, n, n_bits[k], shift, msb, word);
    } else if (pixel_stride == 2) {
      excess |= pack_narrow<Id, 2>(ids, 2, n, n_bits[k], shift, msb, word);
    } else {
      excess |= pack_narrow<Id, 0>(ids, pixel_stride, n, n_bits[k], shift, msb, word);
    }
    offset += n_bits[k];
  }
  return excess;
}

// Calls f with a value-initialised object of the id type that the code names.
template <typename F>
void with_id_type(int dtype, F f) {
  switch (static_cast<DType>(dtype)) {
    case DType::boolean:
    case DType::u8:
      return f(std::uint8_t{});
    case DType::i8:
      return f(std::int8_t{});
    case DType::i16:
      return f(std::int16_t{});
    case DType::i32:
      return f(int32_t{});
    default:
      return f(int64_t{});
  }
}

// Ids [outer, maps, inner] as a kernel gets them.
struct Ids {
  const void* x;
  int dtype;
  int64_t outer_stride;
  int64_t map_stride;
  int64_t inner_stride;
  const int32_t* n_bits;  // [maps]
  int64_t maps;
  bool msb;

  // Packs the n pixels from (row, column) on; those of a row lie along inner, unless inner == 1:
  // then row counts them. Returns the bits that did not fit.
  uint64_t pack_words(int64_t row, int64_t column, bool along_outer, int64_t n, int64_t n_words,
                      int64_t pixels, uint32_t* words) const {
    uint64_t excess = 0;
    with_id_type(dtype, [&](auto id) {
      const auto* ids =
          static_cast<const decltype(id)*>(x) + row * outer_stride + column * inner_stride;
      excess = pack(ids, along_outer ? outer_stride : inner_stride, map_stride, n_bits, maps, msb,
                    n, n_words, pixels, words);
    });
    return excess;
  }
};

}  // namespace
}  // namespace foveate::FOVEATE_ISA
