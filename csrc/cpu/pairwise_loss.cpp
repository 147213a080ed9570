#include "pairwise_loss.h"

#include "logistic.h"
#include "pairwise_tile.h"

namespace foveate::FOVEATE_ISA {
namespace {

template <typename T>
struct Sums {
  double loss = 0;
  double g = 0;
  double gdot = 0;
};

// n negatives of one weight.
template <int Focal, bool Loss, bool Grad, typename T>
void negatives(const Tile<T>& t, T* dot, int64_t n, T weight, Sums<T>& sums) {
  T loss = 0, g_sum = 0, gdot = 0;
#pragma omp simd reduction(+ : loss, g_sum, gdot)
  for (int64_t j = 0; j < n; ++j) {
    const T d = dot[j];
    T value = 0, slope = 0;
    logistic<Focal, Loss, Grad>(madd(t.scale, d, t.bias), t.gamma, value, slope);
    if constexpr (Loss) loss += value;
    if constexpr (Grad) {
      const T g = weight * slope;
      g_sum += g;
      gdot = madd(g, d, gdot);
      dot[j] = g;
    }
  }
  if (weight != T(0)) sums.loss += double(weight) * double(loss);
  sums.g += double(g_sum);
  sums.gdot += double(gdot);
}

// n pairs of which those of the row's id are positive.
template <int Focal, bool Loss, bool Grad, typename T>
void labelled(const Tile<T>& t, T* dot, int64_t n, const int32_t* ids, int32_t id, T positive,
              T negative, Sums<T>& sums) {
  T loss = 0, g_sum = 0, gdot = 0;
#pragma omp simd reduction(+ : loss, g_sum, gdot)
  for (int64_t j = 0; j < n; ++j) {
    const T d = dot[j];
    const bool match = ids[j] == id;
    const T z = madd(t.scale, d, t.bias);
    const T weight = match ? positive : negative;
    T value = 0, slope = 0;
    logistic<Focal, Loss, Grad>(match ? -z : z, t.gamma, value, slope);
    if constexpr (Loss) loss += weight != T(0) ? weight * value : T(0);
    if constexpr (Grad) {
      const T g = (match ? -weight : weight) * slope;
      g_sum += g;
      gdot = madd(g, d, gdot);
      dot[j] = g;
    }
  }
  sums.loss += double(loss);
  sums.g += double(g_sum);
  sums.gdot += double(gdot);
}

// n pairs with a weight each as a positive and as a negative.
template <int Focal, bool Loss, bool Grad, typename T>
void weighted(const Tile<T>& t, T* dot, int64_t n, const T* positive, const T* negative,
              Sums<T>& sums) {
  T loss = 0, g_sum = 0, gdot = 0;
#pragma omp simd reduction(+ : loss, g_sum, gdot)
  for (int64_t j = 0; j < n; ++j) {
    const T d = dot[j];
    const T z = madd(t.scale, d, t.bias);
    const T p = positive[j];
    const T q = negative[j];
    T up = 0, up_slope = 0, down = 0, down_slope = 0;
    logistic<Focal, Loss, Grad>(-z, t.gamma, up, up_slope);
    logistic<Focal, Loss, Grad>(z, t.gamma, down, down_slope);
    if constexpr (Loss) loss += (p != T(0) ? p * up : T(0)) + (q != T(0) ? q * down : T(0));
    if constexpr (Grad) {
      const T g = q * down_slope - p * up_slope;
      g_sum += g;
      gdot = madd(g, d, gdot);
      dot[j] = g;
    }
  }
  sums.loss += double(loss);
  sums.g += double(g_sum);
  sums.gdot += double(gdot);
}

// Weights of the n pairs from column j0 of the tile; i is the row in the tile.
template <typename T>
void fill_weights(const Tile<T>& t, int64_t i, int64_t row, int64_t j0, int64_t n, T row_weight,
                  T* positive, T* negative) {
  const T p = t.pos_weight;
  const T q = t.neg_weight;
  const int64_t first = t.col0 + j0;
  // The target stands in `positive` until the loop below.
  fill_targets(t, i, row, j0, n, positive);
  const T share = t.row_share ? t.row_share[row] : T(1);
  for (int64_t j = 0; j < n; ++j) {
    T weight = row_weight;
    if (t.col_weight) weight *= t.col_weight[first + j];
    const T target = positive[j];
    T keep = T(1);
    if (t.ignore_x) keep = t.ignore_y[first + j] == t.ignore_x[row] && target == T(0) ? T(0) : T(1);
    const T one = t.col_share ? share + t.col_share[first + j] : share;
    positive[j] = p * target * one * weight;
    negative[j] = q * (T(1) - target) * weight * keep;
  }
}

template <int Focal, bool Loss, bool Grad, typename T>
void one_row(const Tile<T>& t, T* dot, int64_t i, int64_t row, Sums<T>& sums) {
  const T row_weight = t.row_weight ? t.row_weight[row] : T(1);
  const bool general = t.form == 4 || t.ignore_x || t.col_weight || t.col_share;
  if (general) {
    T positive[kBlock], negative[kBlock];
    for (int64_t j = 0; j < t.columns; j += kBlock) {
      const int64_t n = t.columns - j < kBlock ? t.columns - j : kBlock;
      fill_weights(t, i, row, j, n, row_weight, positive, negative);
      weighted<Focal, Loss, Grad>(t, dot + j, n, positive, negative, sums);
    }
    return;
  }
  const T q = t.neg_weight * row_weight;
  if (t.form == 3) {
    const int32_t id = static_cast<const int32_t*>(t.a)[row];
    const int32_t* ids = static_cast<const int32_t*>(t.b) + t.col0;
    const T p = t.pos_weight * row_weight * (t.row_share ? t.row_share[row] : T(1));
    for (int64_t j = 0; j < t.columns; j += kBlock) {
      const int64_t n = t.columns - j < kBlock ? t.columns - j : kBlock;
      labelled<Focal, Loss, Grad>(t, dot + j, n, ids + j, id, p, q, sums);
    }
    return;
  }
  // Runs of negatives between the row's entries.
  const int64_t* at = nullptr;
  int64_t entry = 0, end = 0;
  const int64_t single = positive_of(t, row);
  if (t.form == 5) {
    const int64_t* starts = static_cast<const int64_t*>(t.a);
    at = static_cast<const int64_t*>(t.b);
    entry = first_entry(at, starts[row], starts[row + 1], t.col0);
    end = first_entry(at, entry, starts[row + 1], t.col0 + t.columns);
  } else if (single >= 0) {
    end = 1;
  }
  int64_t j = 0;
  for (; j < t.columns; ++j) {
    int64_t stop = t.columns;
    if (entry < end) stop = at ? at[entry] - t.col0 : single;
    for (; j < stop; j += kBlock < stop - j ? kBlock : stop - j) {
      negatives<Focal, Loss, Grad>(t, dot + j, kBlock < stop - j ? kBlock : stop - j, q, sums);
    }
    if (j == t.columns) break;
    const T target = at ? static_cast<const T*>(t.c)[entry] : T(1);
    const T p = t.pos_weight * target * row_weight;
    const T rest = t.neg_weight * (T(1) - target) * row_weight;
    weighted<Focal, Loss, Grad>(t, dot + j, 1, &p, &rest, sums);
    ++entry;
  }
}

template <int Focal, bool Loss, bool Grad, typename T>
void all_rows(const Tile<T>& t, T* dot, int64_t ld, int64_t rows, int64_t row0, int threads,
              double* row_loss, double* row_g, double* row_gdot) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t i = 0; i < rows; ++i) {
    Sums<T> sums;
    one_row<Focal, Loss, Grad>(t, dot + i * ld, i, row0 + i, sums);
    row_loss[row0 + i] += sums.loss;
    row_g[row0 + i] += sums.g;
    row_gdot[row0 + i] += sums.gdot;
  }
}

