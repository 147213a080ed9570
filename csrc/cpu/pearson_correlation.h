// What the epilogues of pearson share: r of one element, and the choice of float or double.
// Internal linkage only: this header is compiled into every instruction set.
#pragma once

#include <cmath>

#include "dtypes.h"

namespace foveate::FOVEATE_ISA {
namespace {

// r of one element: float from inverse roots, double from squares. NaN passes the clip.
template <typename R>
[[maybe_unused]] inline R correlation(double c, double a, double b) {
  double r;
  if constexpr (sizeof(R) == 8) {
    r = c / std::sqrt(a * b);
  } else {
    r = c * (a * b);
  }
  r = r > 1.0 ? 1.0 : r;
  return static_cast<R>(r < -1.0 ? -1.0 : r);
}

// Calls f with a null pointer of float or double.
template <typename F>
[[maybe_unused]] inline void with_float(bool wide, F f) {
  if (wide) {
    f(static_cast<double*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

[[maybe_unused]] inline bool is_f64(int dtype) { return static_cast<DType>(dtype) == DType::f64; }

}  // namespace
}  // namespace foveate::FOVEATE_ISA
