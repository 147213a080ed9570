// Selection of tokens by a prompt, and attention over v + v_td: CPU kernels.
#pragma once

#include <cstdint>

#include "isa.h"

// No result depends on the thread count: a task is a block of 64 rows of one image (prompt_select,
// sums in float64 in a fixed order), or one head of one image (attention, scores in float32).
FOVEATE_PER_ISA(
    // Row blocks of an image of n rows.
    std::int64_t prompt_select_blocks(std::int64_t n);

    // m = clamp(cos(x, p), 0, 1) and z = m x.
    void prompt_select_fwd(const void* x,  // T [b, n, c]
                           int dtype,
                           const void* prompt,  // T [c], or [b, c] if per_image
                           bool per_image, std::int64_t b, std::int64_t n, std::int64_t c,
                           double eps, int threads,
                           double* unit,  // [b or 1, c + 1]: p / max(|p|, eps), |p|
                           // outputs
                           void* z,          // T [b, n, c]
                           void* mask,       // T [b, n]
                           double* cosine,   // [b, n]
                           double* length);  // [b, n]: |x|

    // Gradients of x and p from those of z and m.
    void prompt_select_bwd(const void* x, int dtype,
                           const double* unit,    // as prompt_select_fwd wrote it
                           const double* cosine,  // [b, n]
                           const double* length,  // [b, n]
                           bool per_image, std::int64_t b, std::int64_t n, std::int64_t c,
                           double eps,
                           const void* z_slope,     // T [b, n, c]
                           const void* mask_slope,  // T [b, n], or null
                           int threads,
                           double* partial,  // [b, blocks, c + 1], or null: no gradient of p
                           // outputs
                           void* x_slope,        // T [b, n, c], or null
                           void* prompt_slope);  // T like prompt, or null

    // Floats of scratch that a thread of topdown_attention_fwd needs.
    std::int64_t topdown_attention_fwd_work(std::int64_t n, std::int64_t m, std::int64_t d);

    // o = softmax(scale (q + q_bias) (k + k_bias)^T + mask) (v + v_td + v_bias); zeros where no key
    // is allowed. `out` may be the memory of v: a head's values are read before it is written.
    void topdown_attention_fwd(const std::int64_t* layout,  // [24], struct Layout
                               const void* q,               // T [b, h, n, d]
                               const void* k,               // T [b, h, m, d]
                               const void* v,               // T [b, h, m, d]
                               const void* v_td,            // T [b, h, m, d], or null
                               const void* q_bias,          // T [h, d], or null
                               const void* k_bias,          // T [h, d], or null
                               const void* v_bias,          // T [h, d], or null
                               const void* mask,            // bool or float32 [b, h, n, m], or null
                               int mask_kind, int dtype, bool causal, double scale, int threads,
                               float* work,  // [threads, topdown_attention_fwd_work]
                               // outputs
                               void* out,    // T [b, h, n, d]
                               float* lse);  // [b, h, n]: log2 of the sum of 2^score, or null

    // The same for topdown_attention_bwd.
    std::int64_t topdown_attention_bwd_work(std::int64_t n, std::int64_t m, std::int64_t d,
                                            bool only_v);

    // Gradients of q, k and v + v_td from that of o. Probabilities are recomputed from q, k and lse
    // and normalised again, so that a float32 lse serves scores of any size.
    void topdown_attention_bwd(const std::int64_t* layout,  // as above; out: of the slope
                               const void* q,               // T [b, h, n, d]
                               const void* k,               // T [b, h, m, d]
                               const void* v,               // T [b, h, m, d], null if only_v
                               const void* v_td,            // T [b, h, m, d], or null
                               const void* q_bias,          // T [h, d], or null
                               const void* k_bias,          // T [h, d], or null
                               const void* v_bias,          // T [h, d], or null
                               const void* mask,            // bool or float32 [b, h, n, m], or null
                               int mask_kind,
                               const float* lse,   // [b, h, n], as the forward wrote it
                               const void* slope,  // T [b, h, n, d]
                               int dtype, bool causal, double scale, bool only_v, int threads,
                               float* work,  // [threads, topdown_attention_bwd_work]
                               // outputs
                               void* q_slope,   // T [b, n, h, d], null if only_v
                               void* k_slope,   // T [b, m, h, d], null if only_v
                               void* v_slope);  // T [b, m, h, d]
)
