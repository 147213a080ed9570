#include "topdown_attention.h"

#include <algorithm>
#include <cmath>

#include "dtypes.h"

namespace foveate::FOVEATE_ISA {
namespace {

constexpr std::int64_t kRows = 64;  // of a task

template <typename T>
[[gnu::always_inline]] inline double load(T x) {
  return static_cast<double>(to_float(x));
}

struct Places {
  std::int64_t image;
  std::int64_t begin;  // rows, counted over all images
  std::int64_t end;
};

Places places(std::int64_t task, std::int64_t n) {
  const std::int64_t blocks = prompt_select_blocks(n);
  const std::int64_t image = task / blocks;
  const std::int64_t first = task % blocks * kRows;
  return {image, image * n + first, image * n + std::min(first + kRows, n)};
}

double clamp_unit(double cosine) {
  return cosine <= 0.0 ? 0.0 : (cosine >= 1.0 ? 1.0 : cosine);  // NaN stays NaN
}

template <typename T>
void unit_prompt(const T* prompt, std::int64_t count, std::int64_t c, double eps, double* unit) {
  for (std::int64_t i = 0; i < count; ++i, prompt += c, unit += c + 1) {
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t k = 0; k < c; ++k) {
      const double p = load(prompt[k]);
      sum += p * p;
    }
    const double length = std::sqrt(sum);
    const double divisor = length < eps ? eps : length;
    for (std::int64_t k = 0; k < c; ++k) unit[k] = load(prompt[k]) / divisor;
    unit[c] = length;
  }
}

template <typename T>
void forward(const T* x, const double* unit, bool per_image, std::int64_t b, std::int64_t n,
             std::int64_t c, double eps, int threads, T* z, T* mask, double* cosine,
             double* length) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t task = 0; task < b * prompt_select_blocks(n); ++task) {
    const Places at = places(task, n);
    const double* p = unit + (per_image ? at.image * (c + 1) : 0);
    for (std::int64_t row = at.begin; row < at.end; ++row) {
      const T* from = x + row * c;
      double dot = 0.0;
      double sum = 0.0;
#pragma omp simd reduction(+ : dot, sum)
      for (std::int64_t k = 0; k < c; ++k) {
        const double value = load(from[k]);
        dot += value * p[k];
        sum += value * value;
      }
      length[row] = std::sqrt(sum);
      cosine[row] = dot / (length[row] < eps ? eps : length[row]);
      const auto m = static_cast<float>(clamp_unit(cosine[row]));
      mask[row] = from_float<T>(m);
      T* to = z + row * c;
#pragma omp simd
      for (std::int64_t k = 0; k < c; ++k) {
        to[k] = from_float<T>(m * to_float(from[k]));
      }
    }
  }
}

template <typename T>
void backward(const T* x, const double* unit, const double* cosine, const double* length,
              bool per_image, std::int64_t b, std::int64_t n, std::int64_t c, double eps,
              const T* z_slope, const T* mask_slope, int threads, double* partial, T* x_slope,
              T* prompt_slope) {
  const std::int64_t blocks = prompt_select_blocks(n);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (std::int64_t task = 0; task < b * blocks; ++task) {
    const Places at = places(task, n);
    const double* p = unit + (per_image ? at.image * (c + 1) : 0);
    double* sums = partial == nullptr ? nullptr : partial + task * (c + 1);
    if (sums != nullptr) std::fill(sums, sums + c + 1, 0.0);
    for (std::int64_t row = at.begin; row < at.end; ++row) {
      const T* from = x + row * c;
      const T* given = z_slope + row * c;
      const double cos = cosine[row];
      const double m = clamp_unit(cos);
      double slope = 0.0;  // of the cosine
      if (!(cos <= 0.0) && !(cos >= 1.0)) {
#pragma omp simd reduction(+ : slope)
        for (std::int64_t k = 0; k < c; ++k) slope += load(given[k]) * load(from[k]);
        if (mask_slope != nullptr) slope += load(mask_slope[row]);
      }
      const bool long_enough = !(length[row] < eps);  // NaN stays NaN
      const double divisor = long_enough ? length[row] : eps;
      const double along = slope / divisor;
      const double back = long_enough ? slope * cos / (divisor * divisor) : 0.0;
      if (x_slope != nullptr) {
        T* to = x_slope + row * c;
#pragma omp simd
        for (std::int64_t k = 0; k < c; ++k) {
          const double value = m * load(given[k]) + along * p[k] - back * load(from[k]);
          to[k] = from_float<T>(static_cast<float>(value));
        }
      }
      if (sums != nullptr && slope != 0.0) {
#pragma omp simd
        for (std::int64_t k = 0; k < c; ++k) sums[k] += along * load(from[k]);
        sums[c] += slope * cos;
      }
    }
  }
  if (prompt_slope == nullptr) return;
  // d cos / d p = x / (|x| |p|) - cos p / |p|^2; the second term falls away below eps.
  const std::int64_t prompts = per_image ? b : 1;
  const std::int64_t group = per_image ? blocks : b * blocks;
  for (std::int64_t i = 0; i < prompts; ++i) {
    const double* p = unit + i * (c + 1);
    const bool long_enough = !(p[c] < eps);
    const double divisor = long_enough ? p[c] : eps;
    const double spoiled = 0.0 * p[c];  // NaN throughout if a value of p is not finite
    double cosines = 0.0;
    for (std::int64_t g = 0; g < group; ++g) cosines += partial[(i * group + g) * (c + 1) + c];
    for (std::int64_t k = 0; k < c; ++k) {
      double sum = 0.0;
      for (std::int64_t g = 0; g < group; ++g) sum += partial[(i * group + g) * (c + 1) + k];
      const double value = (sum - (long_enough ? cosines * p[k] : 0.0)) / divisor + spoiled;
      prompt_slope[i * c + k] = from_float<T>(static_cast<float>(value));
    }
  }
}

}  // namespace

std::int64_t prompt_select_blocks(std::int64_t n) { return (n + kRows - 1) / kRows; }

void prompt_select_fwd(const void* x, int dtype, const void* prompt, bool per_image, std::int64_t b,
                       std::int64_t n, std::int64_t c, double eps, int threads, double* unit,
                       void* z, void* mask, double* cosine, double* length) {
  with_float_type(dtype, [&]<typename T>(T*) {
    unit_prompt(static_cast<const T*>(prompt), per_image ? b : 1, c, eps, unit);
    forward(static_cast<const T*>(x), unit, per_image, b, n, c, eps, threads, static_cast<T*>(z),
            static_cast<T*>(mask), cosine, length);
  });
}

void prompt_select_bwd(const void* x, int dtype, const double* unit, const double* cosine,
                       const double* length, bool per_image, std::int64_t b, std::int64_t n,
                       std::int64_t c, double eps, const void* z_slope, const void* mask_slope,
                       int threads, double* partial, void* x_slope, void* prompt_slope) {
  with_float_type(dtype, [&]<typename T>(T*) {
    backward(static_cast<const T*>(x), unit, cosine, length, per_image, b, n, c, eps,
             static_cast<const T*>(z_slope), static_cast<const T*>(mask_slope), threads, partial,
             static_cast<T*>(x_slope), static_cast<T*>(prompt_slope));
  });
}

}  // namespace foveate::FOVEATE_ISA
