// SPDX-License-Identifier: Apache-2.0
// Launcher of gate_logits.cuh.
#include "gate/gate_logits.cuh"

#include "host/launch.h"

namespace comet_ds {

void gate_logits(const GateLogitsParams& p, cudaStream_t stream) {
    const dim3 grid((p.num_tokens + kLogitsTokens - 1) / kLogitsTokens,
                    (p.num_experts + kLogitsExperts - 1) / kLogitsExperts);
    launch("gate_logits", gate_logits_kernel, {grid, kLogitsThreads, kLogitsSmemBytes}, stream, p);
}

}  // namespace comet_ds
