// SPDX-License-Identifier: Apache-2.0
// Chooses the element type of a grouped GEMM.
#include "gemm/expert_gemm_launch.cuh"

namespace comet_ds {

template <typename Params>
void expert_gemm(const Params& params, const ExpertGemmVariant& variant,
                 const Communication& communication, int num_sms, cudaStream_t stream) {
    const auto run = variant.is_bfloat16 ? launch_expert_gemm<__nv_bfloat16, Params>
                                         : launch_expert_gemm<__half, Params>;
    run(params, variant, communication, num_sms, stream);
}

#define COMET_INSTANTIATE(PARAMS)                                                            \
    template void expert_gemm(const PARAMS&, const ExpertGemmVariant&, const Communication&, \
                              int, cudaStream_t)
COMET_INSTANTIATE(UpParams);
COMET_INSTANTIATE(DownParams);
COMET_INSTANTIATE(DownGradParams);
COMET_INSTANTIATE(UpGradParams);
COMET_INSTANTIATE(WeightGradParams);
#undef COMET_INSTANTIATE

}  // namespace comet_ds