template <int Focal, typename T>
void by_outputs(const Tile<T>& t, T* dot, int64_t ld, int64_t rows, int64_t row0, bool loss,
                bool grad, int threads, double* row_loss, double* row_g, double* row_gdot) {
  if (loss && grad) {
    all_rows<Focal, true, true>(t, dot, ld, rows, row0, threads, row_loss, row_g, row_gdot);
  } else if (grad) {
    all_rows<Focal, false, true>(t, dot, ld, rows, row0, threads, row_loss, row_g, row_gdot);
  } else {
    all_rows<Focal, true, false>(t, dot, ld, rows, row0, threads, row_loss, row_g, row_gdot);
  }
}

}  // namespace

#define FOVEATE_SIGMOID(T)                                                                         \
  {                                                                                                \
    const Tile<T> t{static_cast<T>(scale),                                                         \
                    static_cast<T>(bias),                                                          \
                    static_cast<T>(gamma),                                                         \
                    columns,                                                                       \
                    col0,                                                                          \
                    form,                                                                          \
                    diagonal,                                                                      \
                    a,                                                                             \
                    b,                                                                             \
                    c,                                                                             \
                    ignore_x,                                                                      \
                    ignore_y,                                                                      \
                    static_cast<const T*>(row_share),                                              \
                    static_cast<const T*>(col_share),                                              \
                    static_cast<const T*>(row_weight),                                             \
                    static_cast<const T*>(col_weight),                                             \
                    static_cast<T>(pos_weight),                                                    \
                    static_cast<T>(neg_weight)};                                                   \
    T* tile = static_cast<T*>(dot);                                                                \
    if (gamma == 0) {                                                                              \
      by_outputs<kPlain>(t, tile, ld, rows, row0, loss, grad, threads, row_loss, row_g, row_gdot); \
    } else if (gamma == 2) {                                                                       \
      by_outputs<kSquare>(t, tile, ld, rows, row0, loss, grad, threads, row_loss, row_g,           \
                          row_gdot);                                                               \
    } else {                                                                                       \
      by_outputs<kGeneral>(t, tile, ld, rows, row0, loss, grad, threads, row_loss, row_g,          \
                           row_gdot);                                                              \
    }                                                                                              \
  }

void sigmoid_loss_fwd(void* dot, int dtype, int64_t ld, int64_t rows, int64_t columns, int64_t row0,
                      int64_t col0, double scale, double bias, int form, int64_t diagonal,
                      const void* a, const void* b, const void* c, const int32_t* ignore_x,
                      const int32_t* ignore_y, const void* row_share, const void* col_share,
                      const void* row_weight, const void* col_weight, double pos_weight,
                      double neg_weight, double gamma, bool loss, bool grad, int threads,
                      double* row_loss, double* row_g, double* row_gdot) {
  if (dtype == 0) {
    FOVEATE_SIGMOID(float)
  } else {
    FOVEATE_SIGMOID(double)
  }
}

}  // namespace foveate::FOVEATE_ISA
