// Affinities as bits. Cosines are screened by a product of rows rounded to 16-bit integers, whose
// error is bounded row by row; the few pairs that the bound leaves open are computed in float64.
// The bits are those of the float64 cosine rounded to the features' precision, whatever the order
// of the work.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "ncut.h"
#include "ncut_bits.h"
#include "ncut_graph.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr std::int64_t kShared = 1 << 22;  // entries above which threads share a look at each
constexpr std::int64_t kPanel = 16;        // rows that share a panel
constexpr std::int64_t kTile = 128;        // rows and columns of one piece of work
constexpr double kScale = 32700;           // of a unit row; a dot stays below 2^31
constexpr double kWidest = 4.5e8;          // bound of an open pair that cannot overflow
// Rounding of a cosine to float32, and of norms that are 1 to a few units in the last place.
constexpr double kSlack = 512;

// Largest magnitude of a row; infinite or NaN if an entry is. Compares bit patterns, which keeps
// NaN.
float row_peak(const float* row, std::int64_t c) {
  std::int32_t peak = 0;
  for (std::int64_t j = 0; j < c; ++j) {
    const std::int32_t size = std::bit_cast<std::int32_t>(row[j]) & 0x7fffffff;
    peak = size > peak ? size : peak;
  }
  return std::bit_cast<float>(peak);
}

double row_peak(const double* row, std::int64_t c) {
  std::int64_t peak = 0;
  for (std::int64_t j = 0; j < c; ++j) {
    const std::int64_t size = std::bit_cast<std::int64_t>(row[j]) & 0x7fffffffffffffff;
    peak = size > peak ? size : peak;
  }
  return std::bit_cast<double>(peak);
}

template <typename T>
double dot(const T* a, const T* b, std::int64_t c) {
  double sums[8] = {};
  std::int64_t j = 0;
  for (; j + 8 <= c; j += 8) {
    for (int t = 0; t < 8; ++t) {
      sums[t] += static_cast<double>(a[j + t]) * static_cast<double>(b[j + t]);
    }
  }
  for (int t = 0; j < c; ++j, ++t) {
    sums[t] += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

template <typename T>
std::int64_t normalize(const T* features, const std::uint8_t* masked, std::int64_t n,
                       std::int64_t c, int threads, T* unit, std::uint8_t* zero) {
  std::int64_t bad = n;
#pragma omp parallel for num_threads(threads) schedule(static) \
    reduction(min : bad) if (threads > 1 && n * c >= kShared)
  for (std::int64_t i = 0; i < n; ++i) {
    const T* row = features + i * c;
    T* out = unit + i * c;
    const T largest = row_peak(row, c);
    if (!std::isfinite(largest)) bad = std::min(bad, i);
    const bool nothing = largest == T(0) || (masked != nullptr && masked[i] != 0);
    zero[i] = nothing ? 1 : 0;
    if (nothing) {
      std::memset(out, 0, static_cast<std::size_t>(c) * sizeof(T));
      continue;
    }
    // A power of two changes no bit of a cosine, and keeps squares inside the range.
    const int exponent = std::isfinite(largest) ? std::max(std::ilogb(largest), -1000) : 0;
    const double scale = std::ldexp(1.0, -exponent);
    double sums[8] = {};
    std::int64_t j = 0;
    for (; j + 8 <= c; j += 8) {
      for (int t = 0; t < 8; ++t) {
        const double v = static_cast<double>(row[j + t]) * scale;
        sums[t] += v * v;
      }
    }
    for (; j < c; ++j) {
      const double v = static_cast<double>(row[j]) * scale;
      sums[0] += v * v;
    }
    const double square =
        ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    const double divisor = std::max(std::sqrt(square), std::ldexp(1e-12, -exponent));
    for (j = 0; j < c; ++j) out[j] = static_cast<T>(static_cast<double>(row[j]) * scale / divisor);
  }
  return bad == n ? -1 : bad;
}

// Rows 16 p .. 16 p + 16 times kScale as integers, [pairs][16][2]; the norm of what rounding lost.
template <typename T>
void quantize(const T* unit, std::int64_t panel, std::int64_t n, std::int64_t c, std::int16_t* out,
              double* lost) {
  const std::int64_t pairs = (c + 1) / 2;
  std::memset(out, 0, static_cast<std::size_t>(2 * kPanel * pairs) * sizeof(std::int16_t));
  for (std::int64_t r = 0; r < kPanel && kPanel * panel + r < n; ++r) {
    const T* row = unit + (kPanel * panel + r) * c;
    double square = 0;
    for (std::int64_t j = 0; j < c; ++j) {
      const double exact = static_cast<double>(row[j]) * kScale;
      const bool inside = exact >= -32767 && exact <= 32767;  // not so for NaN
      const int whole = inside ? static_cast<int>(exact + (exact < 0 ? -0.5 : 0.5)) : 0;
      const double rest = exact - whole;
      square += rest * rest;
      out[2 * kPanel * (j / 2) + 2 * r + j % 2] = static_cast<std::int16_t>(whole);
    }
    lost[kPanel * panel + r] = std::sqrt(square) * (1 + 1e-9);
  }
}

// dots[4][16] of rows r0 .. r0 + 4 of panel a with panel b.
void multiply_panels(const std::int16_t* a, int r0, const std::int16_t* b, std::int64_t pairs,
                     std::int32_t* dots) {
#if defined(__AVX2__)
  __m256i sums[4][2];
  for (auto& row : sums) row[0] = row[1] = _mm256_setzero_si256();
  const std::int16_t* left = a + 2 * r0;
#pragma GCC unroll 4
  for (std::int64_t p = 0; p < pairs; ++p) {
    const __m256i b0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32 * p));
    const __m256i b1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32 * p + 16));
    for (int r = 0; r < 4; ++r) {
      std::int32_t pair = 0;
      std::memcpy(&pair, left + 32 * p + 2 * r, sizeof(pair));
      const __m256i both = _mm256_set1_epi32(pair);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(both, b0));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(both, b1));
    }
  }
  for (int r = 0; r < 4; ++r) {
    for (int h = 0; h < 2; ++h) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dots + 16 * r + 8 * h), sums[r][h]);
    }
  }
