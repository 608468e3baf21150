// SPDX-License-Identifier: Apache-2.0
// Launching kernels, and errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

namespace comet_ds {

inline void check(cudaError_t error, const char* op) {
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
    }
}

struct LaunchShape {
    dim3 grid;
    dim3 block;
    size_t smem_bytes = 0;  // dynamic
    unsigned cluster_size = 1;
};

// Lets a kernel have so much dynamic shared memory on the current device, once for each size.
inline void allow_smem(const char* op, const void* kernel, size_t num_bytes) {
    constexpr size_t kWithoutAsking = 48 * 1024;
    if (num_bytes <= kWithoutAsking) return;
    static thread_local std::map<std::pair<const void*, int>, size_t> allowed;
    int device;
    check(cudaGetDevice(&device), op);
    size_t& found = allowed[{kernel, device}];
    if (found == num_bytes) return;
    const auto kSmem = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(kernel, kSmem, static_cast<int>(num_bytes)), op);
    found = num_bytes;
}

// Launches a kernel that waits (kernel_order.cuh) before it touches global memory: its CTAs take
// their places while the last ones of the kernel before still run.
template <typename... Params>
void launch(const char* op, void (*kernel)(Params...), const LaunchShape& shape,
            cudaStream_t stream, const std::type_identity_t<Params>&... arguments) {
    const auto* address = reinterpret_cast<const void*>(kernel);
    allow_smem(op, address, shape.smem_bytes);
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {shape.cluster_size, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.smem_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = shape.cluster_size > 1 ? 2 : 1;
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
    check(cudaLaunchKernelExC(&config, address, pointers), op);
}

}  // namespace comet_ds
