// SPDX-License-Identifier: Apache-2.0
// Combine on one rank: the weighted sum of each token's rows, and its gradients. Host launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "host/dtype.h"

namespace comet_ds {

struct CombineParams {
    const void* rows;             // [R, hidden]
    const int64_t* row_of_route;  // [num_tokens, top_k]; -1 = dropped
    const float* weights;         // [num_tokens, top_k], or null for an unweighted sum
    void* output;                 // forward: [num_tokens, hidden]
    const void* grad;             // backward: [num_tokens, hidden]
    void* grad_rows;              // backward: [R, hidden]; rows without a route are left alone
    float* grad_weights;          // backward: [num_tokens, top_k]
    int64_t num_tokens;
    int64_t top_k;
    int64_t hidden;
};

// Both throw std::runtime_error when the launch fails. Pointers are device memory of `stream`'s
// device; rows, output, grad and grad_rows share `dtype`.
void combine_forward(const CombineParams& params, DType dtype, cudaStream_t stream);
void combine_backward(const CombineParams& params, DType dtype, cudaStream_t stream);

}  // namespace comet_ds
