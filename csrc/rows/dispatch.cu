// SPDX-License-Identifier: Apache-2.0
// Launchers of dispatch.cuh.
#include "rows/dispatch.cuh"

#include <algorithm>

#include "host/launch.h"

namespace comet_ds {
namespace {

constexpr int64_t kMaxSmemBytes = 227 * 1024;  // of a CTA on Hopper

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t plan_smem_bytes(int64_t num_experts, int num_ranks) {
    return (num_experts * (2 * num_ranks + 2) + 1) * sizeof(int);
}

OperandRows operand_rows(void* rows, int64_t row_bytes) {
    return {static_cast<uint4*>(rows), row_bytes / int64_t{sizeof(uint4)}};
}

int token_ctas(const OperandRows& to, int64_t num_tokens) {
    return ceil_div(num_tokens * to.parts(), kRowWarps);
}

// Launches the plan's CTAs and, after them, those for own tokens and for the experts' padding.
void launch_plan(const char* op, const Sources& sources, const RowPlan& plan,
                 const OperandRows& to, int num_token_ctas, int64_t num_expert_ctas,
                 const Words& counters, cudaStream_t stream) {
    const int64_t num_items = std::max(plan.num_tokens * plan.top_k, plan.num_experts * kRowBlock);
    const int ctas_per_tile_order = ceil_div(plan.num_experts * kRowBlock, kPlanThreads);
    const int num_plan_ctas =
        plan.num_tile_orders * ctas_per_tile_order + ceil_div(num_items, kPlanThreads);
    const unsigned num_ctas = num_plan_ctas + num_token_ctas + num_expert_ctas;
    const size_t smem_bytes = plan_smem_bytes(plan.num_experts, sources.num_ranks);
    launch(op, plan_and_dispatch_kernel, {num_ctas, kPlanThreads, smem_bytes}, stream, sources,
           plan, ctas_per_tile_order, num_plan_ctas, num_token_ctas, to, counters);
}

template <typename T>
void launch_row_dots(const Sources& sources, const RowPlan& plan, const float* row_dots,
                     int64_t num_tiles, const void* grad_rows, const void* const* bias,
                     int64_t hidden, cudaStream_t stream) {
    const bool has_bias = bias != nullptr;
    const auto kernel = has_bias ? sum_row_dots_kernel<T, 32> : sum_row_dots_kernel<T, kDotLanes>;
    const unsigned num_threads = kRowWarps * 32, lanes = has_bias ? 32 : kDotLanes;
    const unsigned num_ctas = ceil_div(plan.num_tokens * plan.top_k * lanes, num_threads);
    launch("sum_row_dots", kernel, {num_ctas, num_threads}, stream, sources, plan, row_dots,
           num_tiles, static_cast<const T*>(grad_rows), bias, hidden);
}

template <typename T>
void launch_expert_rows(const RowPlan& plan, const void* rows, bool is_weighted, int64_t cols,
                        void* grad_bias, cudaStream_t stream) {
    const dim3 grid(plan.num_experts, ceil_div(cols, kSumCols));
    launch("sum_expert_rows", sum_expert_rows_kernel<T>, {grid, kSumCols / 2 * kSumSlices}, stream,
           plan, static_cast<const T*>(rows), is_weighted, cols, static_cast<T*>(grad_bias));
}

}  // namespace

bool can_plan(int64_t num_experts, int num_ranks) {
    return plan_smem_bytes(num_experts, num_ranks) <= kMaxSmemBytes;
}

void count_rows(const Sources& sources, int64_t num_experts, int64_t* count, int64_t tag,
                cudaStream_t stream) {
    const size_t smem_bytes = plan_smem_bytes(num_experts, sources.num_ranks);
    launch("count_rows", count_rows_kernel, {1, kPlanThreads, smem_bytes}, stream, sources,
           int(num_experts), count, tag);
}

void plan_rows(const Sources& sources, const RowPlan& plan, cudaStream_t stream) {
    launch_plan("plan_rows", sources, plan, {}, 0, 0, {}, stream);
}

void plan_and_dispatch(const Sources& sources, const RowPlan& plan, void* rows, int64_t row_bytes,
                       uint32_t* counters, int64_t num_counters, cudaStream_t stream) {
    const OperandRows to = operand_rows(rows, row_bytes);
    const int num_token_ctas = token_ctas(to, source_at(sources, 0).num_tokens);
    launch_plan("plan_and_dispatch", sources, plan, to, num_token_ctas, plan.num_experts,
                {counters, num_counters}, stream);
}

void dispatch_rows(const Sources& sources, const RowPlan& plan, void* published, void* rows,
                   int64_t row_bytes, uint32_t* counters, int64_t num_counters,
                   cudaStream_t stream) {
    const OperandRows to = operand_rows(rows, row_bytes);
    const int num_token_ctas = token_ctas(to, source_at(sources, 0).num_tokens);
    const unsigned num_ctas = num_token_ctas + plan.num_experts;
    launch("dispatch_rows", dispatch_rows_kernel, {num_ctas, kRowWarps * 32}, stream, sources,
           plan, 0, 1, num_token_ctas, to, static_cast<uint4*>(published),
           Words{counters, num_counters});
}

void dispatch_other_rows(const Sources& sources, const RowPlan& plan, void* rows,
                         int64_t row_bytes, cudaStream_t stream) {
    const OperandRows to = operand_rows(rows, row_bytes);
    const int64_t num_others = plan.num_tokens - source_at(sources, 0).num_tokens;
    const int num_ctas = token_ctas(to, num_others);
    if (num_ctas == 0) return;
    launch("dispatch_rows", dispatch_rows_kernel, {unsigned(num_ctas), kRowWarps * 32}, stream,
           sources, plan, 1, sources.num_ranks, num_ctas, to, nullptr, Words{});
}

void sum_row_dots(const Sources& sources, const RowPlan& plan, const float* row_dots,
                  int64_t num_tiles, const void* grad_rows, const void* const* bias,
                  int64_t hidden, bool is_bfloat16, cudaStream_t stream) {
    if (plan.num_tokens == 0) return;
    const auto run = is_bfloat16 ? launch_row_dots<__nv_bfloat16> : launch_row_dots<__half>;
    run(sources, plan, row_dots, num_tiles, grad_rows, bias, hidden, stream);
}

void sum_expert_rows(const RowPlan& plan, const void* rows, bool is_weighted, int64_t cols,
                     bool is_bfloat16, void* grad_bias, cudaStream_t stream) {
    const auto run = is_bfloat16 ? launch_expert_rows<__nv_bfloat16> : launch_expert_rows<__half>;
    run(plan, rows, is_weighted, cols, grad_bias, stream);
}

}  // namespace comet_ds
