// SPDX-License-Identifier: Apache-2.0
// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace comet_ds {

inline void check(cudaError_t error, const char* op) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
    }
}

inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

}  // namespace comet_ds
