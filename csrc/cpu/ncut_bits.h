// Words of bits: transposed, and with their mirror image written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace foveate::FOVEATE_ISA {
namespace {

// out[c] bit r = in[r] bit c, in place.
void transpose_bits(std::uint32_t* a) {
  std::uint32_t mask = 0x0000ffffU;
  for (int step = 16; step != 0; step >>= 1, mask ^= mask << step) {
    for (int i = 0; i < 32; i = (i + step + 1) & ~step) {
      const std::uint32_t swap = ((a[i] >> step) ^ a[i + step]) & mask;
      a[i + step] ^= swap;
      a[i] ^= swap << step;
    }
  }
}

// Writes rows i0 .. i0 + height of word column j0 / 32, and their mirror image. On the diagonal
// (i0 = j0) the words hold what is right of it, the diagonal included.
[[maybe_unused]] inline void store_words(std::uint32_t* words, std::int64_t i0, std::int64_t height,
                                         std::int64_t j0, std::int64_t width, std::int64_t n,
                                         std::uint32_t* bits) {
  std::uint32_t mirror[32];
  std::memcpy(mirror, words, sizeof(mirror));
  transpose_bits(mirror);
  if (i0 == j0) {
    for (std::int64_t t = 0; t < height; ++t) words[t] |= mirror[t];
  } else {
    std::memcpy(bits + (i0 / 32) * n + j0, mirror, static_cast<std::size_t>(width) * 4);
  }
  std::memcpy(bits + (j0 / 32) * n + i0, words, static_cast<std::size_t>(height) * 4);
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
