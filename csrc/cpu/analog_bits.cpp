#include "analog_bits.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "code_words.h"
#include "dtypes.h"
#include "memory.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

// Rows of eight outputs for each byte of bits: one load and one store write eight channels.
template <typename Bits>
struct ByteTable {
  alignas(64) Bits rows[256][8];
  ByteTable(Bits high, Bits low) {
    for (int byte = 0; byte < 256; ++byte) {
      for (int j = 0; j < 8; ++j) rows[byte][j] = (byte >> j) & 1 ? high : low;
    }
  }
};

template <typename Bits>
void expand_channels_last(const uint32_t* words, int64_t pixels, int64_t n, int64_t channels,
                          int64_t stride, bool streaming, const ByteTable<Bits>& table, Bits* out) {
  const int64_t groups = channels / 8;
  const int64_t tail = channels % 8;
  for (int64_t p = 0; p < n; ++p, out += stride) {
    for (int64_t g = 0; g < groups; ++g) {
      const uint32_t byte = (words[g / 4 * pixels + p] >> (g % 4 * 8)) & 0xffU;
      if (streaming) {
        simd::stream_row(out + g * 8, table.rows[byte]);
      } else {
        std::memcpy(out + g * 8, table.rows[byte], sizeof(table.rows[byte]));
      }
    }
    if (tail != 0) {
      const uint32_t byte = (words[groups / 4 * pixels + p] >> (groups % 4 * 8)) & 0xffU;
      std::memcpy(out + groups * 8, table.rows[byte], size_t(tail) * sizeof(Bits));
    }
  }
}

template <typename Bits>
void expand_channels_first(const uint32_t* words, int64_t pixels, int64_t n, int64_t channels,
                           int64_t stride, Bits high, Bits low, Bits* out) {
  for (int64_t c = 0; c < channels; ++c, out += stride) {
    const uint32_t* word = words + c / 32 * pixels;
    const int shift = static_cast<int>(c % 32);
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) out[p] = (word[p] >> shift) & 1U ? high : low;
  }
}

template <typename Id, typename Bits>
uint64_t encode(const Id* x, int64_t x_outer, int64_t x_map, int64_t x_inner, const int32_t* n_bits,
                int64_t maps, int64_t outer, int64_t inner, bool msb, Bits high, Bits low,
                int64_t out_outer, int64_t out_channel, int threads, Bits* out) {
  const int64_t channels = channels_of(n_bits, maps);
  const int64_t n_words = (channels + 31) / 32;
  const int64_t pixels = block_pixels(n_words);
  const bool last = inner == 1;
  const int64_t length = last ? outer : inner;
  const int64_t per_row = (length + pixels - 1) / pixels;
  const int64_t tasks = last ? per_row : outer * per_row;
  const ByteTable<Bits> table(high, low);
  const size_t bytes = size_t(outer) * size_t(channels) * size_t(inner) * sizeof(Bits);
  const bool streaming = bytes > kHugePageThreshold && channels % 8 == 0 &&
                         reinterpret_cast<std::uintptr_t>(out) % (8 * sizeof(Bits)) == 0 &&
                         out_outer % 8 == 0;
  uint64_t excess = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : excess)
  {
    alignas(64) uint32_t words[kWords];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t row = last ? 0 : task / per_row;
      const int64_t begin = (last ? task : task % per_row) * pixels;
      const int64_t n = std::min(pixels, length - begin);
      const Id* ids = x + row * x_outer + begin * (last ? x_outer : x_inner);
      excess |=
          pack(ids, last ? x_outer : x_inner, x_map, n_bits, maps, msb, n, n_words, pixels, words);
      if (last) {
        expand_channels_last(words, pixels, n, channels, out_outer, streaming, table,
                             out + begin * out_outer);
      } else {
        expand_channels_first(words, pixels, n, channels, out_channel, high, low,
                              out + row * out_outer + begin);
      }
    }
    if (streaming) simd::stream_fence();
  }
  return excess;
}

