// Selection of tokens by a prompt: CPU kernels.
#pragma once

#include <cstdint>

#include "isa.h"

// A task is a block of 64 rows of one image. Sums are float64 in a fixed order, so that results do
// not depend on the thread count.
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
)
