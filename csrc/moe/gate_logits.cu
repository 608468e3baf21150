// SPDX-License-Identifier: Apache-2.0
// Launcher of gate_logits.cuh.
#include "gate_logits.cuh"

#include "device/launch.h"

namespace comet_ds {

void gate_logits(const GateLogitsParams& p, cudaStream_t stream) {
    const dim3 grid((p.num_tokens + kLogitsTokens - 1) / kLogitsTokens,
                    (p.num_experts + kLogitsExperts - 1) / kLogitsExperts);
    cudaFuncSetAttribute(gate_logits_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         kLogitsSmemBytes);
    gate_logits_kernel<<<grid, kLogitsThreads, kLogitsSmemBytes, stream>>>(p);
    check_launch("gate_logits");
}

}  // namespace comet_ds