// A value is positive iff its bit pattern, read as a signed integer, lies in (0, infinity's].
template <typename Bits, Bits Infinity>
struct Positive {
  using type = Bits;
  static uint32_t of(Bits v) { return v > 0 && v <= Infinity ? 1U : 0U; }
};
using PositiveF32 = Positive<int32_t, 0x7f800000>;
using PositiveF64 = Positive<int64_t, 0x7ff0000000000000>;
using PositiveBF16 = Positive<std::int16_t, 0x7f80>;
using PositiveF16 = Positive<std::int16_t, 0x7c00>;
using PositiveBool = Positive<std::int8_t, 1>;

template <typename P>
void gather_channels_last(const typename P::type* bits, int64_t stride, int64_t n, int64_t channels,
                          int64_t pixels, uint32_t* words) {
  for (int64_t p = 0; p < n; ++p, bits += stride) {
    for (int64_t begin = 0; begin < channels; begin += 32) {
      const int64_t end = std::min(begin + 32, channels);
      uint32_t word = 0;
      int64_t c = begin;
      if constexpr (std::is_same_v<P, PositiveF32>) {
        for (; c + 8 <= end; c += 8) word |= simd::positive_mask(bits + c) << (c - begin);
      }
      for (; c < end; ++c) word |= P::of(bits[c]) << (c - begin);
      words[begin / 32 * pixels + p] = word;
    }
  }
}

template <typename P>
void gather_channels_first(const typename P::type* bits, int64_t stride, int64_t n,
                           int64_t channels, int64_t n_words, int64_t pixels, uint32_t* words) {
  for (int64_t w = 0; w < n_words; ++w) std::memset(words + w * pixels, 0, size_t(n) * 4);
  for (int64_t c = 0; c < channels; ++c, bits += stride) {
    uint32_t* word = words + c / 32 * pixels;
    const int shift = static_cast<int>(c % 32);
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) word[p] |= P::of(bits[p]) << shift;
  }
}

template <typename Id>
void unpack(const uint32_t* words, int64_t pixels, int64_t n, const int32_t* n_bits,
            const int64_t* max_value, int64_t maps, bool msb, int64_t stride, int64_t map_stride,
            Id* out) {
  int64_t offset = 0;
  for (int64_t k = 0; k < maps; ++k, out += map_stride) {
    const int n_k = n_bits[k];
    const int shift = static_cast<int>(offset % 32);
    const uint32_t* word = words + offset / 32 * pixels;
    const uint64_t limit = max_value[k] < 0 ? ~uint64_t{0} : static_cast<uint64_t>(max_value[k]);
    if (shift + n_k <= 32) {
      const uint32_t keep = n_k == 32 ? ~0U : (1U << n_k) - 1U;
      const uint32_t most = static_cast<uint32_t>(std::min<uint64_t>(limit, ~0U));
      for (int64_t p = 0; p < n; ++p) {
        uint32_t v = (word[p] >> shift) & keep;
        if (msb) v = reverse32(v) >> (32 - n_k);
        out[p * stride] = static_cast<Id>(std::min(v, most));
      }
    } else {
      const int last = (shift + n_k - 1) / 32;
      for (int64_t p = 0; p < n; ++p) {
        uint64_t v = word[p] | (static_cast<uint64_t>(word[pixels + p]) << 32);
        v >>= shift;
        if (last >= 2) v |= static_cast<uint64_t>(word[2 * pixels + p]) << (64 - shift);
        v &= (uint64_t{1} << n_k) - 1;
        if (msb) v = reverse64(v) >> (64 - n_k);
        out[p * stride] = static_cast<Id>(std::min(v, limit));
      }
    }
    offset += n_k;
  }
}

