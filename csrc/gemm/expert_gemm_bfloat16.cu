// SPDX-License-Identifier: Apache-2.0
// The grouped GEMMs of bfloat16.
#include "gemm/expert_gemm_launch.cuh"

namespace comet_ds {

template void launch_expert_gemm<__nv_bfloat16>(const ExpertGemmVariant&, const GemmLauncher&);

}  // namespace comet_ds
