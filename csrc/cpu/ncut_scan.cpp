// A given affinity: what it holds, its row sums, and its bits where it has two values.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "ncut.h"
#include "ncut_bits.h"
#include "ncut_graph.h"
#include "ncut_weights.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr std::int64_t kTile = 64;
constexpr std::int64_t kShared = 2048;  // rows above which threads share a pass of a millisecond

struct Report {
  double low = INFINITY;
  double high = -INFINITY;
  double difference = 0;
  std::int64_t bad;
  std::int64_t negative;
};

// Looks at a row of a tile: extremes, and 0 or NaN in `poison`.
template <typename T>
void look(const T* row, std::int64_t count, T* low, T* high, T* poison) {
  T smallest = row[0];
  T largest = row[0];
  T rest = 0;
#pragma omp simd reduction(min : smallest) reduction(max : largest) reduction(+ : rest)
  for (std::int64_t j = 0; j < count; ++j) {
    smallest = row[j] < smallest ? row[j] : smallest;
    largest = row[j] > largest ? row[j] : largest;
    rest += row[j] * T(0);
  }
  *low = smallest;
  *high = largest;
  *poison = rest;
}

// Looks at columns j0 .. j1 of a row; its extremes count on one side of the diagonal only.
template <typename T>
void note(const T* row, std::int64_t i, std::int64_t j0, std::int64_t j1, bool extremes,
          Report* report) {
  if (j0 >= j1) return;
  T low = 0;
  T high = 0;
  T poison = 0;
  look(row + j0, j1 - j0, &low, &high, &poison);
  if (!(poison == T(0))) report->bad = std::min(report->bad, i);
  if (low < T(0)) report->negative = std::min(report->negative, i);
  if (extremes) {
    report->low = std::min(report->low, static_cast<double>(low));
    report->high = std::max(report->high, static_cast<double>(high));
  }
}

template <typename T>
T asymmetry(const T* a, std::int64_t n, std::int64_t i0, std::int64_t i1, std::int64_t j0,
            std::int64_t j1) {
  T turned[kTile][kTile];
  for (std::int64_t j = j0; j < j1; ++j) {
    for (std::int64_t i = i0; i < i1; ++i) turned[i - i0][j - j0] = a[j * n + i];
  }
  T most = 0;
  for (std::int64_t i = i0; i < i1; ++i) {
    const T* row = a + i * n + j0;
    const T* other = turned[i - i0];
    T largest = 0;
#pragma omp simd reduction(max : largest)
    for (std::int64_t j = 0; j < j1 - j0; ++j) {
      const T d = std::abs(row[j] - other[j]);
      largest = d > largest ? d : largest;
    }
    most = std::max(most, largest);
  }
  return most;
}

#if defined(__AVX2__)
// The transpose of eight rows of eight values.
void transpose_lanes(__m256* r) {
  __m256 pairs[8];
  for (int i = 0; i < 4; ++i) {
    pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  __m256 fours[8];
  for (int i = 0; i < 2; ++i) {
    for (int h = 0; h < 2; ++h) {
      const __m256 a = pairs[4 * i + h];
      const __m256 b = pairs[4 * i + 2 + h];
      fours[4 * i + 2 * h] = _mm256_shuffle_ps(a, b, 0x44);
      fours[4 * i + 2 * h + 1] = _mm256_shuffle_ps(a, b, 0xee);
    }
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(fours[i], fours[4 + i], 0x31);
  }
}

float asymmetry(const float* a, std::int64_t n, std::int64_t i0, std::int64_t i1, std::int64_t j0,
                std::int64_t j1) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  __m256 largest = _mm256_setzero_ps();
  float most = 0;
  for (std::int64_t i = i0; i < i1; i += 8) {
    for (std::int64_t j = j0; j < j1; j += 8) {
      if (i + 8 <= i1 && j + 8 <= j1) {
        __m256 turned[8];
        for (int t = 0; t < 8; ++t) turned[t] = _mm256_loadu_ps(a + (j + t) * n + i);
        transpose_lanes(turned);
        for (int t = 0; t < 8; ++t) {
          const __m256 row = _mm256_loadu_ps(a + (i + t) * n + j);
          const __m256 d = _mm256_andnot_ps(sign, _mm256_sub_ps(row, turned[t]));
          largest = _mm256_max_ps(d, largest);
        }
        continue;
      }
      for (std::int64_t r = i; r < std::min(i1, i + 8); ++r) {
        for (std::int64_t c = j; c < std::min(j1, j + 8); ++c) {
          const float d = std::abs(a[r * n + c] - a[c * n + r]);
          most = d > most ? d : most;
        }
      }
    }
  }
  float lanes[8];
  _mm256_storeu_ps(lanes, largest);
  for (float lane : lanes) most = std::max(most, lane);
  return most;
}
#endif

