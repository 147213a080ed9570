// Affinities as bits: normalised rows, packed panels of a product, painted tokens.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "ncut.h"
#include "simd.h"

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

// Bit t is s[t] > tau, for t < count <= 32.
template <typename T>
std::uint32_t compare_word(const T* s, std::int64_t count, T tau) {
#if defined(__AVX2__)
  if (count == 32) {
    std::uint32_t word = 0;
    if constexpr (sizeof(T) == 4) {
      const __m256 limit = _mm256_set1_ps(tau);
      for (int part = 0; part < 4; ++part) {
        const __m256 v = _mm256_loadu_ps(s + 8 * part);
        const int mask = _mm256_movemask_ps(_mm256_cmp_ps(v, limit, _CMP_GT_OQ));
        word |= static_cast<std::uint32_t>(mask) << (8 * part);
      }
    } else {
      const __m256d limit = _mm256_set1_pd(tau);
      for (int part = 0; part < 8; ++part) {
        const __m256d v = _mm256_loadu_pd(s + 4 * part);
        const int mask = _mm256_movemask_pd(_mm256_cmp_pd(v, limit, _CMP_GT_OQ));
        word |= static_cast<std::uint32_t>(mask) << (4 * part);
      }
    }
    return word;
  }
#endif
  std::uint32_t word = 0;
  for (std::int64_t t = 0; t < count; ++t) word |= (s[t] > tau ? 1U : 0U) << t;
  return word;
}

template <typename T>
void pack_panel(const T* s, std::int64_t ld, std::int64_t i0, std::int64_t rows, std::int64_t n,
                T tau, const std::uint8_t* zero, bool joined, int threads, std::uint32_t* bits) {
  const std::int64_t first = i0 / 32;
  const std::int64_t columns = (n + 31) / 32 - first;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (std::int64_t tile = 0; tile < columns; ++tile) {
    const std::int64_t j = i0 + 32 * tile;
    const std::int64_t width = std::min<std::int64_t>(32, n - j);
    for (std::int64_t r = 0; r < rows && i0 + r <= j; r += 32) {
      const std::int64_t height = std::min<std::int64_t>(32, rows - r);
      std::uint32_t words[32] = {};
      std::uint32_t mirror[32];
      for (std::int64_t t = 0; t < height; ++t) {
        words[t] = compare_word(s + (r + t) * ld + (j - i0), width, tau);
      }
      const bool diagonal = i0 + r == j;
      if (diagonal) {
        for (int t = 0; t < 32; ++t) words[t] &= zero == nullptr ? ~0U << t : (~1U << t);
      }
      std::memcpy(mirror, words, sizeof(mirror));
      transpose_bits(mirror);
      if (diagonal) {
        for (std::int64_t t = 0; t < height; ++t) {
          words[t] |= mirror[t];
          if (zero != nullptr && (zero[j + t] == 0 || joined)) words[t] |= 1U << t;
        }
        std::memcpy(bits + (j / 32) * n + j, words, static_cast<std::size_t>(height) * 4);
      } else {
        std::memcpy(bits + (j / 32) * n + i0 + r, words, static_cast<std::size_t>(height) * 4);
        std::memcpy(bits + ((i0 + r) / 32) * n + j, mirror, static_cast<std::size_t>(width) * 4);
      }
    }
  }
}

