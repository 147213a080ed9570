// analog_bits: ids to rows of +-scale and back. A pixel holds `maps` ids; map k owns n_bits[k]
// channels, in order. Bits tensors are read and written as [outer, channels, inner]: channels last
// is inner == 1. Strides count elements. dtype codes: dtypes.h.
#pragma once

#include <cstdint>

#include "isa.h"

FOVEATE_PER_ISA(
    // out[o, c, i] = bit c of pixel (o, i) ? high : low. Returns the bits of all ids that do not
    // fit their n_bits, ored: 0 when every id is in range. `msb`: each map's most significant bit
    // first. Needs out_channel_stride == 1 if inner == 1, else unit stride along inner.
    std::uint64_t bits_encode(const void* x,  // ids [outer, maps, inner]
                              int x_dtype, std::int64_t x_outer_stride, std::int64_t x_map_stride,
                              std::int64_t x_inner_stride,
                              const std::int32_t* n_bits,  // [maps], each 1..63
                              std::int64_t maps, std::int64_t outer, std::int64_t inner, bool msb,
                              double high, double low, int out_dtype, std::int64_t out_outer_stride,
                              std::int64_t out_channel_stride, int threads,
                              // outputs
                              void* out);  // [outer, channels, inner]

    // out[o, k, i] = the id whose bits are (value > 0): zeros and NaN read as 0. Ids above
    // max_value[k] become max_value[k]; -1 means no limit.
    // Needs bits_channel_stride == 1 if inner == 1, else unit stride along inner.
    void bits_decode(const void* bits,  // [outer, channels, inner]
                     int bits_dtype, std::int64_t bits_outer_stride,
                     std::int64_t bits_channel_stride,
                     const std::int32_t* n_bits,     // [maps]
                     const std::int64_t* max_value,  // [maps]
                     std::int64_t maps, std::int64_t outer, std::int64_t inner, bool msb,
                     int out_dtype, int threads,
                     // outputs
                     void* out);  // ids [outer, maps, inner], contiguous

    // The noise stream on a tensor [outer, channels, inner], contiguous.
    void bits_noise(std::int64_t outer, std::int64_t channels, std::int64_t inner,
                    std::uint64_t seed, std::uint32_t offset, int out_dtype, int threads,
                    // outputs
                    void* out);

    // out = sqrt(g) s + sqrt(1 - g) e, g = gamma of the pixel's sample, s = high or low by the bit.
    // e is `noise` (contiguous, float64 for a float64 out, else float32), or the stream of
    // (seed, offset) where that is null. Returns the bits of ids that do not fit, as bits_encode.
    std::uint64_t bits_q_sample(const void* x, int x_dtype, std::int64_t x_outer_stride,
                                std::int64_t x_map_stride, std::int64_t x_inner_stride,
                                const std::int32_t* n_bits, std::int64_t maps, std::int64_t outer,
                                std::int64_t inner, bool msb, double high, double low,
                                const double* gamma,  // [samples]
                                std::int64_t pixels_per_sample, const void* noise,
                                std::uint64_t seed, std::uint32_t offset, int out_dtype,
                                int threads,
                                // outputs
                                void* out,         // [outer, channels, inner], contiguous
                                void* noise_out);  // the same shape, dtype of `noise`, or null

    // Tiles of bits_loss, each of which gets an entry of `partial`.
    std::int64_t bits_loss_tiles(std::int64_t outer, std::int64_t channels, std::int64_t inner);

    // Sum over pixels and channels of w L(pred, target), and slope = slope_scale upstream w
    // dL/dpred. kind 0: (pred - s)^2, 1: (pred - e)^2, 2: (pred - v)^2 with v = sqrt(g) e - sqrt(1
    // - g) s, 3: -log(sigmoid(+-pred) + eps). C is float64 for float64 pred, else float32. Losses
    // are summed in C within a tile and in float64 across tiles, in order. Returns as bits_encode.
    std::uint64_t bits_loss(
        const void* pred,  // [outer, channels, inner], contiguous
        int dtype, const void* x, int x_dtype, std::int64_t x_outer_stride,
        std::int64_t x_map_stride, std::int64_t x_inner_stride, const std::int32_t* n_bits,
        std::int64_t maps, std::int64_t outer, std::int64_t inner, bool msb, int kind, double high,
        double low, const double* gamma, std::int64_t pixels_per_sample,
        const void* noise,  // C like pred, or null: the stream of (seed, offset)
        std::uint64_t seed, std::uint32_t offset,
        const void* weight,  // C [P / pixels_per_weight], or null
        std::int64_t pixels_per_weight, double eps,
        const void* upstream,  // C [1] or [P], or null
        bool upstream_per_pixel, double slope_scale, int threads, double* partial,
        // outputs
        double* total,     // [1]
        void* pixel_loss,  // C [P], or null: w times the sum over channels
        void* slope);      // like pred, or null

    // Blocks of pixels of the softmax kernels; bits_softmax_loss has an entry of `partial` for
    // each.
    std::int64_t bits_softmax_blocks(std::int64_t outer, std::int64_t inner);

    // Sum of w (logsumexp(l_g) - l_g[t_g]) over pixels and groups of m bits; t_g is the group's
    // bits as an integer. slope = slope_scale upstream w (softmax - onehot). As bits_loss
    // otherwise.
    std::uint64_t bits_softmax_loss(const void* logits,  // [outer, groups 2^m, inner], contiguous
                                    int dtype, const void* x, int x_dtype,
                                    std::int64_t x_outer_stride, std::int64_t x_map_stride,
                                    std::int64_t x_inner_stride, const std::int32_t* n_bits,
                                    std::int64_t maps, std::int64_t outer, std::int64_t inner,
                                    bool msb, std::int64_t groups, int m, const void* weight,
                                    std::int64_t pixels_per_weight, const void* upstream,
                                    bool upstream_per_pixel, double slope_scale, int threads,
                                    void* work,  // float [threads, 16, 2^m]
                                    double* partial,
                                    // outputs
                                    double* total, void* pixel_loss,
                                    void* slope);  // like logits, or null, or logits itself

    // out[o, g m + j, i] = scale (2 E_j - 1), E_j the probability that bit j of group g is set.
    void bits_softmax_expectation(const void* logits,  // [outer, groups 2^m, inner], contiguous
                                  int dtype, std::int64_t outer, std::int64_t inner, bool msb,
                                  std::int64_t groups, int m, double scale, int out_dtype,
                                  int threads,
                                  void* work,  // float [threads, 16, 2^m]
                                  // outputs
                                  void* out);  // [outer, groups m, inner]

    void bits_softmax_expectation_slope(const void* logits, int dtype, std::int64_t outer,
                                        std::int64_t inner, bool msb, std::int64_t groups, int m,
                                        double scale,
                                        const void* upstream,  // float [outer, groups m, inner]
                                        int threads,
                                        void* work,  // float [threads, 17, 2^m]
                                        // outputs
                                        void* slope);  // like logits

    // x_prev = A x_t + B x0 + S z for each value, x0 from the guided prediction, clipped. A sample
    // of every tensor is `size` contiguous values; those of C tensors begin at their own strides.
    void bits_step(const void* x,  // C [samples, size], float64 or float32
                   int dtype, std::int64_t x_stride,
                   const void* pred,  // [samples, size]
                   int pred_dtype,
                   const void* uncond,  // like pred, or null
                   const void* noise,   // C [samples, size], or null: no noise
                   const void* sigma,   // C [samples, size], or null: S of the sample
                   std::int64_t samples, std::int64_t size,
                   const double* coefficients,  // [samples or 1, 5]: sqrt(g), sqrt(1-g), A, B, S
                   bool per_sample, int kind, double guidance, double clip, double scale,
                   int threads, std::int64_t out_stride, std::int64_t x0_stride,
                   // outputs
                   void* out,      // C [samples, size]; may be x
                   void* x0_out);  // C [samples, size], or null

    // out[s, p] = u[id] pixels / sum over pixels of u, u = (1 / (count + 1))^power by id of sample
    // s. Ids outside [0, n_ids) weigh 0^power; returns whether there are any.
    std::uint64_t instance_weights(const void* ids, int dtype, std::int64_t sample_stride,
                                   std::int64_t pixel_stride, std::int64_t samples,
                                   std::int64_t pixels, std::int64_t n_ids, double power,
                                   int threads,
                                   std::int32_t* work,  // [samples, 5 (n_ids + 1)]
                                   // outputs
                                   float* out);  // [samples, pixels]
)
