#include "topdown_attention.h"
#include "topdown_tile.h"

namespace foveate::FOVEATE_ISA {
namespace {

// Scratch of a thread, in floats: panels of K^T and V^T, of K by columns, a block of queries, of
// slopes of o, of probabilities and of slopes of scores, a tile, the sums of dK and dV.
struct Places {
  int64_t values, columns, queries, slopes, p, ds, tile, dk, dv, total;
};

Places places(int64_t n, int64_t m, int64_t d, bool only_v) {
  const int64_t rows = block_rows(n, m);
  const int64_t width = round_up(d, kPanel);
  const int64_t full = only_v ? 0 : 1;
  Places at{};
  at.values = round_up(m, kPanel) * d;
  at.columns = at.values + full * round_up(m, kPanel) * d;
  at.queries = at.columns + full * m * width;
  at.slopes = at.queries + rows * width;
  at.p = at.slopes + rows * width;
  at.ds = at.p + rows * score_stride(m);
  at.tile = at.ds + full * rows * score_stride(m);
  at.dk = at.tile + kTile * kPanel;
  at.dv = at.dk + full * round_up(m, kTile) * width;
  at.total = at.dv + round_up(m, kTile) * width;
  return at;
}

// The first `count` of `keys` scores become probabilities, the others zero; false if no key is
// allowed.
bool recover_row(float* s, int64_t count, int64_t keys, float lse) {
  if (lse == -kInf) {
    std::fill(s, s + keys, 0.0F);
    return false;
  }
  const int64_t padded = round_up(count, 8);
  std::fill(s + count, s + padded, -kInf);
  const float factor = 1.0F / row_exp(s, padded, lse);
#pragma omp simd
  for (int64_t j = 0; j < padded; ++j) s[j] *= factor;
  if (keys > padded) std::fill(s + padded, s + keys, 0.0F);
  return true;
}

// ds <- p (ds - sum p ds), the slopes of the scores from those of the probabilities.
void slope_row(const float* p, int64_t count, int64_t keys, float* ds) {
  float mean = 0.0F;
#pragma omp simd reduction(+ : mean)
  for (int64_t j = 0; j < count; ++j) mean += p[j] * ds[j];
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) ds[j] = p[j] * (ds[j] - mean);
  if (keys > count) std::fill(ds + count, ds + keys, 0.0F);
}

// sums[keys, d] += left[rows, keys]^T right[rows, d].
void add_across(int64_t rows, int64_t keys, int64_t d, const float* left, int64_t stride,
                const float* right, float* sums) {
  const int64_t width = round_up(d, kPanel);
  for (int64_t first = 0; first < d; first += kPanel) {
    for (int64_t key = 0; key < keys; key += kTile) {
      product<kAdd, true>(d - first, rows, left + key, stride, right + first, width,
                          sums + key * width + first, width, nullptr);
    }
  }
}

template <typename T>
void write_rows(int64_t count, int64_t d, const float* from, float factor, T* to, int64_t stride) {
  const int64_t width = round_up(d, kPanel);
  for (int64_t row = 0; row < count; ++row, from += width, to += stride) {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) to[k] = from_float<T>(from[k] * factor);
  }
}

template <typename T>
struct Slopes {
  const T* o;
  T *q, *k, *v;
  bool only_v;
};