template <typename T>
std::int64_t normalize(const T* features, const std::uint8_t* masked, std::int64_t n,
                       std::int64_t c, int threads, T* unit, std::uint8_t* zero) {
  std::int64_t bad = n;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(min : bad) if (threads > 1)
  for (std::int64_t i = 0; i < n; ++i) {
    const T* row = features + i * c;
    T* out = unit + i * c;
    T largest = 0;
    T poison = 0;
    for (std::int64_t j = 0; j < c; ++j) {
      largest = std::max(largest, std::abs(row[j]));
      poison += row[j] * T(0);
    }
    if (!(poison == T(0))) bad = std::min(bad, i);
    const bool nothing = largest == T(0) || (masked != nullptr && masked[i] != 0);
    zero[i] = nothing ? 1 : 0;
    if (nothing) {
      std::memset(out, 0, static_cast<std::size_t>(c) * sizeof(T));
      continue;
    }
    // A power of two changes no bit of a cosine, and keeps squares inside the range.
    const int exponent = std::max(std::ilogb(largest), -1000);
    const double scale = std::ldexp(1.0, -exponent);
    double sums[4] = {0, 0, 0, 0};
    for (std::int64_t j = 0; j + 4 <= c; j += 4) {
      for (int t = 0; t < 4; ++t) {
        const double v = static_cast<double>(row[j + t]) * scale;
        sums[t] += v * v;
      }
    }
    for (std::int64_t j = c & ~std::int64_t{3}; j < c; ++j) {
      const double v = static_cast<double>(row[j]) * scale;
      sums[0] += v * v;
    }
    const double norm = std::sqrt((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const double divisor = std::max(norm, std::ldexp(1e-12, -exponent));
    for (std::int64_t j = 0; j < c; ++j) {
      out[j] = static_cast<T>(static_cast<double>(row[j]) * scale / divisor);
    }
  }
  return bad == n ? -1 : bad;
}

template <typename T>
void scan(const T* a, std::int64_t n, int threads, double* report) {
  double low = INFINITY;
  double high = -INFINITY;
  double difference = 0;
  std::int64_t bad = n;
  std::int64_t negative = n;
  constexpr std::int64_t kTile = 64;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : low, bad, negative) \
    reduction(max : high, difference) if (threads > 1)
  for (std::int64_t i0 = 0; i0 < n; i0 += kTile) {
    const std::int64_t i1 = std::min(n, i0 + kTile);
    for (std::int64_t i = i0; i < i1; ++i) {
      T smallest = a[i * n];
      T largest = smallest;
      T poison = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        const T v = a[i * n + j];
        smallest = v < smallest ? v : smallest;
        largest = v > largest ? v : largest;
        poison += v * T(0);
      }
      if (!(poison == T(0))) bad = std::min(bad, i);
      if (smallest < T(0)) negative = std::min(negative, i);
      low = std::min(low, static_cast<double>(smallest));
      high = std::max(high, static_cast<double>(largest));
    }
    for (std::int64_t j0 = i0; j0 < n; j0 += kTile) {
      const std::int64_t j1 = std::min(n, j0 + kTile);
      T most = 0;
      for (std::int64_t i = i0; i < i1; ++i) {
        for (std::int64_t j = j0; j < j1; ++j) {
          const T d = std::abs(a[i * n + j] - a[j * n + i]);
          most = d > most ? d : most;
        }
      }
      difference = std::max(difference, static_cast<double>(most));
    }
  }
  bool two = true;
  const T lo = static_cast<T>(low);
  const T hi = static_cast<T>(high);
  for (std::int64_t i = 0; i < n && two; ++i) {
    int other = 0;
    for (std::int64_t j = 0; j < n; ++j) {
      const T v = a[i * n + j];
      other |= static_cast<int>(v != lo) & static_cast<int>(v != hi);
    }
    two = other == 0;
  }
  report[0] = low;
  report[1] = high;
  report[2] = difference;
  report[3] = bad == n ? -1.0 : static_cast<double>(bad);
  report[4] = negative == n ? -1.0 : static_cast<double>(negative);
  report[5] = two ? 1.0 : 0.0;
}

}  // namespace

std::int64_t ncut_normalize(const void* features, int is_double, const std::uint8_t* masked,
                            std::int64_t n, std::int64_t c, int threads, void* unit,
                            std::uint8_t* zero) {
  if (is_double != 0) {
    return normalize(static_cast<const double*>(features), masked, n, c, threads,
                     static_cast<double*>(unit), zero);
  }
  return normalize(static_cast<const float*>(features), masked, n, c, threads,
                   static_cast<float*>(unit), zero);
}

int ncut_pack_panel(const void* s, int is_double, std::int64_t ld, std::int64_t i0,
                    std::int64_t rows, std::int64_t n, double tau, const std::uint8_t* zero,
                    int joined, int threads, std::uint32_t* bits) {
  if (is_double != 0) {
    pack_panel(static_cast<const double*>(s), ld, i0, rows, n, tau, zero, joined != 0, threads,
               bits);
  } else {
    pack_panel(static_cast<const float*>(s), ld, i0, rows, n, static_cast<float>(tau), zero,
               joined != 0, threads, bits);
  }
  return 0;
}

int ncut_degrees(const std::uint32_t* bits, std::int64_t n, std::int32_t* degrees) {
  std::memset(degrees, 0, static_cast<std::size_t>(n) * 4);
  for (std::int64_t q = 0; q < (n + 31) / 32; ++q) {
    for (std::int64_t i = 0; i < n; ++i) degrees[i] += std::popcount(bits[q * n + i]);
  }
  return 0;
}

int ncut_paint(const std::uint8_t* painted, int joined, std::int64_t n, std::uint32_t* bits) {
  for (std::int64_t q = 0; q < (n + 31) / 32; ++q) {
    std::uint32_t columns = 0;
    std::uint32_t all = 0;
    for (std::int64_t t = 0; t < 32 && 32 * q + t < n; ++t) {
      columns |= (painted[32 * q + t] != 0 ? 1U : 0U) << t;
      all |= 1U << t;
    }
    std::uint32_t* words = bits + q * n;
    if (joined != 0) {
      for (std::int64_t i = 0; i < n; ++i) words[i] = painted[i] != 0 ? all : words[i] | columns;
    } else {
      for (std::int64_t i = 0; i < n; ++i) words[i] = painted[i] != 0 ? 0U : words[i] & ~columns;
    }
  }
  return 0;
}

int ncut_scan(const void* affinity, int is_double, std::int64_t n, int threads, double* report) {
  if (is_double != 0) {
    scan(static_cast<const double*>(affinity), n, threads, report);
  } else {
    scan(static_cast<const float*>(affinity), n, threads, report);
  }
  return 0;
}

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

}  // namespace foveate::FOVEATE_ISA
