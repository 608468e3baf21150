// SPDX-License-Identifier: Apache-2.0
// Rows of the experts' GEMMs: where they lie, bringing tokens there, and the small sums over them.
//
// 1. Math: dispatch.h. Rows are sorted by expert, then by the token's rank in ring order from this
//    one, then by token; each expert's are padded to a multiple of kRowBlock.
// 2. Grid: plan kRowBlock threads an expert for every order, then a thread a route or padding row;
//    dispatch one warp kCopyVectors x 32 vectors of a token, behind these one block an expert for
//    its padding and the counters; dots kDotLanes lanes a route, with biases a warp; expert sums
//    one block an expert and kSumCols columns.
// 3. Flags: none. No atomics; sums run in a fixed order.
// 4. Shared memory: plan 4 (E (2 W + 2) + 1) bytes for E experts and W ranks, expert sums 2 KB.
#pragma once

#include "device/kernel_order.cuh"
#include "device/vector.cuh"
#include "dispatch.h"

namespace comet_ds {

constexpr int kPlanThreads = 256;
constexpr int kRowWarps = 8;
constexpr int kCopyVectors = 4;  // 16-byte loads a lane has in flight
constexpr int kDotLanes = 8;  // 1 takes longer than a warp, 8 half as long
constexpr int kSumCols = 64;
constexpr int kSumSlices = 8;

// The rank a token belongs to.
__device__ inline int source_of(const Sources& sources, int64_t token) {
    int rank = 0;
    while (token >= sources.source[rank].first_token + sources.source[rank].num_tokens) ++rank;
    return rank;
}

// The rank at a distance from this one, in ring order.
__host__ __device__ inline const Source& source_at(const Sources& sources, int distance) {
    return sources.source[(sources.rank + distance) % sources.num_ranks];
}

// Ranks other than its own that a token goes to, a bit each.
__device__ inline uint32_t peers_of(const int64_t* topk_ids, int64_t top_k, int num_experts,
                                    int own_rank) {
    uint32_t peers = 0;
    for (int64_t k = 0; k < top_k; ++k) {
        if (topk_ids[k] >= 0) peers |= 1u << topk_ids[k] / num_experts;
    }
    return peers & ~(1u << own_rank);
}

// Position of a segment's i-th element where segments follow each other, but the elements of each
// begin at an even position: an odd one waits for the next.
__device__ inline int position_of(int segment, int i, const int* sizes, int num_segments) {
    int before = 0, num_odd = 0;
    for (int other = 0; other < segment; ++other) {
        before += sizes[other];
        num_odd += sizes[other] % 2;
    }
    const int num_waiting = num_odd % 2;
    if (i < sizes[segment] / 2 * 2) return before - num_waiting + i;
    if (num_waiting == 1) return before + i;
    int end = before + sizes[segment];
    for (int other = segment + 1; other < num_segments; ++other) {
        end += sizes[other];
        if (sizes[other] % 2 == 1) return end - 2;
    }
    return end - 1;
}

// Rows of this rank's experts, in shared memory.
struct ExpertRows {
    int num_experts;
    int* offsets;  // [num_experts + 1]
    int* counts;   // [num_ranks, num_experts]: of tokens of this rank and those up to a distance
    int* totals;   // [num_experts], the last of counts

