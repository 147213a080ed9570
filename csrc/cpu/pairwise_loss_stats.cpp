#include "logistic.h"
#include "pairwise_loss.h"
#include "pairwise_tile.h"

namespace foveate::FOVEATE_ISA {
namespace {

// The larger and the smaller; NaN if either is.
template <typename T>
[[gnu::always_inline]] inline T larger(T a, T b) {
  return b > a || b != b ? b : a;
}
template <typename T>
[[gnu::always_inline]] inline T smaller(T a, T b) {
  return b < a || b != b ? b : a;
}

constexpr int kNegative = 0;
constexpr int kPositive = 1;
constexpr int kIgnored = 2;

// Kinds of the n pairs from column j0 of the tile.
template <typename T>
void fill_kinds(const Tile<T>& t, int64_t i, int64_t row, int64_t j0, int64_t n, int* kind) {
  T target[kBlock];
  fill_targets(t, i, row, j0, n, target);
  for (int64_t j = 0; j < n; ++j) kind[j] = target[j] >= T(0.5) ? kPositive : kNegative;
  if (t.ignore_x) {
    const int32_t* ids = t.ignore_y + t.col0 + j0;
    const int32_t id = t.ignore_x[row];
    for (int64_t j = 0; j < n; ++j) {
      if (ids[j] == id && target[j] == T(0)) kind[j] = kIgnored;
    }
  }
}

template <typename T>
void row_stats(const Tile<T>& t, const T* dot, int64_t i, int64_t row, int64_t n, int64_t* count,
               double* sum, T* low, T* high) {
  int kind[kBlock];
  for (int64_t j0 = 0; j0 < t.columns; j0 += kBlock) {
    const int64_t width = t.columns - j0 < kBlock ? t.columns - j0 : kBlock;
    fill_kinds(t, i, row, j0, width, kind);
    for (int64_t j = 0; j < width; ++j) {
      if (kind[j] == kIgnored) continue;
      const int64_t at = kind[j] * n + row;
      const T z = madd(t.scale, dot[j0 + j], t.bias);
      count[at] += 1;
      sum[at] += double(z);
      low[at] = smaller(low[at], z);
      high[at] = larger(high[at], z);
    }
  }
}

template <typename T>
void all_stats(const Tile<T>& t, const T* dot, int64_t ld, int64_t rows, int64_t row0, int64_t n,
               int64_t m, int threads, int64_t* count, double* sum, T* low, T* high,
               int64_t* col_count, T* col_high) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    row_stats(t, dot + i * ld, i, row0 + i, n, count, sum, low, high);
  }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t j0 = 0; j0 < t.columns; j0 += kBlock) {
    const int64_t width = t.columns - j0 < kBlock ? t.columns - j0 : kBlock;
    int kind[kBlock];
    for (int64_t i = 0; i < rows; ++i) {
      fill_kinds(t, i, row0 + i, j0, width, kind);
      for (int64_t j = 0; j < width; ++j) {
        if (kind[j] == kIgnored) continue;
        const int64_t column = t.col0 + j0 + j;
        T* best = col_high + kind[j] * m + column;
        *best = larger(*best, madd(t.scale, dot[i * ld + j0 + j], t.bias));
        col_count[column] += kind[j];
      }
    }
  }
}

template <typename T>
void typed_stats(const void* dot, int64_t ld, int64_t rows, int64_t columns, int64_t row0,
                 int64_t col0, double scale, double bias, int form, int64_t diagonal, const void* a,
                 const void* b, const void* c, const int32_t* ignore_x, const int32_t* ignore_y,
                 int64_t n, int64_t m, int threads, int64_t* count, double* sum, void* low,
                 void* high, int64_t* col_count, void* col_high) {
  Tile<T> t{};
  t.scale = static_cast<T>(scale);
  t.bias = static_cast<T>(bias);
  t.columns = columns;
  t.col0 = col0;
  t.form = form;
  t.diagonal = diagonal;
  t.a = a;
  t.b = b;
  t.c = c;
  t.ignore_x = ignore_x;
  t.ignore_y = ignore_y;
  all_stats(t, static_cast<const T*>(dot), ld, rows, row0, n, m, threads, count, sum,
            static_cast<T*>(low), static_cast<T*>(high), col_count, static_cast<T*>(col_high));
}

}  // namespace

void pair_stats(const void* dot, int dtype, int64_t ld, int64_t rows, int64_t columns, int64_t row0,
                int64_t col0, double scale, double bias, int form, int64_t diagonal, const void* a,
                const void* b, const void* c, const int32_t* ignore_x, const int32_t* ignore_y,
                int64_t n, int64_t m, int threads, int64_t* count, double* sum, void* low,
                void* high, int64_t* col_count, void* col_high) {
  if (dtype == 0) {
    typed_stats<float>(dot, ld, rows, columns, row0, col0, scale, bias, form, diagonal, a, b, c,
                       ignore_x, ignore_y, n, m, threads, count, sum, low, high, col_count,
                       col_high);
  } else {
    typed_stats<double>(dot, ld, rows, columns, row0, col0, scale, bias, form, diagonal, a, b, c,
                        ignore_x, ignore_y, n, m, threads, count, sum, low, high, col_count,
                        col_high);
  }
}

}  // namespace foveate::FOVEATE_ISA
