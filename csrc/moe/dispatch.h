// SPDX-License-Identifier: Apache-2.0
// Rows of the experts' GEMMs: where they lie, bringing tokens there, and the small sums over them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace comet_ds {

struct RowPlanParams {
    const int64_t* topk_ids;     // [num_tokens, top_k]; -1 = dropped
    const float* topk_weights;   // [num_tokens, top_k]
    const int32_t* ranks;        // [num_tokens, top_k]: position among the expert's routes
    const int32_t* kept_counts;  // [num_experts]
    int64_t* row_of_route;       // [num_tokens, top_k]; -1 = dropped
    int32_t* token_of_row;       // [max_rows]; -1 = padding
    float* row_weights;          // [max_rows]; 0 in padding
    int32_t* expert_offsets;     // [num_experts + 1], multiples of kRowBlock
    int32_t* expert_of_block;    // [max_rows / kRowBlock]
    int64_t num_tokens;
    int64_t top_k;
    int64_t num_experts;
};

// What the other kernels read of it.
struct RowPlan {
    const int64_t* row_of_route;
    const int32_t* token_of_row;
    const float* row_weights;
    const int32_t* expert_offsets;
    int64_t num_tokens;
    int64_t top_k;
    int64_t num_experts;
    int64_t max_rows;
};

// All throw std::runtime_error when a launch fails.
void plan_rows(const RowPlanParams& params, cudaStream_t stream);

// rows[r] = tokens[token_of_row[r]], zero in padding; both of row_bytes, a multiple of 16.
void dispatch_rows(const RowPlan& plan, const void* tokens, void* rows, int64_t row_bytes,
                   cudaStream_t stream);

// grad_weights[t, k] = sum over tiles of row_dots[tile, r], plus <grad[t], bias of r's expert>
// where there are biases; 0 where dropped. row_dots: [num_tiles, max_rows].
void sum_row_dots(const RowPlan& plan, const int64_t* topk_ids, const float* row_dots,
                  int64_t num_tiles, const void* grad, const void* const* bias, int64_t hidden,
                  bool is_bfloat16, float* grad_weights, cudaStream_t stream);

// grad_bias[e] = sum over the expert's rows of rows[r], or of row_weights[r] rows[r]. rows:
// [max_rows, cols], grad_bias: [num_experts, cols].
void sum_expert_rows(const RowPlan& plan, const void* rows, bool is_weighted, int64_t cols,
                     bool is_bfloat16, void* grad_bias, cudaStream_t stream);

}  // namespace comet_ds