#else
  for (int t = 0; t < 64; ++t) dots[t] = 0;
  for (std::int64_t p = 0; p < pairs; ++p) {
    for (int r = 0; r < 4; ++r) {
      const std::int16_t* pair = a + 32 * p + 2 * (r0 + r);
      for (int j = 0; j < 16; ++j) {
        dots[16 * r + j] += pair[0] * b[32 * p + 2 * j] + pair[1] * b[32 * p + 2 * j + 1];
      }
    }
  }
#endif
}

// Which of 16 dots are above `high` + margin, and which are not below `low` - margin.
void compare_dots(const std::int32_t* dots, std::int32_t high, std::int32_t low,
                  const std::int32_t* margin, std::uint32_t* above, std::uint32_t* open) {
#if defined(__AVX2__)
  *above = *open = 0;
  for (int h = 0; h < 2; ++h) {
    const __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(dots + 8 * h));
    const __m256i m = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(margin + 8 * h));
    const __m256i over = _mm256_cmpgt_epi32(d, _mm256_add_epi32(_mm256_set1_epi32(high), m));
    const __m256i under = _mm256_cmpgt_epi32(_mm256_sub_epi32(_mm256_set1_epi32(low), m), d);
    *above |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(over))) << (8 * h);
    *open |= (static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(under))) ^ 255U)
             << (8 * h);
  }
#else
  *above = *open = 0;
  for (int j = 0; j < 16; ++j) {
    *above |= (dots[j] > high + margin[j] ? 1U : 0U) << j;
    *open |= (dots[j] >= low - margin[j] ? 1U : 0U) << j;
  }
#endif
}

template <typename T>
struct Rows {
  const T* unit;             // [n, c]
  const std::uint8_t* zero;  // [n]
  std::int64_t n;
  std::int64_t c;
  T tau;
  const std::int16_t* panels;  // [ceil(n / 16)][pairs][16][2]
  const std::int32_t* margin;  // [32 ceil(n / 32)]
  std::int32_t high;
  std::int32_t low;
};

