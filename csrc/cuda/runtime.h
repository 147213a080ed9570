// What the binding asks the CUDA runtime, which is linked statically: no driver is needed to load.
#pragma once

namespace foveate {

// Number of devices, [1]; the status is not 0 where there is no driver.
int cuda_devices(
    // outputs
    int* count);

// What a status that is not 0 means.
const char* cuda_error(int status);

}  // namespace foveate
