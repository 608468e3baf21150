// SPDX-License-Identifier: Apache-2.0
// Loads and stores of several neighbouring elements at once, and their conversion to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace comet_ds {

// The widest load or store of one thread.
constexpr int kVectorBytes = 16;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) { return x; }
template <>
__device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
    T value[kSize];
};

}  // namespace comet_ds
