// A given affinity: what it holds, its row sums, and its bits where it has two values.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "ncut.h"
#include "ncut_bits.h"
#include "simd.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr std::int64_t kTile = 64;

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

template <typename T>
void note(const T* a, std::int64_t n, std::int64_t i0, std::int64_t i1, std::int64_t j0,
          std::int64_t j1, Report* report) {
  for (std::int64_t i = i0; i < i1; ++i) {
    T low = 0;
    T high = 0;
    T poison = 0;
    look(a + i * n + j0, j1 - j0, &low, &high, &poison);
    if (!(poison == T(0))) report->bad = std::min(report->bad, i);
    if (low < T(0)) report->negative = std::min(report->negative, i);
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

template <typename T>
void scan(const T* a, std::int64_t n, int threads, double* report) {
  double low = INFINITY;
  double high = -INFINITY;
  double difference = 0;
  std::int64_t bad = n;
  std::int64_t negative = n;
  const std::int64_t tiles = (n + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) \
    reduction(min : low, bad, negative) reduction(max : high, difference) if (threads > 1)
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t i0 = tile * kTile;
    const std::int64_t i1 = std::min(n, i0 + kTile);
    Report own{INFINITY, -INFINITY, 0, n, n};
    for (std::int64_t j0 = i0; j0 < n; j0 += kTile) {
      const std::int64_t j1 = std::min(n, j0 + kTile);
      note(a, n, i0, i1, j0, j1, &own);
      if (j0 > i0) note(a, n, j0, j1, i0, i1, &own);
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
        other |= static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_or_ps(is_high, is_low))) ^ 255U;
      }
    } else {
      const __m256d top = _mm256_set1_pd(high);
      const __m256d bottom = _mm256_set1_pd(low);
      for (int part = 0; part < 8; ++part) {
        const __m256d v = _mm256_loadu_pd(s + 4 * part);
        const __m256d is_high = _mm256_cmp_pd(v, top, _CMP_EQ_OQ);
        const __m256d is_low = _mm256_cmp_pd(v, bottom, _CMP_EQ_OQ);
        word |= static_cast<std::uint32_t>(_mm256_movemask_pd(is_high)) << (4 * part);
        other |= static_cast<std::uint32_t>(_mm256_movemask_pd(_mm256_or_pd(is_high, is_low))) ^ 15U;
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
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
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

template <typename T>
void row_sums(const T* a, std::int64_t n, int threads, double* sums) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (std::int64_t i = 0; i < n; ++i) {
    const T* row = a + i * n;
    double lanes[8] = {};
    std::int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
      for (int t = 0; t < 8; ++t) lanes[t] += static_cast<double>(row[j + t]);
    }
    for (int t = 0; j < n; ++j, ++t) lanes[t] += static_cast<double>(row[j]);
    sums[i] = ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) +
              ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
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
