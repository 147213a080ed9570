#include <cuda_runtime.h>

#include "runtime.h"

namespace foveate {

int cuda_devices(int* count) { return static_cast<int>(cudaGetDeviceCount(count)); }

const char* cuda_error(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace foveate
