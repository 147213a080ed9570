#include "topdown_attention.h"
#include "topdown_tile.h"

namespace foveate::FOVEATE_ISA {
namespace {

// Scratch of a thread, in floats: panels of K^T and of V, a block of queries, of scores, a tile.
struct Places {
  int64_t keys, values, queries, scores, tile, total;
};

Places places(int64_t n, int64_t m, int64_t d) {
  const int64_t rows = block_rows(n, m);
  const int64_t width = round_up(d, kPanel);
  Places at{};
  at.values = round_up(m, kPanel) * d;
  at.queries = at.values + m * width;
  at.scores = at.queries + rows * width;
  at.tile = at.scores + rows * score_stride(m);
  at.total = at.tile + kTile * kPanel;
  return at;
}

// The first `count` of `keys` scores become probabilities but for the factor that is returned; the
// others are zero. A row without an allowed key is zero, and so is its factor.
float softmax_row(float* s, int64_t count, int64_t keys, float* lse) {
  const int64_t padded = round_up(count, 8);
  std::fill(s + count, s + padded, -kInf);
  float high = row_high(s, padded);
  if (high == -kInf) {
    bool closed = true;
    for (int64_t j = 0; j < count; ++j) closed &= s[j] == -kInf;
    if (closed) {
      std::fill(s, s + round_up(keys, 8), 0.0F);
      if (lse != nullptr) *lse = -kInf;
      return 0.0F;
    }
    high = std::numeric_limits<float>::quiet_NaN();  // the maximum passed over a NaN
  }
  const float sum = row_exp(s, padded, high);
  if (keys > padded) std::fill(s + padded, s + keys, 0.0F);
  if (lse != nullptr) *lse = high + std::log2(sum);
  return 1.0F / sum;
}

template <typename T>
void attend_head(const Layout& at, const Inputs<T>& in, int64_t image, int64_t head, float* work,
                 T* out, float* lse) {
  const int64_t n = at.n;
  const int64_t m = at.m;
  const int64_t d = at.d;
  const Places scratch = places(n, m, d);
  const int64_t stride = score_stride(m);
  const int64_t most = block_rows(n, m);
  float* scores = work + scratch.scores;
  const int64_t none[3] = {0, 0, 0};
  const auto q = rows_of<T>(in.q, at.q, nullptr, none, in.q_bias, image, head, d);
  const auto k = rows_of<T>(in.k, at.k, nullptr, none, in.k_bias, image, head, d);
  const auto v = rows_of<T>(in.v, at.v, in.td, at.td, in.v_bias, image, head, d);
  const Mask mask = mask_of(at, in.mask_kind, in.mask, in.causal, image, head);
  const bool skips = in.causal && all_finite(v, m, d);  // 0 times infinity is NaN
  pack_transposed(k, m, d, work);
  pack_columns(v, m, d, work + scratch.values);
  T* to = out + place(at.out, image, head);
  float factor[kMostRows] = {};
  for (int64_t first = 0; first < n; first += most) {
    const int64_t rows = std::min(most, n - first);
    const int64_t keys = skips ? std::min(m, first + rows) : m;
    const Rows<T> asking{q.x + first * q.stride, q.stride, nullptr, 0, q.bias};
    pack_rows(asking, rows, d, in.scale * kLog2E, work + scratch.queries);
    score_block(rows, keys, d, work + scratch.queries, work, scores, stride);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t query = first + row;
      const int64_t count = in.causal ? std::min(m, query + 1) : m;
      float* s = scores + row * stride;
      if (mask.kind != kNoMask) apply_mask(mask, query, count, s);
      factor[row] = softmax_row(s, count, keys,
                                lse == nullptr ? nullptr : lse + (image * at.h + head) * n + query);
    }
    weigh_values(rows, keys, m, d, scores, stride, work + scratch.values, factor,
                 work + scratch.tile, to + first * at.out[2], at.out[2]);
  }
}

}  // namespace

std::int64_t topdown_attention_fwd_work(std::int64_t n, std::int64_t m, std::int64_t d) {
  return places(n, m, d).total;
}

void topdown_attention_fwd(const std::int64_t* layout, const void* q, const void* k, const void* v,
                           const void* v_td, const void* q_bias, const void* k_bias,
                           const void* v_bias, const void* mask, int mask_kind, int dtype,
                           bool causal, double scale, int threads, float* work, void* out,
                           float* lse) {
  const Layout& at = *reinterpret_cast<const Layout*>(layout);
  const int64_t total = places(at.n, at.m, at.d).total;
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
    T* to = static_cast<T*>(out);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < at.b * at.h; ++task) {
      attend_head(at, in, task / at.h, task % at.h, work + thread_index() * total, to, lse);
    }
  });
}

}  // namespace foveate::FOVEATE_ISA