template <typename T>
void scan(const T* a, std::int64_t n, int threads, double* report) {
  double low = INFINITY;
  double high = -INFINITY;
  double difference = 0;
  std::int64_t bad = n;
  std::int64_t negative = n;
  const std::int64_t tiles = (n + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) \
    reduction(min : low, bad, negative)                            \
    reduction(max : high, difference) if (threads > 1 && n >= kShared)
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t i0 = tile * kTile;
    const std::int64_t i1 = std::min(n, i0 + kTile);
    Report own{INFINITY, -INFINITY, 0, n, n};
    for (std::int64_t j0 = i0; j0 < n; j0 += kTile) {
      const std::int64_t j1 = std::min(n, j0 + kTile);
      for (std::int64_t i = i0; i < i1; ++i) {
        const std::int64_t first = j0 > i0 ? j0 : i;
        note(a + i * n, i, first, j1, true, &own);
        if (j0 == i0) note(a + i * n, i, j0, first, false, &own);
      }
      for (std::int64_t j = j0; j < j1 && j0 > i0; ++j) note(a + j * n, j, i0, i1, false, &own);
      own.difference =
          std::max(own.difference, static_cast<double>(asymmetry(a, n, i0, i1, j0, j1)));
    }
    low = std::min(low, own.low);
    high = std::max(high, own.high);
    difference = std::max(difference, own.difference);
    bad = std::min(bad, own.bad);
    negative = std::min(negative, own.negative);
  }
  report[0] = low;
  report[1] = high;
  report[2] = difference;
  report[3] = bad == n ? -1.0 : static_cast<double>(bad);
  report[4] = negative == n ? -1.0 : static_cast<double>(negative);
}

// Bit t is s[t] == high, for t < count <= 32; clears *two if a value is neither.
template <typename T>
std::uint32_t compare_word(const T* s, std::int64_t count, T low, T high, bool* two) {
  std::uint32_t word = 0;
  std::uint32_t other = 0;
#if defined(__AVX2__)
  if (count == 32) {
    if constexpr (sizeof(T) == 4) {
      const __m256 top = _mm256_set1_ps(high);
      const __m256 bottom = _mm256_set1_ps(low);
      for (int part = 0; part < 4; ++part) {
        const __m256 v = _mm256_loadu_ps(s + 8 * part);
        const __m256 is_high = _mm256_cmp_ps(v, top, _CMP_EQ_OQ);
        const __m256 is_low = _mm256_cmp_ps(v, bottom, _CMP_EQ_OQ);
        word |= static_cast<std::uint32_t>(_mm256_movemask_ps(is_high)) << (8 * part);
        other |=
            static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_or_ps(is_high, is_low))) ^ 255U;
      }
    } else {
      const __m256d top = _mm256_set1_pd(high);
      const __m256d bottom = _mm256_set1_pd(low);
      for (int part = 0; part < 8; ++part) {
        const __m256d v = _mm256_loadu_pd(s + 4 * part);
        const __m256d is_high = _mm256_cmp_pd(v, top, _CMP_EQ_OQ);
        const __m256d is_low = _mm256_cmp_pd(v, bottom, _CMP_EQ_OQ);
        word |= static_cast<std::uint32_t>(_mm256_movemask_pd(is_high)) << (4 * part);
        other |=
            static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_or_pd(is_high, is_low))) ^ 15U;
      }
    }
    *two = *two && other == 0;
    return word;
  }