// words[t] bit u = S(i0 + t, j0 + u) > tau for a tile of 32 x 32 on or above the diagonal.
template <typename T>
void pack_tile(const Rows<T>& rows, std::int64_t i0, std::int64_t j0, std::uint32_t* words) {
  const std::int64_t pairs = (rows.c + 1) / 2;
  const std::int64_t height = std::min<std::int64_t>(32, rows.n - i0);
  const std::int64_t width = std::min<std::int64_t>(32, rows.n - j0);
  const bool joined = T(0) > rows.tau;
  std::memset(words, 0, 32 * sizeof(std::uint32_t));
  for (std::int64_t half = 0; 16 * half < width; ++half) {
    const std::int64_t j = j0 + 16 * half;
    const std::uint32_t inside =
        width - 16 * half >= 16 ? 0xffffU : (1U << (width - 16 * half)) - 1;
    const std::int16_t* b = rows.panels + (j / 16) * pairs * 32;
    for (std::int64_t t = 0; t < height; t += 4) {
      std::int32_t dots[64];
      const std::int16_t* a = rows.panels + ((i0 + t) / 16) * pairs * 32;
      multiply_panels(a, static_cast<int>(t % 16), b, pairs, dots);
      for (std::int64_t r = 0; r < 4 && t + r < height; ++r) {
        const std::int64_t i = i0 + t + r;
        std::uint32_t above = 0;
        std::uint32_t open = 0;
        const std::int32_t margin = rows.margin[i];
        compare_dots(dots + 16 * r, rows.high + margin, rows.low - margin, rows.margin + j, &above,
                     &open);
        std::uint32_t wanted = inside;
        if (i0 == j0) {  // only what is right of the diagonal
          const std::int64_t skipped = t + r + 1 - 16 * half;
          if (skipped >= 16) {
            wanted = 0;
          } else if (skipped > 0) {
            wanted &= ~0U << skipped;
          }
        }
        above &= wanted;
        for (std::uint32_t left = open & wanted & ~above; left != 0; left &= left - 1) {
          const int u = std::countr_zero(left);
          const bool bit =
              rows.zero[i] != 0 || rows.zero[j + u] != 0
                  ? joined
                  : static_cast<T>(dot(rows.unit + i * rows.c, rows.unit + (j + u) * rows.c,
                                       rows.c)) > rows.tau;
          above |= (bit ? 1U : 0U) << u;
        }
        words[t + r] |= above << (16 * half);
      }
    }
  }
}

template <typename T>
void pack(const T* unit, const std::uint8_t* zero, std::int64_t n, std::int64_t c, double tau,
          int joined, int threads, std::uint32_t* bits) {
  const std::int64_t panels = 2 * ((n + 31) / 32);
  const std::int64_t pairs = (c + 1) / 2;
  Memory panel_memory(panels * pairs * 8 + 1), lost(32 * panels), margin_memory(16 * panels);
  auto* quantized = reinterpret_cast<std::int16_t*>(panel_memory.data);
  auto* margin = reinterpret_cast<std::int32_t*>(margin_memory.data);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && n * c >= kShared)
  for (std::int64_t p = 0; p < panels; ++p) {
    quantize(unit, p, n, c, quantized + p * pairs * 32, lost.data);
  }
  double most = 0;
  for (std::int64_t i = 0; i < n; ++i) most = std::max(most, lost.data[i]);
  // |S - dot / kScale^2| kScale^2 <= |q_i| |e_j| + |e_i| |q_j| + |e_i| |e_j|, |q| <= kScale + |e|.
  for (std::int64_t i = 0; i < n; ++i) {
    const double bound = 1.00001 * kScale * lost.data[i] + 1.5 * most * most + kSlack;
    margin[i] = static_cast<std::int32_t>(bound < kWidest ? bound : kWidest);
  }
  const double limit = std::min(std::max(static_cast<double>(static_cast<T>(tau)), -1.001), 1.001);
  const double middle = limit * kScale * kScale;
  const Rows<T> rows{unit,
                     zero,
                     n,
                     c,
                     static_cast<T>(tau),
                     quantized,
                     margin,
                     static_cast<std::int32_t>(std::ceil(middle)),
                     static_cast<std::int32_t>(std::floor(middle))};
  const std::int64_t tiles = (n + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (std::int64_t item = 0; item < tiles * tiles; ++item) {
    const std::int64_t i1 = std::min(n, (item / tiles + 1) * kTile);
    const std::int64_t j1 = std::min(n, (item % tiles + 1) * kTile);
    for (std::int64_t j0 = (item % tiles) * kTile; j0 < j1; j0 += 32) {
      for (std::int64_t i0 = (item / tiles) * kTile; i0 < i1 && i0 <= j0; i0 += 32) {
        std::uint32_t words[32];
        pack_tile(rows, i0, j0, words);
        for (std::int64_t t = 0; i0 == j0 && t < 32 && j0 + t < n; ++t) {
          words[t] |= (zero[j0 + t] == 0 || joined != 0 ? 1U : 0U) << t;
        }
        store_words(words, i0, std::min<std::int64_t>(32, n - i0), j0,
                    std::min<std::int64_t>(32, n - j0), n, bits);
      }
    }
  }
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

int ncut_pack(const void* unit, int is_double, const std::uint8_t* zero, std::int64_t n,
              std::int64_t c, double tau, int joined, int threads, std::uint32_t* bits) {
  if (is_double != 0) {
    pack(static_cast<const double*>(unit), zero, n, c, tau, joined, threads, bits);
  } else {
    pack(static_cast<const float*>(unit), zero, n, c, tau, joined, threads, bits);
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

}  // namespace foveate::FOVEATE_ISA
