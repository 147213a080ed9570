#include <cmath>
#include <limits>

#include "logistic.h"
#include "pairwise_loss.h"
#include "pairwise_tile.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr int64_t kBand = 64;    // rows whose column sums stay in T, whatever the number of threads
constexpr int64_t kChain = 128;  // columns whose sums stay in T before they go to double
// Maxima this close to the tile's share one exponential: e^(z - top) serves the row and the column.
constexpr double kShared = 30;

template <typename T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// The larger; NaN if either is.
template <typename T>
[[gnu::always_inline]] inline T larger(T a, T b) {
  return b > a || b != b ? b : a;
}

// Where the exponent is taken from; of nothing any number serves.
template <typename T>
[[gnu::always_inline]] inline T origin(T high) {
  return high == -kInfinity<T> ? T(0) : high;
}

// A row's kept logits: all of one id are left out, the positive is not among them.
template <typename T>
struct Row {
  T scale;
  const int32_t* ids;  // [columns of the tile], or null
  int32_t id;
};

template <bool Ignore, typename T>
[[gnu::always_inline]] inline T logit(const Row<T>& row, const T* dot, int64_t j) {
  const T z = row.scale * dot[j];
  if constexpr (Ignore) return row.ids[j] == row.id ? -kInfinity<T> : z;
  return z;
}

// z - origin with one rounding.
template <bool Ignore, typename T>
[[gnu::always_inline]] inline T exponent(const Row<T>& row, const T* dot, int64_t j, T from) {
  const T u = madd(row.scale, dot[j], -from);
  if constexpr (Ignore) return row.ids[j] == row.id ? -kInfinity<T> : u;
  return u;
}

// Largest logit of the run [from, to), also of each column.
template <bool Ignore, bool Columns, typename T>
T run_high(const Row<T>& row, const T* dot, int64_t from, int64_t to, T* col_high) {
  constexpr int64_t kLanes = 16;
  T lane[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lane[l] = -kInfinity<T>;
  int64_t j = from;
  for (; j + kLanes <= to; j += kLanes) {
#pragma omp simd
    for (int64_t l = 0; l < kLanes; ++l) {
      const T z = logit<Ignore>(row, dot, j + l);
      lane[l] = larger(lane[l], z);
      if constexpr (Columns) col_high[j + l] = larger(col_high[j + l], z);
    }
  }
  for (; j < to; ++j) {
    const T z = logit<Ignore>(row, dot, j);
    lane[0] = larger(lane[0], z);
    if constexpr (Columns) col_high[j] = larger(col_high[j], z);
  }
  T high = -kInfinity<T>;
  for (int64_t l = 0; l < kLanes; ++l) high = larger(high, lane[l]);
  return high;
}

// Sum of e^(z - from_row) over a run; adds e^(z - its column's origin) to each column.
template <bool Ignore, bool Columns, bool Shared, typename T>
double run_sum(const Row<T>& row, const T* dot, int64_t from, int64_t to, T row_origin,
               const T* col_high, T* col_sum) {
  double total = 0;
  for (int64_t j0 = from; j0 < to; j0 += kChain) {
    const int64_t end = to - j0 < kChain ? to : j0 + kChain;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = j0; j < end; ++j) {
      const T e = exp_(exponent<Ignore>(row, dot, j, row_origin));
      sum += e;
      if constexpr (Columns && Shared) col_sum[j] += e;
      if constexpr (Columns && !Shared) {
        col_sum[j] += exp_(exponent<Ignore>(row, dot, j, origin(col_high[j])));
      }
    }
    total += double(sum);
  }
  return total;
}

// g = a e^(z - row_origin) + b_j e^(z - col_origin_j) in place; with Shared one exponential.
// Returns the sum of g dot.
template <bool Ignore, bool Rows, bool Columns, bool Shared, typename T>
double run_grad(const Row<T>& row, T* dot, int64_t from, int64_t to, T a, T row_origin, const T* b,
                const T* col_origin) {
  double total = 0;
  for (int64_t j0 = from; j0 < to; j0 += kChain) {
    const int64_t end = to - j0 < kChain ? to : j0 + kChain;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = j0; j < end; ++j) {
      const T d = dot[j];
      T g = 0;
      if constexpr (Shared) {
        T factor = 0;
        if constexpr (Rows) factor += a;
        if constexpr (Columns) factor += b[j];
        g = exp_(madd(row.scale, d, -row_origin)) * factor;
      } else {
        if constexpr (Rows) g += a * exp_(madd(row.scale, d, -row_origin));
        if constexpr (Columns) g += b[j] * exp_(madd(row.scale, d, -col_origin[j]));
      }
      if constexpr (Ignore) g = row.ids[j] == row.id ? T(0) : g;
      sum = madd(g, d, sum);
      dot[j] = g;
    }
    total += double(sum);
  }
  return total;
}