template <typename P, typename Id>
void decode(const typename P::type* bits, int64_t bits_outer, int64_t bits_channel,
            const int32_t* n_bits, const int64_t* max_value, int64_t maps, int64_t outer,
            int64_t inner, bool msb, int threads, Id* out) {
  const int64_t channels = channels_of(n_bits, maps);
  const int64_t n_words = (channels + 31) / 32;
  const int64_t pixels = block_pixels(n_words);
  const bool last = inner == 1;
  const int64_t length = last ? outer : inner;
  const int64_t per_row = (length + pixels - 1) / pixels;
  const int64_t tasks = last ? per_row : outer * per_row;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    alignas(64) uint32_t words[kWords];
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t row = last ? 0 : task / per_row;
      const int64_t begin = (last ? task : task % per_row) * pixels;
      const int64_t n = std::min(pixels, length - begin);
      if (last) {
        gather_channels_last<P>(bits + begin * bits_outer, bits_outer, n, channels, pixels, words);
        unpack(words, pixels, n, n_bits, max_value, maps, msb, maps, 1, out + begin * maps);
      } else {
        gather_channels_first<P>(bits + row * bits_outer + begin, bits_channel, n, channels,
                                 n_words, pixels, words);
        unpack(words, pixels, n, n_bits, max_value, maps, msb, 1, inner,
               out + row * maps * inner + begin);
      }
    }
  }
}

}  // namespace

uint64_t bits_encode(const void* x, int x_dtype, int64_t x_outer_stride, int64_t x_map_stride,
                     int64_t x_inner_stride, const int32_t* n_bits, int64_t maps, int64_t outer,
                     int64_t inner, bool msb, double high, double low, int out_dtype,
                     int64_t out_outer_stride, int64_t out_channel_stride, int threads, void* out) {
  const int64_t channels = channels_of(n_bits, maps);
  if (outer * inner * channels == 0) return 0;
  const auto high_f32 = static_cast<float>(high);
  const auto low_f32 = static_cast<float>(low);
  uint64_t excess = 0;
  with_id_type(x_dtype, [&](auto id) {
    const auto run = [&](auto high_bits, auto low_bits) {
      using Bits = decltype(high_bits);
      advise_huge_pages(out, size_t(outer * inner * channels) * sizeof(Bits));
      excess = encode(static_cast<const decltype(id)*>(x), x_outer_stride, x_map_stride,
                      x_inner_stride, n_bits, maps, outer, inner, msb, high_bits, low_bits,
                      out_outer_stride, out_channel_stride, threads, static_cast<Bits*>(out));
    };
    switch (static_cast<DType>(out_dtype)) {
      case DType::f64:
        return run(std::bit_cast<uint64_t>(high), std::bit_cast<uint64_t>(low));
      case DType::bf16:
        return run(from_float<bf16>(high_f32).bits, from_float<bf16>(low_f32).bits);
      case DType::f16:
        return run(from_float<f16>(high_f32).bits, from_float<f16>(low_f32).bits);
      default:
        return run(std::bit_cast<uint32_t>(high_f32), std::bit_cast<uint32_t>(low_f32));
    }
  });
  return excess;
}

void bits_decode(const void* bits, int bits_dtype, int64_t bits_outer_stride,
                 int64_t bits_channel_stride, const int32_t* n_bits, const int64_t* max_value,
                 int64_t maps, int64_t outer, int64_t inner, bool msb, int out_dtype, int threads,
                 void* out) {
  if (outer * inner * maps == 0) return;
  with_id_type(out_dtype, [&](auto id) {
    using Id = decltype(id);
    advise_huge_pages(out, size_t(outer * inner * maps) * sizeof(Id));
    const auto run = [&]<typename P>(P) {
      decode<P>(static_cast<const typename P::type*>(bits), bits_outer_stride, bits_channel_stride,
                n_bits, max_value, maps, outer, inner, msb, threads, static_cast<Id*>(out));
    };
    switch (static_cast<DType>(bits_dtype)) {
      case DType::f64:
        return run(PositiveF64{});
      case DType::bf16:
        return run(PositiveBF16{});
      case DType::f16:
        return run(PositiveF16{});
      case DType::boolean:
        return run(PositiveBool{});
      default:
        return run(PositiveF32{});
    }
  });
}

}  // namespace foveate::FOVEATE_ISA
