// SPDX-License-Identifier: Apache-2.0
// Logits of the gate on tensor cores: host launcher.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace comet_ds {

struct GateLogitsParams {
    CUtensorMap x;       // [num_tokens, hidden] bf16, boxes of 64 x 64
    CUtensorMap weight;  // [num_experts, hidden] bf16, boxes of 64 x 64
    float* logits;       // [num_tokens, num_experts]
    int num_tokens;
    int num_experts;
    int hidden;
};

// Throws std::runtime_error when the launch fails.
void gate_logits(const GateLogitsParams& params, cudaStream_t stream);

}  // namespace comet_ds