#endif
  for (std::int64_t t = 0; t < count; ++t) {
    word |= (s[t] == high ? 1U : 0U) << t;
    other |= s[t] == high || s[t] == low ? 0U : 1U;
  }
  *two = *two && other == 0;
  return word;
}

template <typename T>
int pack_values(const T* a, std::int64_t n, T low, T high, int threads, std::uint32_t* bits) {
  const std::int64_t tiles = (n + 31) / 32;
  std::atomic<int> third{0};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && n >= kShared)
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t i0 = 32 * tile;
    const std::int64_t height = std::min<std::int64_t>(32, n - i0);
    for (std::int64_t j0 = i0; j0 < n && third.load(std::memory_order_relaxed) == 0; j0 += 32) {
      const std::int64_t width = std::min<std::int64_t>(32, n - j0);
      std::uint32_t words[32] = {};
      for (std::int64_t t = 0; t < height; ++t) {
        const std::int64_t skipped = i0 == j0 ? t : 0;
        bool two = true;
        words[t] = compare_word(a + (i0 + t) * n + j0 + skipped, width - skipped, low, high, &two)
                   << skipped;
        if (!two) third.store(1, std::memory_order_relaxed);
      }
      store_words(words, i0, height, j0, width, n, bits);
    }
  }
  return third.load() == 0 ? 1 : 0;
}

// What rows r0 .. r1 of the upper triangle add to the sums of the rows: sums[r0 ..] is written.
template <typename T>
void part_sums(const T* a, std::int64_t n, std::int64_t r0, std::int64_t r1, double* sums) {
  std::memset(sums + r0, 0, static_cast<std::size_t>(n - r0) * sizeof(double));
  for (std::int64_t i = r0; i < r1; ++i) {
    const T* row = a + i * n;
    double lanes[4] = {static_cast<double>(row[i]), 0, 0, 0};
    std::int64_t j = i + 1;
    for (; j + 4 <= n; j += 4) {
      for (int t = 0; t < 4; ++t) {
        const auto w = static_cast<double>(row[j + t]);
        lanes[t] += w;
        sums[j + t] += w;
      }
    }
    for (int t = 0; j < n; ++j, ++t) {
      lanes[t] += static_cast<double>(row[j]);
      sums[j] += static_cast<double>(row[j]);
    }
    sums[i] += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
}

template <typename T>
void row_sums(const T* a, std::int64_t n, int threads, double* sums) {
  const std::int64_t parts = weight_parts(n);
  Memory scratch(n * parts);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && n >= kShared)
  for (std::int64_t part = 0; part < parts; ++part) {
    part_sums(a, n, part_begin(n, parts, part), part_begin(n, parts, part + 1),
              scratch.data + n * part);
  }
  std::memcpy(sums, scratch.data, static_cast<std::size_t>(n) * sizeof(double));
  for (std::int64_t part = 1; part < parts; ++part) {
    const double* from = scratch.data + n * part;
    for (std::int64_t i = part_begin(n, parts, part); i < n; ++i) sums[i] += from[i];
  }
}

}  // namespace

int ncut_scan(const void* affinity, int is_double, std::int64_t n, int threads, double* report) {
  if (is_double != 0) {
    scan(static_cast<const double*>(affinity), n, threads, report);
  } else {
    scan(static_cast<const float*>(affinity), n, threads, report);
  }
  return 0;
}

int ncut_pack_values(const void* affinity, int is_double, std::int64_t n, double low, double high,
                     int threads, std::uint32_t* bits) {
  if (is_double != 0) {
    return pack_values(static_cast<const double*>(affinity), n, low, high, threads, bits);
  }
  return pack_values(static_cast<const float*>(affinity), n, static_cast<float>(low),
                     static_cast<float>(high), threads, bits);
}

int ncut_row_sums(const void* affinity, int is_double, std::int64_t n, int threads, double* sums) {
  if (is_double != 0) {
    row_sums(static_cast<const double*>(affinity), n, threads, sums);
  } else {
    row_sums(static_cast<const float*>(affinity), n, threads, sums);
  }
  return 0;
}

}  // namespace foveate::FOVEATE_ISA
