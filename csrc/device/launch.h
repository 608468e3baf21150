// SPDX-License-Identifier: Apache-2.0
// What every launcher does after a launch.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace comet_ds {

inline void check_launch(const char* op) {
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
    }
}

}  // namespace comet_ds
