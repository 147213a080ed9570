// The pairs of a tile, as the kernels of pairwise_loss read them. Internal linkage only: the header
// is compiled into every instruction set.
#pragma once

#include <cstdint>

namespace foveate::FOVEATE_ISA {
namespace {

using std::int32_t;
using std::int64_t;

constexpr int64_t kBlock = 512;  // columns whose sums stay in T before they go to double

// Everything that does not change within a tile.
template <typename T>
struct Tile {
  T scale, bias, gamma;
  int64_t columns, col0;
  int form;
  int64_t diagonal;
  const void *a, *b, *c;
  const int32_t *ignore_x, *ignore_y;
  const T *row_share, *col_share, *row_weight, *col_weight;
  T pos_weight, neg_weight;
};

// The first of a row's entries at a column of at least `column`.
[[maybe_unused]] int64_t first_entry(const int64_t* columns, int64_t begin, int64_t end,
                                     int64_t column) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (columns[middle] < column) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Column within the tile of the row's one positive; -1 if it has none here.
template <typename T>
[[maybe_unused]] int64_t positive_of(const Tile<T>& t, int64_t row) {
  int64_t column = -1;
  if (t.form == 1) column = row + t.diagonal - t.col0;
  if (t.form == 2) {
    const int64_t at = static_cast<const int32_t*>(t.a)[row];
    column = at < 0 ? -1 : at - t.col0;
  }
  return column >= 0 && column < t.columns ? column : -1;
}

// Targets of the n pairs from column j0 of the tile; i is the row in the tile.
template <typename T>
[[maybe_unused]] void fill_targets(const Tile<T>& t, int64_t i, int64_t row, int64_t j0, int64_t n,
                                   T* out) {
  const int64_t first = t.col0 + j0;
  for (int64_t j = 0; j < n; ++j) out[j] = T(0);
  if (t.form == 1 || t.form == 2) {
    const int64_t at = positive_of(t, row) - j0;
    if (at >= 0 && at < n) out[at] = T(1);
  } else if (t.form == 3) {
    const int32_t id = static_cast<const int32_t*>(t.a)[row];
    const int32_t* ids = static_cast<const int32_t*>(t.b) + first;
    for (int64_t j = 0; j < n; ++j) out[j] = ids[j] == id ? T(1) : T(0);
  } else if (t.form == 4) {
    const T* target = static_cast<const T*>(t.a) + i * t.columns + j0;
    for (int64_t j = 0; j < n; ++j) out[j] = target[j];
  } else if (t.form == 5) {
    const int64_t* starts = static_cast<const int64_t*>(t.a);
    const int64_t* at = static_cast<const int64_t*>(t.b);
    const T* target = static_cast<const T*>(t.c);
    const int64_t end = starts[row + 1];
    for (int64_t e = first_entry(at, starts[row], end, first); e < end && at[e] < first + n; ++e) {
      out[at[e] - first] = target[e];
    }
  }
}

}  // namespace
}  // namespace foveate::FOVEATE_ISA
