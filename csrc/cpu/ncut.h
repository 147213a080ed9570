// Normalized cuts on the CPU: bit-packed affinities, a block Lanczos solver, partitions.
//
// Bits are [ceil(n / 32), n]: bit t of word (q, i) is B[32 q + t, i], symmetric, tail bits zero.
#pragma once

#include <cstdint>

#include "isa.h"

FOVEATE_PER_ISA(

    // Rows of [n, c] divided by max(norm, 1e-12), masked ones zeroed; marks rows that are zero.
    // Returns the first row that is not finite, or -1.
    std::int64_t ncut_normalize(const void* features, int is_double, const std::uint8_t* masked,
                                std::int64_t n, std::int64_t c, int threads,
                                // outputs
                                void* unit, std::uint8_t* zero);

    // Bits of S > tau of normalised rows [n, c], zero ones marked. The diagonal is 1, or `joined`
    // for rows marked zero.
    int ncut_pack(const void* unit, int is_double, const std::uint8_t* zero, std::int64_t n,
                  std::int64_t c, double tau, int joined, int threads,
                  // outputs
                  std::uint32_t* bits);

    // Number of set bits of each row, [n].
    int ncut_degrees(const std::uint32_t* bits, std::int64_t n, std::int32_t* degrees);

    // Makes the rows and columns of painted tokens `joined` (0 or 1), the diagonal included.
    int ncut_paint(const std::uint8_t* painted, int joined, std::int64_t n, std::uint32_t* bits);

    // Looks at [n, n]: report = {smallest and largest of the upper triangle, max |A - A^T|, first
    // row that is not finite or -1, first row with a negative value or -1}.
    int ncut_scan(const void* affinity, int is_double, std::int64_t n, int threads,
                  // outputs
                  double* report);

    // Bits of A == high of the upper triangle of [n, n] and its mirror image. Returns 1, or 0 and
    // bits without meaning if a value there is neither low nor high.
    int ncut_pack_values(const void* affinity, int is_double, std::int64_t n, double low,
                         double high, int threads,
                         // outputs
                         std::uint32_t* bits);

    // Sums of the rows of the symmetric matrix whose upper triangle is that of [n, n].
    int ncut_row_sums(const void* affinity, int is_double, std::int64_t n, int threads,
                      // outputs
                      double* sums);

    // Solves `jobs` [count, 12], see ncut_solve.cpp, for k pairs each. Threads take jobs when there
    // are as many, else rows; the result is the same.
    int ncut_lanczos(const std::int64_t* jobs, std::int64_t count, double eps, int k, double tol,
                     int max_iter, int threads);

    // The 4-connected component of side [h, w] that holds seed.
    int ncut_component(const std::uint8_t* side, std::int64_t seed, std::int64_t h, std::int64_t w,
                       // outputs
                       std::uint8_t* component);

    // The stages of MaskCut for `jobs` [count, 12], see ncut_partition.cpp. `joined` is the bit
    // that painted tokens get, on_reject 0 retry, 1 stop, 2 skip, corners 0 for never. Threads take
    // images when there are as many, else rows; the result is the same.
    int ncut_maskcut(const std::int64_t* jobs, std::int64_t count, int n_masks, double eps,
                     int joined, double iou_threshold, double min_area, int corners, int on_reject,
                     double tol, int max_iter, int threads);)
