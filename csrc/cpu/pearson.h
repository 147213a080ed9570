// pearson: units are centred on a pivot, scaled, taken to the grids of their products and summed in
// one read; products are a BLAS's; the epilogues fold, finalise and rank them.
//
// Maps are [n, c, h, w] in any strides (in elements) of which that of w is 1, or, channels `last`,
// that of c. "compute" is float, or double where `wide`. dtype codes: dtypes.h.
#pragma once

#include <cstdint>

#include "isa.h"

FOVEATE_PER_ISA(
    // sum[c] of (wh x ww) . x over all images, and the least and largest value; NaN and infinity
    // reach all three.
    void pearson_moments(const void* x, int x_dtype, bool wide, bool last, std::int64_t n,
                         std::int64_t c, std::int64_t h, std::int64_t w, std::int64_t stride_n,
                         std::int64_t stride_c, std::int64_t stride_h, std::int64_t stride_w,
                         const double* wh,  // [h]
                         const double* ww,  // [w]
                         int threads,
                         // outputs
                         double* sum,   // [c]
                         double* low,   // [c]
                         double* high)  // [c]
    ;

    // d = (x - pivot) s1 s2 is written to every target, after its two banded matrices, times the
    // image's root weight; moments are sums over images of weight times S and Q.
    //
    // A target is 10 integers: size, first and weights of the band of each axis (0, 0, 0: the
    // identity), its width; then the address of dst (0: only moments read it) and its row length.
    //   [0..3] out_h, width_h, int32 first_h [out_h], compute weight_h [out_h, width_h]
    //   [4..7] the same along w
    //   [8]    compute dst: maps [c, ld], channels last [n out_h out_w, ld]
    //   [9]    ld
    // A moment is 7 integers: the target it reads (-1: the native map), then the addresses of
    // double wh, ww (R^T 1), and of the diagonal and upper diagonal of R^T R along h and w
    // (interleaved [size, 2]); 0 means ones and the identity. Output [m]: S, Q.
    //   [0] target, [1] wh, [2] ww, [3] gh, [4] gw, [5] S [c], [6] Q [c]
    void pearson_stage(const void* x, int x_dtype, bool wide, bool last, std::int64_t n,
                       std::int64_t c, std::int64_t h, std::int64_t w, std::int64_t stride_n,
                       std::int64_t stride_c, std::int64_t stride_h, std::int64_t stride_w,
                       const double* pivot,          // [c], exact in compute
                       const double* scale,          // [2, c]: s1, s2
                       const double* weight,         // [n], or null: ones
                       const std::int64_t* targets,  // [n_targets, 10]
                       std::int64_t n_targets,
                       const std::int64_t* moments,  // [n_moments, 7]
                       std::int64_t n_moments, int threads,
                       // outputs
                       double* largest)  // [c]: max |d|
    ;

    // c[i, j] += product[i, j] - u1[i] v1[j] + u2[i] v2[j], in double.
    void pearson_fold(const void* product,  // [rows, cols], compute
                      bool wide, std::int64_t product_ld, std::int64_t rows, std::int64_t cols,
                      const double* u1,  // [rows]
                      const double* v1,  // [cols]
                      const double* u2,  // [rows]
                      const double* v2,  // [cols]
                      int acc_dtype, std::int64_t acc_ld, int threads,
                      // outputs
                      void* acc)  // [rows, cols], float or double
    ;

    // out = clip(c / (root_a root_b)): float from inverse roots, double from squares.
    void pearson_finalize(const void* acc, int acc_dtype, std::int64_t acc_ld, std::int64_t rows,
                          std::int64_t cols,
                          const double* side_a,  // [rows]: 1 / root, or squares for double
                          const double* side_b,  // [cols]
                          bool symmetric, int threads, int out_dtype, std::int64_t out_ld,
                          // outputs
                          void* out)  // [rows, cols], float or double
    ;

    // The best k of each row and of each column of the finalised matrix, which is not formed.
    // Order: key descending, then lower index; NaN is never ranked. Key: r, or |r|.
    void pearson_topk(const void* acc, int acc_dtype, std::int64_t acc_ld, std::int64_t rows,
                      std::int64_t cols,
                      const double* side_a,  // [blocks, rows] as in pearson_finalize; null: r = acc
                      const double* side_b,  // [row_blocks, cols]
                      const std::int64_t* block_start,  // [blocks + 1] columns of b's layers
                      std::int64_t blocks,
                      const std::int32_t* row_block,  // [rows] layer of each row
                      bool by_abs, bool wide, std::int64_t row_offset, std::int64_t col_offset,
                      std::int64_t k_a, std::int64_t k_b, int threads,
                      // outputs
                      double* values_a,          // [rows, k_a]; NaN where nothing ranks
                      std::int64_t* indices_a,   // [rows, k_a]; -1 where nothing ranks
                      double* values_b,          // [cols, k_b]
                      std::int64_t* indices_b);  // [cols, k_b]
)