// Adds sum e^high to a running (maximum, sum of e^(z - maximum)).
void merge(double& maximum, double& total, double high, double sum) {
  const double top = larger(maximum, high);
  total = (total == 0 ? 0.0 : total * std::exp(maximum - top)) +
          (sum == 0 ? 0.0 : sum * std::exp(high - top));
  maximum = top;
}

template <typename T>
Row<T> row_of(const Tile<T>& t, int64_t row) {
  if (!t.ignore_x) return {t.scale, nullptr, 0};
  return {t.scale, t.ignore_y + t.col0, t.ignore_x[row]};
}

template <bool Ignore, bool Columns, typename T>
void tile_lse(const Tile<T>& t, const T* dot, int64_t ld, int64_t rows, int64_t row0, int threads,
              T* work, double* row_max, double* row_sum, double* row_positive, double* col_max,
              double* col_sum) {
  const int64_t bands = (rows + kBand - 1) / kBand;
  const int64_t width = t.columns;
  T* row_high = work + bands * width;
  T* col_high = row_high + rows;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t band = 0; band < bands; ++band) {
    T* high = work + band * width;
    if constexpr (Columns) {
      for (int64_t j = 0; j < width; ++j) high[j] = -kInfinity<T>;
    }
    const int64_t stop = rows < (band + 1) * kBand ? rows : (band + 1) * kBand;
    for (int64_t i = band * kBand; i < stop; ++i) {
      const Row<T> row = row_of(t, row0 + i);
      const T* line = dot + i * ld;
      const int64_t at = positive_of(t, row0 + i);
      const int64_t split = at < 0 ? width : at;
      T best = run_high<Ignore, Columns>(row, line, 0, split, high);
      if (at >= 0) {
        const T z = t.scale * line[at];
        row_positive[row0 + i] = double(z);
        if constexpr (Columns) high[at] = larger(high[at], z);
        best = larger(best, z);
        best = larger(best, run_high<Ignore, Columns>(row, line, at + 1, width, high));
      }
      row_high[i] = best;
    }
  }
  T top = -kInfinity<T>;
  for (int64_t i = 0; i < rows; ++i) top = larger(top, row_high[i]);
  bool shared = std::abs(top) < kInfinity<T>;
  const T least = top - T(kShared);
  for (int64_t i = 0; i < rows; ++i) {
    shared = shared && (row_high[i] >= least || row_high[i] == -kInfinity<T>);
  }
  if constexpr (Columns) {
    for (int64_t j = 0; j < width; ++j) col_high[j] = -kInfinity<T>;
    for (int64_t band = 0; band < bands; ++band) {
      const T* high = work + band * width;
      for (int64_t j = 0; j < width; ++j) col_high[j] = larger(col_high[j], high[j]);
    }
    for (int64_t j = 0; j < width; ++j) {
      shared = shared && (col_high[j] >= least || col_high[j] == -kInfinity<T>);
    }
  }
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t band = 0; band < bands; ++band) {
    T* sums = work + band * width;
    if constexpr (Columns) {
      for (int64_t j = 0; j < width; ++j) sums[j] = T(0);
    }
    const int64_t stop = rows < (band + 1) * kBand ? rows : (band + 1) * kBand;
    for (int64_t i = band * kBand; i < stop; ++i) {
      const Row<T> row = row_of(t, row0 + i);
      const T* line = dot + i * ld;
      const int64_t at = positive_of(t, row0 + i);
      const int64_t split = at < 0 ? width : at;
      const T from = shared ? top : origin(row_high[i]);
      double sum = 0;
      for (int part = 0; part < 2; ++part) {
        const int64_t begin = part == 0 ? 0 : split + 1;
        const int64_t end = part == 0 ? split : width;
        sum += shared
                   ? run_sum<Ignore, Columns, true>(row, line, begin, end, from, col_high, sums)
                   : run_sum<Ignore, Columns, false>(row, line, begin, end, from, col_high, sums);
      }
      const double own = double(origin(row_high[i]));
      if (sum != 0) sum *= std::exp(double(from) - own);
      if (at >= 0) sum += std::exp(row_positive[row0 + i] - own);
      merge(row_max[row0 + i], row_sum[row0 + i], double(row_high[i]), sum);
    }
  }
  if constexpr (Columns) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t j = 0; j < width; ++j) {
      const double own = double(origin(col_high[j]));
      const double from = shared ? double(top) : own;
      double sum = 0;
      for (int64_t band = 0; band < bands; ++band) sum += double(work[band * width + j]);
      const int64_t i = t.col0 + j - t.diagonal - row0;
      if (sum != 0) sum *= std::exp(from - own);
      if (t.form == 1 && i >= 0 && i < rows) sum += std::exp(row_positive[row0 + i] - own);
      merge(col_max[t.col0 + j], col_sum[t.col0 + j], double(col_high[j]), sum);
    }
  }
}