    // Blocks of an expert whose rows are all there when the tokens up to a distance have come.
    __device__ int complete(int expert, int distance) const {
        const int count = counts[distance * num_experts + expert];
        return (count == totals[expert] ? count + kRowBlock - 1 : count) / kRowBlock;
    }
};

// Threads of one order; `sizes` is shared memory for its segments, `thread` counts those of all its
// blocks, whole ones.
__device__ inline void plan_order(const RowPlan& plan, const ExpertRows& rows, int num_ranks,
                                  int order, int thread, int* sizes) {
    const int num_experts = rows.num_experts, num_split = plan.num_split[order];
    const bool by_distance = num_split == num_experts;
    const int num_segments = by_distance ? num_ranks * num_experts : num_experts + num_split;
    for (int segment = threadIdx.x; segment < num_segments; segment += kPlanThreads) {
        const int expert = segment % num_experts, round = segment / num_experts;
        const int first = round == 0 ? 0 : rows.complete(expert, round - 1);
        const bool is_rest = expert >= num_split || (round > 0 && !by_distance);
        sizes[segment] = rows.complete(expert, is_rest ? num_ranks - 1 : round) - first;
    }
    __syncthreads();
    if (thread < num_ranks) {
        const int before = by_distance || thread == 0 ? thread * num_experts : num_split;
        int position = 0;
        for (int segment = 0; segment < before; ++segment) position += sizes[segment];
        plan.remote_begin[order * num_ranks + thread] = position / 2 * 2;
    }
    const int expert = thread / kRowBlock;
    if (expert >= num_experts) return;
    const int num_blocks = rows.complete(expert, num_ranks - 1);
    for (int j = thread % kRowBlock; j < num_blocks; j += kRowBlock) {
        int segment = expert, index = j;
        while (index >= sizes[segment]) index -= sizes[segment], segment += num_experts;
        const int position = position_of(segment, index, sizes, num_segments);
        const int64_t at = order * (plan.max_rows / kRowBlock) + position;
        plan.block_order[at] = rows.offsets[expert] / kRowBlock + j;
        plan.expert_order[at] = expert;
    }
}

__global__ void __launch_bounds__(kPlanThreads)
    plan_rows_kernel(const __grid_constant__ Sources sources,
                     const __grid_constant__ RowPlan plan, int blocks_per_order) {
    begin_kernel();
    extern __shared__ int smem[];
    const int num_experts = plan.num_experts, num_ranks = sources.num_ranks;
    int* const offsets = smem;
    int* const counts = offsets + num_experts + 1;
    int* const totals = counts + (num_ranks - 1) * num_experts;
    int* const sizes = totals + num_experts;
    const int64_t first_expert = int64_t{sources.rank} * num_experts;
    for (int expert = threadIdx.x; expert < num_experts; expert += kPlanThreads) {
        int count = 0;
        for (int distance = 0; distance < num_ranks; ++distance) {
            const int rank = (sources.rank + distance) % num_ranks;
            count += sources.source[rank].kept_counts[first_expert + expert];
            counts[distance * num_experts + expert] = count;
        }
    }
    __syncthreads();
    for (int expert = threadIdx.x; expert <= num_experts; expert += kPlanThreads) {
        int offset = 0;
        for (int other = 0; other < expert; ++other) {
            offset += (totals[other] + kRowBlock - 1) / kRowBlock * kRowBlock;
        }
        offsets[expert] = offset;
        if (blockIdx.x == 0) plan.expert_offsets[expert] = offset;
    }
    __syncthreads();
    // The orders first: they take longest.
    const int order = blockIdx.x / blocks_per_order;
    if (order < plan.num_orders) {
        const int thread = blockIdx.x % blocks_per_order * kPlanThreads + threadIdx.x;
        plan_order(plan, {num_experts, offsets, counts, totals}, num_ranks, order, thread, sizes);
        return;
    }
    const int64_t block = blockIdx.x - plan.num_orders * blocks_per_order;
    const int64_t i = block * kPlanThreads + threadIdx.x;
    if (i < plan.num_tokens * plan.top_k) {
        const int64_t token = i / plan.top_k;
        const int rank = source_of(sources, token);
        const Source& source = sources.source[rank];
        const int64_t route = i - source.first_token * plan.top_k;
        const int64_t id = source.topk_ids[route], expert = id - first_expert;
        if (plan.topk_ids != source.topk_ids) plan.topk_ids[i] = id;
        int row = -1;
        if (id >= 0 && expert >= 0 && expert < num_experts) {
            const int distance = (rank - sources.rank + num_ranks) % num_ranks;
            const int before = distance == 0 ? 0 : counts[(distance - 1) * num_experts + expert];
            row = offsets[expert] + before + source.ranks[route];
            plan.token_of_row[row] = token;
            plan.row_weights[row] = plan.route_weights[i] = source.topk_weights[route];
        }
        plan.row_of_route[i] = row;
        if (i % plan.top_k == 0) {
            plan.peers[token] = peers_of(source.topk_ids + route, plan.top_k, num_experts, rank);
        }
    }
    // The i-th padding row an expert may have, and its i-th block.
    const int64_t expert = i / kRowBlock;
    if (expert < num_experts) {
        const int end = offsets[expert + 1];
        const int row = offsets[expert] + totals[expert] + i % kRowBlock;
        if (row < end) {
            plan.token_of_row[row] = -1;
            plan.row_weights[row] = 0.0f;
        }
        const int num_blocks = (end - offsets[expert]) / kRowBlock;
        for (int j = i % kRowBlock; j < num_blocks; j += kRowBlock) {
            const int block = offsets[expert] / kRowBlock + j, own = counts[expert];
            plan.remote_rows[block] = max(min(totals[expert], (j + 1) * kRowBlock) -
                                          max(own, j * kRowBlock), 0);
        }
    }
}

// Tokens of the ranks at distances from `distance` to before `end_distance`.
__global__ void __launch_bounds__(kRowWarps * 32)
    dispatch_rows_kernel(const __grid_constant__ Sources sources,
                         const __grid_constant__ RowPlan plan, int distance, int end_distance,
                         uint4* rows, uint4* published, int64_t row_vectors,
                         int64_t num_token_blocks, uint32_t* counters, int64_t num_counters) {
    begin_kernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (blockIdx.x >= num_token_blocks) {
        const int64_t thread = (blockIdx.x - num_token_blocks) * blockDim.x + threadIdx.x;
        for (int64_t i = thread; i < num_counters; i += plan.num_experts * blockDim.x) {
            counters[i] = 0;
        }
        const int64_t expert = blockIdx.x - num_token_blocks;
        const int64_t begin = plan.expert_offsets[expert], end = plan.expert_offsets[expert + 1];
        for (int64_t row = end - 1 - warp; row >= begin && plan.token_of_row[row] < 0;
             row -= kRowWarps) {
            for (int64_t i = lane; i < row_vectors; i += 32) rows[row * row_vectors + i] = uint4{};
        }
        return;
    }
    const int64_t parts = (row_vectors + kCopyVectors * 32 - 1) / (kCopyVectors * 32);
    const int64_t item = int64_t{blockIdx.x} * kRowWarps + warp;
    int64_t token = item / parts;
    for (; distance < end_distance; ++distance) {
        const int64_t num_tokens = source_at(sources, distance).num_tokens;
        if (token < num_tokens) break;
        token -= num_tokens;
    }
    if (distance == end_distance) return;
    const Source& source = source_at(sources, distance);
    // The token's part is read once, whatever the number of its rows.
    const uint4* from = static_cast<const uint4*>(source.tokens) + token * row_vectors;
    const int64_t first = item % parts * kCopyVectors * 32 + lane;
    uint4 part[kCopyVectors];
#pragma unroll
    for (int i = 0; i < kCopyVectors; ++i) {
        if (first + i * 32 < row_vectors) part[i] = from[first + i * 32];
    }
    const auto store = [&](uint4* to, int64_t row) {
#pragma unroll
        for (int i = 0; i < kCopyVectors; ++i) {
            const int64_t at = first + i * 32;
            if (at < row_vectors) to[row * row_vectors + at] = part[i];
        }
    };
    if (published != nullptr) store(published, token);
    const int64_t* row_of_route = plan.row_of_route + (source.first_token + token) * plan.top_k;
    for (int64_t k = 0; k < plan.top_k; ++k) {
        if (row_of_route[k] >= 0) store(rows, row_of_route[k]);
    }
}

// kLanes of a warp share a route.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kRowWarps * 32)
    sum_row_dots_kernel(const __grid_constant__ Sources sources,
                        const __grid_constant__ RowPlan plan, const float* row_dots,
                        int64_t num_tiles, const T* grad_rows, const void* const* bias,
                        int64_t hidden) {
    begin_kernel();
    const int64_t thread = int64_t{blockIdx.x} * kRowWarps * 32 + threadIdx.x;
    const int64_t route = thread / kLanes;
    const bool is_route = route < plan.num_tokens * plan.top_k;
    const int lane = threadIdx.x % kLanes;
    const int64_t row = is_route ? plan.row_of_route[route] : -1;
    const int64_t id = is_route ? plan.topk_ids[route] : -1;
    float sum = 0.0f;
    if (row >= 0) {
        for (int64_t tile = lane; tile < num_tiles; tile += kLanes) {
            sum += row_dots[tile * plan.max_rows + row];
        }
        if (bias != nullptr) {
            const int64_t expert = id - int64_t{sources.rank} * plan.num_experts;
            const auto* expert_bias = static_cast<const T*>(bias[expert]);
            for (int64_t i = lane; i < hidden; i += kLanes) {
                sum += to_float(grad_rows[row * hidden + i]) * to_float(expert_bias[i]);
            }
        }
    }
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (!is_route || lane > 0) return;
    const int rank = source_of(sources, route / plan.top_k);
    if (row < 0 && (rank != sources.rank || id >= 0)) return;  // another rank's to write
    const Source& source = sources.source[rank];
    source.grad_weights[route - source.first_token * plan.top_k] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kSumCols / 2 * kSumSlices)
    sum_expert_rows_kernel(RowPlan plan, const T* rows, bool is_weighted, int64_t cols,
                           T* grad_bias) {
    begin_kernel();
    __shared__ float2 smem_sum[kSumSlices][kSumCols / 2];
    const int64_t expert = blockIdx.x, slice = threadIdx.x / (kSumCols / 2);
    const int lane = threadIdx.x % (kSumCols / 2);
    const int64_t col = int64_t{blockIdx.y} * kSumCols + 2 * lane;
    float2 sum{0.0f, 0.0f};
    if (col < cols) {
        const int end = plan.expert_offsets[expert + 1];
#pragma unroll 4
        for (int row = plan.expert_offsets[expert] + slice; row < end; row += kSumSlices) {
            const auto pair = *reinterpret_cast<const Vector<T, 2>*>(rows + row * cols + col);
            const float weight = is_weighted ? plan.row_weights[row] : 1.0f;
            sum.x += weight * to_float(pair.value[0]);
            sum.y += weight * to_float(pair.value[1]);
        }
    }
    smem_sum[slice][lane] = sum;
    __syncthreads();
    if (slice > 0 || col >= cols) return;
    for (int other = 1; other < kSumSlices; ++other) {
        sum.x += smem_sum[other][lane].x;
        sum.y += smem_sum[other][lane].y;
    }
    *reinterpret_cast<Vector<T, 2>*>(grad_bias + expert * cols + col) =
        Vector<T, 2>{from_float<T>(sum.x), from_float<T>(sum.y)};
}

}  // namespace comet_ds
