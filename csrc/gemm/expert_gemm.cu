// SPDX-License-Identifier: Apache-2.0
// Chooses the element type of a grouped GEMM.
#include "gemm/expert_gemm_launch.cuh"

namespace comet_ds {

void expert_gemm(const ExpertGemmParams& params, const ExpertGemmVariant& variant,
                 const Communication& communication, int num_sms, cudaStream_t stream) {
    const GemmLauncher launcher{params, communication, num_sms, stream};
    if (variant.is_bfloat16) {
        launch_expert_gemm<__nv_bfloat16>(variant, launcher);
    } else {
        launch_expert_gemm<__half>(variant, launcher);
    }
}

}  // namespace comet_ds
