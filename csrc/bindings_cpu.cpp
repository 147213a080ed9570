// The Python face of the CPU kernels: addresses in as integers, the GIL released, one call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "cpu/analog_bits.h"
#include "cpu/ncut.h"
#include "cpu/pairwise_loss.h"
#include "cpu/pearson.h"
#include "cpu/topdown_attention.h"
#include "wire.h"
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

bool avx2_supported() {
#if FOVEATE_HAS_AVX2_SET
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

bool use_avx2 = avx2_supported();

template <typename R, typename... A>
void def(py::module_& m, const char* name, R (*baseline)(A...), R (*avx2)(A...)) {
  m.def(name, [=](typename foveate::Wire<A>::type... args) -> R {
    py::gil_scoped_release nogil;
    return (use_avx2 ? avx2 : baseline)(foveate::Wire<A>::unpack(args)...);
  });
}

#if FOVEATE_HAS_AVX2_SET
#define FOVEATE_DEF(m, fn) def(m, #fn, &foveate::baseline::fn, &foveate::avx2::fn)
#else
#define FOVEATE_DEF(m, fn) def(m, #fn, &foveate::baseline::fn, &foveate::baseline::fn)
#endif

void set_isa(const std::string& name) {
  if (name != "baseline" && !(name == "avx2" && avx2_supported())) {
    throw py::value_error("isa must be 'baseline'" +
                          std::string(avx2_supported() ? " or 'avx2'" : " on this machine") +
                          ", got '" + name + "'");
  }
  use_avx2 = name == "avx2";
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of foveate; called by foveate.ops.*.cpu";
  m.def("set_isa", &set_isa, "choose the instruction set: 'baseline' or 'avx2' (for tests)");
  m.def("isa", [] { return use_avx2 ? "avx2" : "baseline"; });
  m.def("isas", [] {
    return avx2_supported() ? std::vector<std::string>{"baseline", "avx2"}
                            : std::vector<std::string>{"baseline"};
  });
#if defined(_OPENMP)
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif

  // analog_bits
  FOVEATE_DEF(m, bits_encode);
  FOVEATE_DEF(m, bits_decode);
  FOVEATE_DEF(m, bits_loss);
  FOVEATE_DEF(m, bits_loss_tiles);
  FOVEATE_DEF(m, bits_noise);
  FOVEATE_DEF(m, bits_q_sample);
  FOVEATE_DEF(m, bits_step);
  FOVEATE_DEF(m, instance_weights);
  FOVEATE_DEF(m, bits_softmax_blocks);
  FOVEATE_DEF(m, bits_softmax_loss);
  FOVEATE_DEF(m, bits_softmax_expectation);
  FOVEATE_DEF(m, bits_softmax_expectation_slope);

  // ncut
  FOVEATE_DEF(m, ncut_normalize);
  FOVEATE_DEF(m, ncut_pack);
  FOVEATE_DEF(m, ncut_degrees);
  FOVEATE_DEF(m, ncut_paint);
  FOVEATE_DEF(m, ncut_scan);
  FOVEATE_DEF(m, ncut_pack_values);
  FOVEATE_DEF(m, ncut_row_sums);
  FOVEATE_DEF(m, ncut_lanczos);
  FOVEATE_DEF(m, ncut_component);
  FOVEATE_DEF(m, ncut_maskcut);
  // pearson
  FOVEATE_DEF(m, pearson_moments);
  FOVEATE_DEF(m, pearson_stage);
  FOVEATE_DEF(m, pearson_fold);
  FOVEATE_DEF(m, pearson_finalize);
  FOVEATE_DEF(m, pearson_topk);
  // pairwise_loss
  FOVEATE_DEF(m, sigmoid_loss_fwd);
  FOVEATE_DEF(m, pair_stats);
  FOVEATE_DEF(m, info_nce_lse);
  FOVEATE_DEF(m, info_nce_grad);
  // topdown_attention
  FOVEATE_DEF(m, prompt_select_blocks);
  FOVEATE_DEF(m, prompt_select_fwd);
  FOVEATE_DEF(m, prompt_select_bwd);
  FOVEATE_DEF(m, topdown_attention_fwd_work);
  FOVEATE_DEF(m, topdown_attention_fwd);
  FOVEATE_DEF(m, topdown_attention_bwd_work);
  FOVEATE_DEF(m, topdown_attention_bwd);
}
