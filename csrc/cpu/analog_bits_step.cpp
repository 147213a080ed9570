#include <algorithm>
#include <cmath>
#include <type_traits>

#include "analog_bits.h"
#include "dtypes.h"
#include "elementary.h"
#include "memory.h"

namespace foveate::FOVEATE_ISA {
namespace {

// Python's counterpart: foveate/ops/analog_bits/layout.py, PREDICTIONS.
enum class Prediction : int { x = 0, eps = 1, v = 2, sigmoid = 3 };

constexpr std::int64_t kBlock = 4096;  // values of a task

template <typename C, typename F>
C load(F x) {
  if constexpr (std::is_same_v<F, double>) {
    return static_cast<C>(x);
  } else {
    return static_cast<C>(to_float(x));
  }
}

// Of one sample, in the order that Python writes them.
struct Coefficients {
  double root;    // sqrt(g)
  double spread;  // sqrt(1 - g)
  double keep;    // A
  double pull;    // B
  double sigma;   // S
};

template <Prediction kind, typename C, typename F>
void block(const C* x, const F* pred, const F* uncond, const C* noise, const C* sigma,
           std::int64_t n, const Coefficients& at, double guidance, double clip, double scale,
           C* out, C* x0_out) {
  const auto root = static_cast<C>(at.root);
  const auto spread = static_cast<C>(at.spread);
  const auto inverse = static_cast<C>(1.0 / at.root);
  const auto keep = static_cast<C>(at.keep);
  const auto pull = static_cast<C>(at.pull);
  const auto fixed = static_cast<C>(at.sigma);
  const auto more = static_cast<C>(1.0 + guidance);
  const auto less = static_cast<C>(guidance);
  const auto bound = static_cast<C>(clip);
  const auto s = static_cast<C>(scale);
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    C f = load<C>(pred[i]);
    if (uncond != nullptr) f = more * f - less * load<C>(uncond[i]);
    C x0 = f;
    if constexpr (kind == Prediction::eps) x0 = madd(-spread, f, x[i]) * inverse;
    if constexpr (kind == Prediction::v) x0 = madd(root, x[i], -(spread * f));
    if constexpr (kind == Prediction::sigmoid) {
      const C decay = fast_exp(f < 0 ? f : -f);
      const C tanh_half = (1 - decay) / (1 + decay);  // 2 sigmoid(|f|) - 1
      x0 = s * (f < 0 ? -tanh_half : tanh_half);
    }
    x0 = x0 > bound ? bound : (x0 < -bound ? -bound : x0);
    C value = madd(keep, x[i], pull * x0);
    if (noise != nullptr) value = madd(sigma == nullptr ? fixed : sigma[i], noise[i], value);
    out[i] = value;
    if (x0_out != nullptr) x0_out[i] = x0;
  }
}

}  // namespace

void bits_step(const void* x, int dtype, std::int64_t x_stride, const void* pred, int pred_dtype,
               const void* uncond, const void* noise, const void* sigma, std::int64_t samples,
               std::int64_t size, const double* coefficients, bool per_sample, int kind,
               double guidance, double clip, double scale, int threads, std::int64_t out_stride,
               std::int64_t x0_stride, void* out, void* x0_out) {
  const auto run_as = [&]<typename C, typename F>(C*, F*) {
    const std::int64_t blocks = (size + kBlock - 1) / kBlock;
    const auto bytes = static_cast<std::size_t>(samples * size) * sizeof(C);
    if (out != x && out_stride == size) advise_huge_pages(out, bytes);
    if (x0_out != nullptr && x0_stride == size) advise_huge_pages(x0_out, bytes);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (std::int64_t task = 0; task < samples * blocks; ++task) {
      const std::int64_t sample = task / blocks;
      const std::int64_t within = task % blocks * kBlock;
      const std::int64_t begin = sample * size + within;
      const std::int64_t n = std::min(kBlock, size - within);
      const double* c = coefficients + (per_sample ? sample * 5 : 0);
      const Coefficients at{c[0], c[1], c[2], c[3], c[4]};
      const auto shifted = [&]<typename T>(const void* base, T*) {
        return base == nullptr ? nullptr : static_cast<const T*>(base) + begin;
      };
      C* const none = nullptr;
      F* const no_pred = nullptr;
      const auto call = [&]<Prediction k>() {
        block<k>(
            static_cast<const C*>(x) + sample * x_stride + within, shifted(pred, no_pred),
            shifted(uncond, no_pred), shifted(noise, none), shifted(sigma, none), n, at, guidance,
            clip, scale, static_cast<C*>(out) + sample * out_stride + within,
            x0_out == nullptr ? nullptr : static_cast<C*>(x0_out) + sample * x0_stride + within);
      };
      switch (static_cast<Prediction>(kind)) {
        case Prediction::eps:
          call.template operator()<Prediction::eps>();
          break;
        case Prediction::v:
          call.template operator()<Prediction::v>();
          break;
        case Prediction::sigmoid:
          call.template operator()<Prediction::sigmoid>();
          break;
        default:
          call.template operator()<Prediction::x>();
      }
    }
  };
  const auto with_pred = [&]<typename C>(C* c) {
    switch (static_cast<DType>(pred_dtype)) {
      case DType::f64:
        return run_as(c, static_cast<double*>(nullptr));
      case DType::bf16:
        return run_as(c, static_cast<bf16*>(nullptr));
      case DType::f16:
        return run_as(c, static_cast<f16*>(nullptr));
      default:
        return run_as(c, static_cast<float*>(nullptr));
    }
  };
  if (static_cast<DType>(dtype) == DType::f64) {
    with_pred(static_cast<double*>(nullptr));
  } else {
    with_pred(static_cast<float*>(nullptr));
  }
}

}  // namespace foveate::FOVEATE_ISA
