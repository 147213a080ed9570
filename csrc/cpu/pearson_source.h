// Reading the source of pearson: any dtype to float or double; scratch memory.
// Internal linkage only: this header is compiled into every instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "dtypes.h"

namespace foveate::FOVEATE_ISA {
namespace {

// Owns `count` elements; a vector would be a weak symbol.
template <typename T>
struct Scratch {
  T* data;
  explicit Scratch(std::int64_t count)
      : data(static_cast<T*>(std::malloc(static_cast<std::size_t>(count + 16) * sizeof(T)))) {
    if (data == nullptr) std::abort();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

template <typename C>
[[maybe_unused]] inline C convert(float x) {
  return static_cast<C>(x);
}
template <typename C>
[[maybe_unused]] inline C convert(double x) {
  return static_cast<C>(x);
}
template <typename C>
[[maybe_unused]] inline C convert(bf16 x) {
  return static_cast<C>(to_float(x));
}
template <typename C>
[[maybe_unused]] inline C convert(f16 x) {
  return static_cast<C>(to_float(x));
}

// Calls f with a null pointer of the source's type.
template <typename F>
[[maybe_unused]] inline void with_source(int dtype, F f) {
  switch (static_cast<DType>(dtype)) {
    case DType::f64:
      return f(static_cast<const double*>(nullptr));
    case DType::bf16:
      return f(static_cast<const bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<const f16*>(nullptr));
    default:
      return f(static_cast<const float*>(nullptr));
  }
}

struct Shape {
  std::int64_t n, c, h, w;
  std::int64_t stride_n, stride_c, stride_h, stride_w;
};

}  // namespace
}  // namespace foveate::FOVEATE_ISA
