// SPDX-License-Identifier: Apache-2.0
// The grouped GEMMs of float16.
#include "gemm/expert_gemm_launch.cuh"

namespace comet_ds {

COMET_EXPERT_GEMMS(template, __half);

}  // namespace comet_ds
