// SPDX-License-Identifier: Apache-2.0
// Activations of expert MLPs and their derivatives, in fp32. NaN gives NaN.
#pragma once

#include "gemm/expert_gemm.h"

namespace comet_ds {

// 1 / (1 + exp(-x)) with two special-function instructions. NOTE: .ftz avoids the instructions that
// handle subnormals.
__device__ inline float sigmoid(float x) {
    constexpr float kLog2E = 1.44269504f;
    float exp, result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exp) : "f"(-kLog2E * x));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + exp));
    return result;
}

struct ValueAndSlope {
    float value;
    float slope;
};

template <Activation kActivation>
__device__ inline ValueAndSlope activate(float x) {
    if constexpr (kActivation == Activation::kGelu) {
        constexpr float kInvSqrt2 = 0.70710678f, kInvSqrt2Pi = 0.39894228f;
        const float cdf = 0.5f * (1.0f + erff(x * kInvSqrt2));
        return {x * cdf, cdf + x * kInvSqrt2Pi * __expf(-0.5f * x * x)};
    } else if constexpr (kActivation == Activation::kGeluTanh) {
        constexpr float kSqrt2OverPi = 0.79788456f, kCubic = 0.044715f;
        // 0.5 (1 + tanh(y)) = sigmoid(2 y)
        const float s = sigmoid(2.0f * kSqrt2OverPi * (x + kCubic * x * x * x));
        const float inner_slope = 2.0f * kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
        return {x * s, s + x * s * (1.0f - s) * inner_slope};
    } else if constexpr (kActivation == Activation::kRelu) {
        return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
    } else {
        const float s = sigmoid(x);
        return {x * s, s * (1.0f + x * (1.0f - s))};
    }
}

}  // namespace comet_ds
