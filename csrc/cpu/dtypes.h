// The dtype codes that cross the binding, and the two 16-bit floats as bit patterns.
// Internal linkage only: this header is compiled into every instruction set.
#pragma once

#include <bit>
#include <cstdint>

namespace foveate {

// Python's counterpart: foveate/_native.py, DTYPE_CODES.
enum class DType : int {
  f32 = 0,
  f64 = 1,
  bf16 = 2,
  f16 = 3,
  boolean = 4,
  u8 = 5,
  i8 = 6,
  i16 = 7,
  i32 = 8,
  i64 = 9,
};

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

namespace {

[[maybe_unused]] inline float to_float(float x) { return x; }
[[maybe_unused]] inline float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
// Exact: the exponent is moved by a multiplication with 2^112, which also normalises subnormals.
[[maybe_unused]] inline float to_float(f16 x) {
  const std::uint32_t magnitude = x.bits & 0x7fffU;
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
  const float finite = std::bit_cast<float>(magnitude << 13) * 0x1p112F;
  const std::uint32_t infinite = 0x7f800000U | ((magnitude & 0x3ffU) << 13);
  const std::uint32_t bits = magnitude >= 0x7c00U ? infinite : std::bit_cast<std::uint32_t>(finite);
  return std::bit_cast<float>(bits | sign);
}

template <typename T>
T from_float(float x);
template <>
[[maybe_unused]] inline float from_float<float>(float x) {
  return x;
}
template <>
[[maybe_unused]] inline double from_float<double>(float x) {
  return static_cast<double>(x);
}
// Rounds to nearest, ties to even; NaN stays NaN (quiet).
template <>
[[maybe_unused]] inline bf16 from_float<bf16>(float x) {
  const std::uint32_t b = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (b + 0x7fffU + ((b >> 16) & 1U)) >> 16;
  const bool nan = (b & 0x7fffffffU) > 0x7f800000U;
  return {static_cast<std::uint16_t>(nan ? (b >> 16) | 0x40U : rounded)};
}
// Rounds to nearest, ties to even; above 65520 to infinity. A subnormal result is rounded by adding
// 0.5, whose unit in the last place is 2^-24, that of the smallest float16.
template <>
[[maybe_unused]] inline f16 from_float<f16>(float x) {
  const std::uint32_t b = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (b >> 16) & 0x8000U;
  const std::uint32_t magnitude = b & 0x7fffffffU;
  const std::uint32_t normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
  const float shifted = std::bit_cast<float>(magnitude < 0x38800000U ? magnitude : 0U) + 0.5F;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000U;
  std::uint32_t h = magnitude < 0x38800000U ? subnormal : normal;
  h = magnitude >= 0x477ff000U ? 0x7c00U : h;
  h = magnitude > 0x7f800000U ? 0x7e00U | ((magnitude >> 13) & 0x3ffU) : h;
  return {static_cast<std::uint16_t>(h | sign)};
}

// Calls f with a null pointer to the floating type that the code names: bf16, f16, else float.
template <typename F>
void with_float_type(int dtype, F f) {
  switch (static_cast<DType>(dtype)) {
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace
}  // namespace foveate