// e^(from - r) times the row's or column's factor, and what its exponent is taken from.
template <typename T>
struct Side {
  const T* state;   // [., 2]: log of the sum of e^z, high and low part
  const T* factor;  // [.], or null: the side takes no part
};

template <bool Ignore, bool Rows, bool Columns, bool Shared, typename T>
void grad_rows(const Tile<T>& t, T* dot, int64_t ld, int64_t rows, int64_t row0, double top,
               Side<T> by_row, Side<T> by_col, const T* b, const T* col_origin, int threads,
               double* row_gdot) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t global = row0 + i;
    const Row<T> row = row_of(t, global);
    T* line = dot + i * ld;
    const int64_t at = positive_of(t, global);
    const int64_t split = at < 0 ? t.columns : at;
    T a = 0, from = static_cast<T>(top);
    if constexpr (Rows) {
      const double high = double(by_row.state[2 * global]);
      const double rest = double(by_row.state[2 * global + 1]);
      const double start = Shared ? top : high;
      from = static_cast<T>(start);
      a = static_cast<T>(double(by_row.factor[global]) * std::exp((start - high) - rest));
    }
    double gdot =
        run_grad<Ignore, Rows, Columns, Shared>(row, line, 0, split, a, from, b, col_origin);
    if (at >= 0) {
      const T d = line[at];
      const double z = double(t.scale * d);
      double g = 0;
      if constexpr (Rows) {
        g += double(by_row.factor[global]) * std::expm1((z - double(by_row.state[2 * global])) -
                                                        double(by_row.state[2 * global + 1]));
      }
      if constexpr (Columns) {
        const int64_t column = t.col0 + at;
        g += double(by_col.factor[column]) * std::expm1((z - double(by_col.state[2 * column])) -
                                                        double(by_col.state[2 * column + 1]));
      }
      line[at] = static_cast<T>(g);
      gdot += g * double(d);
      gdot += run_grad<Ignore, Rows, Columns, Shared>(row, line, at + 1, t.columns, a, from, b,
                                                      col_origin);
    }
    row_gdot[global] += gdot;
  }
}

template <bool Ignore, bool Rows, bool Columns, typename T>
void tile_grad(const Tile<T>& t, T* dot, int64_t ld, int64_t rows, int64_t row0, Side<T> by_row,
               Side<T> by_col, int threads, T* work, double* row_gdot) {
  T top = -kInfinity<T>, low = kInfinity<T>;
  if constexpr (Rows) {
    for (int64_t i = row0; i < row0 + rows; ++i) {
      const T high = by_row.state[2 * i];
      top = larger(top, high);
      low = high < low ? high : low;
    }
  }
  if constexpr (Columns) {
    for (int64_t j = t.col0; j < t.col0 + t.columns; ++j) {
      const T high = by_col.state[2 * j];
      top = larger(top, high);
      low = high < low ? high : low;
    }
  }
  const bool shared =
      std::abs(top) < kInfinity<T> && low > -kInfinity<T> && top - low <= T(kShared);
  T* b = work;
  T* col_origin = work + t.columns;
  if constexpr (Columns) {
    for (int64_t j = 0; j < t.columns; ++j) {
      const double high = double(by_col.state[2 * (t.col0 + j)]);
      const double rest = double(by_col.state[2 * (t.col0 + j) + 1]);
      const double start = shared ? double(top) : high;
      col_origin[j] = static_cast<T>(start);
      b[j] = static_cast<T>(double(by_col.factor[t.col0 + j]) * std::exp((start - high) - rest));
    }
  }
  if (shared) {
    grad_rows<Ignore, Rows, Columns, true>(t, dot, ld, rows, row0, double(top), by_row, by_col, b,
                                           col_origin, threads, row_gdot);
  } else {
    grad_rows<Ignore, Rows, Columns, false>(t, dot, ld, rows, row0, 0.0, by_row, by_col, b,
                                            col_origin, threads, row_gdot);
  }
}

template <typename T>
Tile<T> plain_tile(double scale, int64_t columns, int64_t col0, int form, int64_t diagonal,
                   const void* a, const int32_t* ignore_x, const int32_t* ignore_y) {
  Tile<T> t{};
  t.scale = static_cast<T>(scale);
  t.columns = columns;
  t.col0 = col0;
  t.form = form;
  t.diagonal = diagonal;
  t.a = a;
  t.ignore_x = ignore_x;
  t.ignore_y = ignore_y;
  return t;
}

