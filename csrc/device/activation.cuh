// SPDX-License-Identifier: Apache-2.0
// Activations of expert MLPs and their derivatives, in fp32; NaN goes through.
#pragma once

#include "moe/expert_gemm.h"

namespace comet_ds {

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
        const float inner = kSqrt2OverPi * (x + kCubic * x * x * x);
        const float tanh = 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * inner));
        const float inner_slope = kSqrt2OverPi * (1.0f + 3.0f * kCubic * x * x);
        return {0.5f * x * (1.0f + tanh),
                0.5f * (1.0f + tanh) + 0.5f * x * (1.0f - tanh * tanh) * inner_slope};
    } else if constexpr (kActivation == Activation::kRelu) {
        return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
    } else {
        const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-x));
        return {x * sigmoid, sigmoid * (1.0f + x * (1.0f - sigmoid))};
    }
}

}  // namespace comet_ds