template <typename T>
void differentiate_head(const Layout& at, const Inputs<T>& in, const Slopes<T>& to,
                        const float* lse, int64_t image, int64_t head, float* work) {
  const int64_t n = at.n;
  const int64_t m = at.m;
  const int64_t d = at.d;
  const bool only_v = to.only_v;
  const Places scratch = places(n, m, d, only_v);
  const int64_t stride = score_stride(m);
  const int64_t most = block_rows(n, m);
  const int64_t out_row = at.h * d;
  float* p = work + scratch.p;
  float* ds = work + scratch.ds;
  const int64_t none[3] = {0, 0, 0};
  const auto q = rows_of<T>(in.q, at.q, nullptr, none, in.q_bias, image, head, d);
  const auto k = rows_of<T>(in.k, at.k, nullptr, none, in.k_bias, image, head, d);
  const auto slope = rows_of<T>(to.o, at.out, nullptr, none, nullptr, image, head, d);
  const Mask mask = mask_of(at, in.mask_kind, in.mask, in.causal, image, head);
  // 0 times infinity is NaN: the pairs that a causal mask cuts off count where that can happen.
  bool skips = in.causal && all_finite(q, n, d) && all_finite(k, m, d) && all_finite(slope, n, d);
  pack_transposed(k, m, d, work);
  std::fill(work + scratch.dk, work + scratch.total, 0.0F);
  if (!only_v) {
    const auto v = rows_of<T>(in.v, at.v, in.td, at.td, in.v_bias, image, head, d);
    skips = skips && all_finite(v, m, d);
    pack_transposed(v, m, d, work + scratch.values);
    pack_columns(k, m, d, work + scratch.columns);
  }
  float factor[kMostRows];
  std::fill(factor, factor + kMostRows, in.scale);
  for (int64_t first = 0; first < n; first += most) {
    const int64_t rows = std::min(most, n - first);
    const int64_t keys = skips ? std::min(m, first + rows) : m;
    const Rows<T> asking{q.x + first * q.stride, q.stride, nullptr, 0, q.bias};
    const Rows<T> given{slope.x + first * slope.stride, slope.stride, nullptr, 0, nullptr};
    pack_rows(asking, rows, d, in.scale * kLog2E, work + scratch.queries);
    pack_rows(given, rows, d, 1.0F, work + scratch.slopes);
    score_block(rows, keys, d, work + scratch.queries, work, p, stride);
    if (!only_v) {
      score_block(rows, keys, d, work + scratch.slopes, work + scratch.values, ds, stride);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t query = first + row;
      const int64_t count = in.causal ? std::min(m, query + 1) : m;
      float* s = p + row * stride;
      float* slopes = ds + row * stride;
      if (mask.kind != kNoMask) apply_mask(mask, query, count, s);
      const bool open = recover_row(s, count, keys, lse[(image * at.h + head) * n + query]);
      if (only_v) continue;
      if (open) {
        slope_row(s, count, keys, slopes);
        if (mask.kind != kNoMask) close_masked(mask, query, count, slopes);
      } else {
        std::fill(slopes, slopes + keys, 0.0F);
      }
    }
    add_across(rows, keys, d, p, stride, work + scratch.slopes, work + scratch.dv);
    if (only_v) continue;
    add_across(rows, keys, d, ds, stride, work + scratch.queries, work + scratch.dk);
    weigh_values(rows, keys, m, d, ds, stride, work + scratch.columns, factor, work + scratch.tile,
                 to.q + ((image * n + first) * at.h + head) * d, out_row);
  }
  const int64_t key = (image * m * at.h + head) * d;
  write_rows(m, d, work + scratch.dv, 1.0F, to.v + key, out_row);
  if (!only_v) write_rows(m, d, work + scratch.dk, kLn2, to.k + key, out_row);
}

}  // namespace

std::int64_t topdown_attention_bwd_work(std::int64_t n, std::int64_t m, std::int64_t d,
                                        bool only_v) {
  return places(n, m, d, only_v).total;
}

void topdown_attention_bwd(const std::int64_t* layout, const void* q, const void* k, const void* v,
                           const void* v_td, const void* q_bias, const void* k_bias,
                           const void* v_bias, const void* mask, int mask_kind, const float* lse,
                           const void* slope, int dtype, bool causal, double scale, bool only_v,
                           int threads, float* work, void* q_slope, void* k_slope, void* v_slope) {
  const Layout& at = *reinterpret_cast<const Layout*>(layout);
  const int64_t total = places(at.n, at.m, at.d, only_v).total;
  with_float_type(dtype, [&]<typename T>(T*) {
    const Inputs<T> in{static_cast<const T*>(q),
                       static_cast<const T*>(k),
                       static_cast<const T*>(v),
                       static_cast<const T*>(v_td),
                       static_cast<const T*>(q_bias),
                       static_cast<const T*>(k_bias),
                       static_cast<const T*>(v_bias),
                       mask,
                       mask_kind,
                       causal,
                       static_cast<float>(scale)};
    const Slopes<T> to{static_cast<const T*>(slope), static_cast<T*>(q_slope),
                       static_cast<T*>(k_slope), static_cast<T*>(v_slope), only_v};
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < at.b * at.h; ++task) {
      differentiate_head(at, in, to, lse, task / at.h, task % at.h, work + thread_index() * total);
    }
  });
}

}  // namespace foveate::FOVEATE_ISA