template <typename T>
void typed_lse(const Tile<T>& t, const void* dot, int64_t ld, int64_t rows, int64_t row0,
               bool symmetric, int threads, void* work, double* row_max, double* row_sum,
               double* row_positive, double* col_max, double* col_sum) {
  const T* tile = static_cast<const T*>(dot);
  T* room = static_cast<T*>(work);
  if (t.ignore_x && symmetric) {
    tile_lse<true, true>(t, tile, ld, rows, row0, threads, room, row_max, row_sum, row_positive,
                         col_max, col_sum);
  } else if (t.ignore_x) {
    tile_lse<true, false>(t, tile, ld, rows, row0, threads, room, row_max, row_sum, row_positive,
                          col_max, col_sum);
  } else if (symmetric) {
    tile_lse<false, true>(t, tile, ld, rows, row0, threads, room, row_max, row_sum, row_positive,
                          col_max, col_sum);
  } else {
    tile_lse<false, false>(t, tile, ld, rows, row0, threads, room, row_max, row_sum, row_positive,
                           col_max, col_sum);
  }
}

template <bool Ignore, typename T>
void by_sides(const Tile<T>& t, T* dot, int64_t ld, int64_t rows, int64_t row0, Side<T> by_row,
              Side<T> by_col, int threads, T* work, double* row_gdot) {
  if (by_row.factor && by_col.factor) {
    tile_grad<Ignore, true, true>(t, dot, ld, rows, row0, by_row, by_col, threads, work, row_gdot);
  } else if (by_row.factor) {
    tile_grad<Ignore, true, false>(t, dot, ld, rows, row0, by_row, by_col, threads, work, row_gdot);
  } else {
    tile_grad<Ignore, false, true>(t, dot, ld, rows, row0, by_row, by_col, threads, work, row_gdot);
  }
}

template <typename T>
void typed_grad(const Tile<T>& t, void* dot, int64_t ld, int64_t rows, int64_t row0,
                const void* row_state, const void* row_factor, const void* col_state,
                const void* col_factor, int threads, void* work, double* row_gdot) {
  const Side<T> by_row{static_cast<const T*>(row_state), static_cast<const T*>(row_factor)};
  const Side<T> by_col{static_cast<const T*>(col_state), static_cast<const T*>(col_factor)};
  T* tile = static_cast<T*>(dot);
  T* room = static_cast<T*>(work);
  if (t.ignore_x) {
    by_sides<true>(t, tile, ld, rows, row0, by_row, by_col, threads, room, row_gdot);
  } else {
    by_sides<false>(t, tile, ld, rows, row0, by_row, by_col, threads, room, row_gdot);
  }
}

}  // namespace

void info_nce_lse(const void* dot, int dtype, int64_t ld, int64_t rows, int64_t columns,
                  int64_t row0, int64_t col0, double scale, int form, int64_t diagonal,
                  const void* a, const int32_t* ignore_x, const int32_t* ignore_y, bool symmetric,
                  int threads, void* work, double* row_max, double* row_sum, double* row_positive,
                  double* col_max, double* col_sum) {
  if (dtype == 0) {
    typed_lse(plain_tile<float>(scale, columns, col0, form, diagonal, a, ignore_x, ignore_y), dot,
              ld, rows, row0, symmetric, threads, work, row_max, row_sum, row_positive, col_max,
              col_sum);
  } else {
    typed_lse(plain_tile<double>(scale, columns, col0, form, diagonal, a, ignore_x, ignore_y), dot,
              ld, rows, row0, symmetric, threads, work, row_max, row_sum, row_positive, col_max,
              col_sum);
  }
}

void info_nce_grad(void* dot, int dtype, int64_t ld, int64_t rows, int64_t columns, int64_t row0,
                   int64_t col0, double scale, int form, int64_t diagonal, const void* a,
                   const int32_t* ignore_x, const int32_t* ignore_y, const void* row_state,
                   const void* row_factor, const void* col_state, const void* col_factor,
                   int threads, void* work, double* row_gdot) {
  if (dtype == 0) {
    typed_grad(plain_tile<float>(scale, columns, col0, form, diagonal, a, ignore_x, ignore_y), dot,
               ld, rows, row0, row_state, row_factor, col_state, col_factor, threads, work,
               row_gdot);
  } else {
    typed_grad(plain_tile<double>(scale, columns, col0, form, diagonal, a, ignore_x, ignore_y), dot,
               ld, rows, row0, row_state, row_factor, col_state, col_factor, threads, work,
               row_gdot);
  }
}

}  // namespace foveate::FOVEATE_ISA
