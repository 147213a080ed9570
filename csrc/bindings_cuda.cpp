// The Python face of the CUDA kernels: addresses in as integers, the GIL released, one launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/ncut.h"
#include "cuda/runtime.h"
#include "wire.h"

namespace py = pybind11;

namespace {

// A launcher returns a CUDA status; one that is not 0 is raised under the launcher's name.
template <typename... A>
void def(py::module_& m, const char* name, int (*launch)(A...)) {
  m.def(name, [=](typename foveate::Wire<A>::type... args) {
    int status = 0;
    {
      py::gil_scoped_release nogil;
      status = launch(foveate::Wire<A>::unpack(args)...);
    }
    if (status != 0) {
      throw std::runtime_error(std::string(name) + ": " + foveate::cuda_error(status));
    }
  });
}

// Why no kernel can run here, although the module is built; nothing if one can.
std::optional<std::string> missing_device() {
  int count = 0;
  const int status = foveate::cuda_devices(&count);
  if (status != 0) return std::string("the CUDA runtime: ") + foveate::cuda_error(status);
  if (count == 0) return "the CUDA runtime finds no device";
  return std::nullopt;
}

}  // namespace

#define FOVEATE_DEF(m, fn) def(m, #fn, &foveate::fn)

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of foveate; called by foveate.ops.*.cuda";
  m.def("missing_device", &missing_device, "why no device can run the kernels, or None");

  // ncut
  m.def("ncut_scratch", &foveate::ncut_scratch, "doubles of scratch that an image needs");
  FOVEATE_DEF(m, ncut_lanczos);
}
