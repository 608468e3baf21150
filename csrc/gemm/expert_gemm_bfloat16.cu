// SPDX-License-Identifier: Apache-2.0
// The grouped GEMMs of bfloat16.
#include "gemm/expert_gemm_launch.cuh"

namespace comet_ds {

COMET_EXPERT_GEMMS(template, __nv_bfloat16);

}  // namespace comet_ds
