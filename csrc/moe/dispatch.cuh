// SPDX-License-Identifier: Apache-2.0
// Rows of the experts' GEMMs: where they lie, bringing tokens there, and the small sums over them.
//
// 1. Math: dispatch.h. Rows are sorted by expert, tokens ascending, each expert's padded to a
//    multiple of kRowBlock: row = expert_offsets[e] + rank.
// 2. Grid: plan one thread a route or padding row; dispatch one warp kCopyVectors x 32 vectors of a
//    token, behind these one block an expert for its padding; dots one warp a route; expert sums
//    one block an expert and kSumCols columns.
// 3. Flags: none. No atomics; sums run in a fixed order.
// 4. Shared memory: plan 4 (E + 1) bytes, expert sums 2 KB.
#pragma once

#include "device/vector.cuh"
#include "dispatch.h"
#include "expert_gemm.h"

namespace comet_ds {

constexpr int kPlanThreads = 256;
constexpr int kRowWarps = 8;
constexpr int kCopyVectors = 4;
constexpr int kSumCols = 64;
constexpr int kSumSlices = 8;

__global__ void __launch_bounds__(kPlanThreads) plan_rows_kernel(RowPlanParams p) {
    extern __shared__ int smem_offsets[];  // [num_experts + 1]
    for (int expert = threadIdx.x; expert <= p.num_experts; expert += kPlanThreads) {
        int offset = 0;
        for (int before = 0; before < expert; ++before) {
            offset += (p.kept_counts[before] + kRowBlock - 1) / kRowBlock * kRowBlock;
        }
        smem_offsets[expert] = offset;
        if (blockIdx.x == 0) p.expert_offsets[expert] = offset;
    }
    __syncthreads();
    const int64_t i = int64_t{blockIdx.x} * kPlanThreads + threadIdx.x;
    if (i < p.num_tokens * p.top_k) {
        const int64_t expert = p.topk_ids[i];
        const int row = expert < 0 ? -1 : smem_offsets[expert] + p.ranks[i];
        p.row_of_route[i] = row;
        if (row >= 0) {
            p.token_of_row[row] = i / p.top_k;
            p.row_weights[row] = p.topk_weights[i];
        }
    }
    // The i-th padding row an expert may have, and its i-th block.
    const int64_t expert = i / kRowBlock;
    if (expert < p.num_experts) {
        const int end = smem_offsets[expert + 1];
        const int row = smem_offsets[expert] + p.kept_counts[expert] + i % kRowBlock;
        if (row < end) {
            p.token_of_row[row] = -1;
            p.row_weights[row] = 0.0f;
        }
        const int first_block = smem_offsets[expert] / kRowBlock;
        for (int block = first_block + i % kRowBlock; block < end / kRowBlock; block += kRowBlock) {
            p.expert_of_block[block] = expert;
        }
    }
}

__global__ void __launch_bounds__(kRowWarps * 32)
    dispatch_rows_kernel(RowPlan plan, const uint4* tokens, uint4* rows, int64_t row_vectors,
                         int64_t num_token_blocks) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (blockIdx.x >= num_token_blocks) {
        const int64_t expert = blockIdx.x - num_token_blocks;
        const int64_t begin = plan.expert_offsets[expert], end = plan.expert_offsets[expert + 1];
        for (int64_t row = end - 1 - warp; row >= begin && plan.token_of_row[row] < 0;
             row -= kRowWarps) {
            for (int64_t i = lane; i < row_vectors; i += 32) rows[row * row_vectors + i] = uint4{};
        }
        return;
    }
    // A token is read once and written to all its rows.
    const int64_t parts = (row_vectors + kCopyVectors * 32 - 1) / (kCopyVectors * 32);
    const int64_t item = int64_t{blockIdx.x} * kRowWarps + warp;
    const int64_t token = item / parts, first = item % parts * kCopyVectors * 32 + lane;
    if (token >= plan.num_tokens) return;
    uint4 part[kCopyVectors];
#pragma unroll
    for (int i = 0; i < kCopyVectors; ++i) {
        const int64_t at = first + i * 32;
        if (at < row_vectors) part[i] = tokens[token * row_vectors + at];
    }
    for (int64_t k = 0; k < plan.top_k; ++k) {
        const int64_t row = plan.row_of_route[token * plan.top_k + k];
        if (row < 0) continue;
#pragma unroll
        for (int i = 0; i < kCopyVectors; ++i) {
            const int64_t at = first + i * 32;
            if (at < row_vectors) rows[row * row_vectors + at] = part[i];
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kRowWarps * 32)
    sum_row_dots_kernel(RowPlan plan, const int64_t* topk_ids, const float* row_dots,
                        int64_t num_tiles, const T* grad, const void* const* bias, int64_t hidden,
                        float* grad_weights) {
    const int64_t route = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
    if (route >= plan.num_tokens * plan.top_k) return;
    const int lane = threadIdx.x % 32;
    const int64_t row = plan.row_of_route[route];
    float sum = 0.0f;
    if (row >= 0) {
        for (int64_t tile = lane; tile < num_tiles; tile += 32) {
            sum += row_dots[tile * plan.max_rows + row];
        }
        if (bias != nullptr) {
            const auto* expert_bias = static_cast<const T*>(bias[topk_ids[route]]);
            const T* token = grad + route / plan.top_k * hidden;
            for (int64_t i = lane; i < hidden; i += 32) {
                sum += to_float(token[i]) * to_float(expert_bias[i]);
            }
        }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (lane == 0) grad_weights[route] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kSumCols / 2 * kSumSlices)
    sum_expert_rows_kernel(RowPlan plan, const T* rows, bool is_weighted, int64_t cols,
                           T* grad_bias) {
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
