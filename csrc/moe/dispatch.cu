// SPDX-License-Identifier: Apache-2.0
// Launchers of dispatch.cuh.
#include "dispatch.cuh"

#include <algorithm>

#include "device/launch.h"

namespace comet_ds {
namespace {

constexpr int64_t kMaxSmemBytes = 227 * 1024;  // a CTA has

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t plan_smem_bytes(int64_t num_experts, int num_ranks) {
    return (num_experts * (2 * num_ranks + 2) + 1) * sizeof(int);
}

template <typename T>
void launch_row_dots(const Sources& sources, const RowPlan& plan, const float* row_dots,
                     int64_t num_tiles, const void* grad_rows, const void* const* bias,
                     int64_t hidden, cudaStream_t stream) {
    const int64_t num_blocks = ceil_div(plan.num_tokens * plan.top_k, kRowWarps);
    sum_row_dots_kernel<<<num_blocks, kRowWarps * 32, 0, stream>>>(
        sources, plan, row_dots, num_tiles, static_cast<const T*>(grad_rows), bias, hidden);
}

template <typename T>
void launch_expert_rows(const RowPlan& plan, const void* rows, bool is_weighted, int64_t cols,
                        void* grad_bias, cudaStream_t stream) {
    const dim3 grid(plan.num_experts, ceil_div(cols, kSumCols));
    sum_expert_rows_kernel<<<grid, kSumCols / 2 * kSumSlices, 0, stream>>>(
        plan, static_cast<const T*>(rows), is_weighted, cols, static_cast<T*>(grad_bias));
}

}  // namespace

bool can_plan(int64_t num_experts, int num_ranks) {
    return plan_smem_bytes(num_experts, num_ranks) <= kMaxSmemBytes;
}

void plan_rows(const Sources& sources, const RowPlan& plan, cudaStream_t stream) {
    const int64_t num_items = std::max(plan.num_tokens * plan.top_k, plan.num_experts * kRowBlock);
    const int64_t smem_bytes = plan_smem_bytes(plan.num_experts, sources.num_ranks);
    const auto kSmem = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(plan_rows_kernel, kSmem, smem_bytes), "plan_rows");
    plan_rows_kernel<<<ceil_div(num_items, kPlanThreads), kPlanThreads, smem_bytes, stream>>>(
        sources, plan);
    check_launch("plan_rows");
}

void dispatch_rows(const Sources& sources, const RowPlan& plan, void* rows, int64_t row_bytes,
                   cudaStream_t stream) {
    const int64_t row_vectors = row_bytes / sizeof(uint4);
    const int64_t num_tokens = sources.source[sources.rank].num_tokens;
    const int64_t num_parts = num_tokens * ceil_div(row_vectors, kCopyVectors * 32);
    const int64_t num_token_blocks = ceil_div(num_parts, kRowWarps);
    dispatch_rows_kernel<<<num_token_blocks + plan.num_experts, kRowWarps * 32, 0, stream>>>(
        sources, plan, static_cast<uint4*>(rows), row_vectors, num_token_blocks);
    check_launch("dispatch_rows");
}

void sum_row_dots(const Sources& sources, const RowPlan& plan, const float* row_dots,
                  int64_t num_tiles, const void* grad_rows, const void* const* bias,
                  int64_t hidden, bool is_bfloat16, cudaStream_t stream) {
    if (plan.num_tokens == 0) return;
    const auto launch = is_bfloat16 ? launch_row_dots<__nv_bfloat16> : launch_row_dots<__half>;
    launch(sources, plan, row_dots, num_tiles, grad_rows, bias, hidden, stream);
    check_launch("sum_row_dots");
}

void sum_expert_rows(const RowPlan& plan, const void* rows, bool is_weighted, int64_t cols,
                     bool is_bfloat16, void* grad_bias, cudaStream_t stream) {
    const auto launch =
        is_bfloat16 ? launch_expert_rows<__nv_bfloat16> : launch_expert_rows<__half>;
    launch(plan, rows, is_weighted, cols, grad_bias, stream);
    check_launch("sum_expert_rows");
}

}  // namespace comet_ds
