#include <cmath>
#include <cstring>

#include "analog_bits.h"
#include "code_words.h"

namespace foveate::FOVEATE_ISA {

// A task is a sample: counts, then weights by id, then one look-up a pixel.
uint64_t instance_weights(const void* ids, int dtype, int64_t sample_stride, int64_t pixel_stride,
                          int64_t samples, int64_t pixels, int64_t n_ids, double power, int threads,
                          int32_t* work, float* out) {
  uint64_t outside = 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1) \
    reduction(| : outside)
  for (int64_t sample = 0; sample < samples; ++sample) {
    // Four interleaved histograms: equal neighbours do not wait for each other's increment. Ids
    // outside count in one more bin, which weighs 0^power.
    int32_t* counts = work + sample * 5 * (n_ids + 1);
    float* table = reinterpret_cast<float*>(counts + 4 * (n_ids + 1));
    std::memset(counts, 0, size_t(4 * (n_ids + 1)) * sizeof(int32_t));
    with_id_type(dtype, [&](auto type) {
      using Id = decltype(type);
      const Id* from = static_cast<const Id*>(ids) + sample * sample_stride;
      const auto bin = [&](int64_t p) {
        const auto id = static_cast<uint64_t>(static_cast<int64_t>(from[p * pixel_stride]));
        return static_cast<int64_t>(std::min(id, static_cast<uint64_t>(n_ids)));
      };
      for (int64_t p = 0; p < pixels; ++p) ++counts[bin(p) * 4 + (p & 3)];
      double sum = 0.0;
      for (int64_t id = 0; id < n_ids; ++id) {
        const int32_t* c = counts + id * 4;
        const int64_t count = int64_t{c[0]} + c[1] + c[2] + c[3];
        const double u = std::pow(1.0 / static_cast<double>(count + 1), power);
        sum += static_cast<double>(count) * u;
        table[id] = static_cast<float>(u);
      }
      const int32_t* c = counts + n_ids * 4;
      const int64_t strays = int64_t{c[0]} + c[1] + c[2] + c[3];
      const double stray = std::pow(0.0, power);
      sum += static_cast<double>(strays) * stray;
      outside |= strays != 0 ? 1U : 0U;
      table[n_ids] = static_cast<float>(stray);
      const double factor = static_cast<double>(pixels) / sum;
      for (int64_t id = 0; id <= n_ids; ++id) {
        table[id] = static_cast<float>(static_cast<double>(table[id]) * factor);
      }
      float* to = out + sample * pixels;
      for (int64_t p = 0; p < pixels; ++p) to[p] = table[bin(p)];
    });
  }
  return outside;
}

}  // namespace foveate::FOVEATE_ISA
