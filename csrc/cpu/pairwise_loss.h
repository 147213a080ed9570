// pairwise_loss: what is done to a tile of products <x_i, y_j> between the matrix products. A tile
// holds `rows` rows from row0 and `columns` columns from col0 of the matrix; vectors are indexed by
// the matrix's rows [n] and columns [N]. dtype 0 is float32, 1 float64 (T below).
#pragma once

#include <cstdint>

#include "isa.h"

FOVEATE_PER_ISA(
    // z = scale dot + bias. With `grad`, dot becomes g = dl/dz in place. Adds each row's sums.
    // form 0: all negative; 1: positive at column row + diagonal; 2: index; 3: ids; 4: targets;
    // 5: sparse targets, columns ascending.
    void sigmoid_loss_fwd(
        void* dot,  // T [rows, ld]
        int dtype, std::int64_t ld, std::int64_t rows, std::int64_t columns, std::int64_t row0,
        std::int64_t col0, double scale, double bias, int form, std::int64_t diagonal,
        const void* a,                 // int32 index or ids [n]; T [rows, columns]; int64 [n + 1]
        const void* b,                 // int32 ids [N]; int64 columns [nnz]
        const void* c,                 // T targets [nnz]
        const std::int32_t* ignore_x,  // [n], or null
        const std::int32_t* ignore_y,  // [N]
        const void* row_share,         // T [n], or null
        const void* col_share,         // T [N], or null
        const void* row_weight,        // T [n], or null
        const void* col_weight,        // T [N], or null
        double pos_weight, double neg_weight, double gamma, bool loss, bool grad, int threads,
        // outputs
        double* row_loss,   // [n]
        double* row_g,      // [n]
        double* row_gdot);  // [n]

    // Adds a tile to the statistics of z by kind, 0 negative and 1 positive; the pairs as above.
    // The caller starts counts and sums at 0, low at inf, high at -inf.
    void pair_stats(const void* dot,  // T [rows, ld]
                    int dtype, std::int64_t ld, std::int64_t rows, std::int64_t columns,
                    std::int64_t row0, std::int64_t col0, double scale, double bias, int form,
                    std::int64_t diagonal, const void* a, const void* b, const void* c,
                    const std::int32_t* ignore_x,  // [n], or null
                    const std::int32_t* ignore_y,  // [N]
                    std::int64_t n, std::int64_t m, int threads,
                    // outputs
                    std::int64_t* count,      // [2, n]
                    double* sum,              // [2, n]
                    void* low,                // T [2, n]
                    void* high,               // T [2, n]
                    std::int64_t* col_count,  // [m], positives of each column
                    void* col_high);          // T [2, m]

    // Merges a tile of z = scale dot into (maximum, sum of e^(z - maximum)) of rows and columns;
    // the caller starts them at (-inf, 0). Forms 0, 1 and 2; pairs of equal ignore ids are left out
    // unless positive.
    void info_nce_lse(const void* dot,  // T [rows, ld]
                      int dtype, std::int64_t ld, std::int64_t rows, std::int64_t columns,
                      std::int64_t row0, std::int64_t col0, double scale, int form,
                      std::int64_t diagonal,
                      const void* a,                 // int32 index [n], or null
                      const std::int32_t* ignore_x,  // [n], or null
                      const std::int32_t* ignore_y,  // [N]
                      bool symmetric, int threads,
                      void* work,  // T [ceil(rows / 64) columns + rows + columns]
                      // outputs
                      double* row_max,       // [n]
                      double* row_sum,       // [n]
                      double* row_positive,  // [n], z of the positive
                      double* col_max,       // [N], or null unless symmetric
                      double* col_sum);      // [N], likewise

    // dot becomes g = row_factor e^(z - r) + col_factor e^(z - c), less the factors at the
    // positive. A state is [., 2]: the log of the sum of e^z as a T and what is lost by that, since
    // the rounding of a T alone would cost 4e-6 of every probability at z = 100. Adds each row's
    // sum of g dot.
    void info_nce_grad(void* dot,  // T [rows, ld]
                       int dtype, std::int64_t ld, std::int64_t rows, std::int64_t columns,
                       std::int64_t row0, std::int64_t col0, double scale, int form,
                       std::int64_t diagonal, const void* a, const std::int32_t* ignore_x,
                       const std::int32_t* ignore_y,
                       const void* row_state,   // T [n, 2]
                       const void* row_factor,  // T [n], or null: no row part
                       const void* col_state,   // T [N, 2]
                       const void* col_factor,  // T [N], or null: no column part
                       int threads,
                       void* work,  // T [2 columns]
                       // outputs
                       double* row_gdot);  // [n]
)
