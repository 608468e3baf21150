// SPDX-License-Identifier: Apache-2.0
// Row order of a routing, and of a chunk of tokens that has arrived: parameters and host launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace comet_ds {

// Routes that one CTA sorts. The scratch buffer holds a histogram for each of these blocks of
// routes.
constexpr int64_t kRoutesPerBlock = 256;
// Most segments (ranks x experts x parts of the tokens) that fit in shared memory.
constexpr int64_t kMaxSegments = 2048;

struct RoutePlanParams {
    const int64_t* topk_ids;           // [num_tokens, top_k]; -1 = dropped
    const int64_t* segment_of_expert;  // [num_parts, num_experts]
    int64_t* row_of_route;             // [num_tokens, top_k]; -1 = dropped
    int64_t* token_of_row;             // [num_tokens * top_k]; dropped routes last
    int64_t* segment_counts;           // [num_parts * num_experts]
    int32_t* scratch;                  // [ceil(routes / kRoutesPerBlock), segments + 1]
    int64_t num_tokens;
    int64_t top_k;
    int64_t num_parts;
    int64_t num_experts;
};

struct ArrivalParams {
    const int64_t* counts;  // [num_ranks, num_experts], rows counts_stride apart
    int64_t counts_stride;  // in elements
    int64_t* order;         // [num_rows]
    int64_t* inverse;       // [num_rows]
    int32_t* offsets;       // [num_experts]: end of each expert's rows
    int64_t num_rows;
    int64_t num_ranks;
    int64_t num_experts;
};

// Both throw std::runtime_error when a launch fails.
void plan_routes(const RoutePlanParams& params, cudaStream_t stream);
void order_arrival(const ArrivalParams& params, cudaStream_t stream);

}  // namespace comet_ds
