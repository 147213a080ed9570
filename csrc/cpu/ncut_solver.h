// The solver of one graph, for the kernels that need vectors.
#pragma once

#include <cstdint>

#include "isa.h"

FOVEATE_PER_ISA(

    // Solves one job of `ncut_lanczos`.
    void ncut_solve(const std::int64_t* job, double eps, int k, double tol, int max_iter,
                    int threads);)
