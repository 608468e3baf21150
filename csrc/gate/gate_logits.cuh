// SPDX-License-Identifier: Apache-2.0
// Logits of the gate on tensor cores, as accurate as fp32.
//
// 1. Math: logits[t, e] = sum_h x[t, h] weight[e, h], x and weight bf16, logits fp32. Products of
//    bf16 are exact in fp32. Tensor cores sum with truncation, which over a whole row makes the
//    error 17 times as large; so they sum 64 products at a time, and these sums are added with
//    compensation (Kahan).
// 2. Grid and roles: one CTA for 64 tokens and 128 experts. Warpgroups 0 and 1 multiply every other
//    step each: one adds up while the other's products run. One thread of warpgroup 2 loads.
// 3. Flags: none in global memory. Named barriers: LogitsBarrier. mbarriers in shared memory:
//        mbarrier   arrivals                          awaited by
//        full[s]    the loading thread and its bytes  the warpgroup whose step it is
//        empty[s]   the warpgroup that has read it    the loading thread
//    Parity is that of the ring's turn; nothing is reset.
// 4. Shared memory: kLogitsStages x (x 8 KB + weight 16 KB), replaced at the end by warpgroup 1's
//    sums; then the mbarriers.
// 5. Sources: PTX ISA (wgmma, mbarrier).
#pragma once

#include "gate/gate_logits.h"
#include "ptx/kernel_order.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace comet_ds {

constexpr int kLogitsTokens = 64;
constexpr int kLogitsExperts = 128;
constexpr int kLogitsStages = 8;
constexpr int kLogitsMathThreads = 2 * 128;          // warpgroups 0 and 1
constexpr int kLogitsLoadingThread = kLogitsMathThreads;  // the first of warpgroup 2
constexpr int kLogitsThreads = kLogitsMathThreads + 128;
constexpr int kLogitsStageBytes = 3 * kBoxBytes;
constexpr int kLogitsSmemBytes =
    1024 + kLogitsStages * (kLogitsStageBytes + 2 * sizeof(uint64_t));

// Named barriers of a CTA; 0 is __syncthreads. Each counts kLogitsMathThreads.
enum LogitsBarrier : int {
    kStagesRead = 1,   // the stages may be overwritten
    kSumsWritten = 2,  // warpgroup 1's sums are in shared memory
};

__global__ void __launch_bounds__(kLogitsThreads, 1)
    gate_logits_kernel(const __grid_constant__ GateLogitsParams p) {
    begin_kernel();
    extern __shared__ uint8_t smem_raw[];
    const uint32_t smem = (smem_address(smem_raw) + 1023) / 1024 * 1024;
    const uint32_t barriers = smem + kLogitsStages * kLogitsStageBytes;
    const auto full = [&](int stage) { return barriers + stage * 16; };
    const auto empty = [&](int stage) { return barriers + stage * 16 + 8; };
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kLogitsStages; ++stage) {
            mbarrier_init(full(stage), 1);
            mbarrier_init(empty(stage), 1);
        }
        fence_mbarrier_init();
    }
    __syncthreads();

    const int num_steps = (p.hidden + kBoxSide - 1) / kBoxSide;
    const int first_token = blockIdx.x * kLogitsTokens, first_expert = blockIdx.y * kLogitsExperts;
    constexpr int kLoadRegisters = 40, kMathRegisters = 232;
    if (threadIdx.x >= kLogitsMathThreads) {
        setmaxnreg_dec<kLoadRegisters>();
        if (threadIdx.x != kLogitsLoadingThread) return;
        for (int step = 0; step < num_steps; ++step) {
            const int stage = step % kLogitsStages;
            const uint32_t to = smem + stage * kLogitsStageBytes;
            mbarrier_wait(empty(stage), step / kLogitsStages % 2 ^ 1);
            mbarrier_arrive_expect_tx(full(stage), kLogitsStageBytes);
            const int k = step * kBoxSide;
            tma_load(to, &p.x, full(stage), k, first_token, 0);
            tma_load(to + kBoxBytes, &p.weight, full(stage), k, first_expert, 0);
            tma_load(to + 2 * kBoxBytes, &p.weight, full(stage), k, first_expert + 64, 0);
        }
        return;
    }
    setmaxnreg_inc<kMathRegisters>();
    const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
    float sum[kLogitsExperts / 2] = {}, excess[kLogitsExperts / 2] = {};
    for (int step = warpgroup; step < num_steps; step += 2) {
        const int stage = step % kLogitsStages;
        const uint32_t from = smem + stage * kLogitsStageBytes;
        float part[kLogitsExperts / 2] = {};
        mbarrier_wait(full(stage), step / kLogitsStages % 2);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBoxSide / 16; ++k) {
            wgmma<__nv_bfloat16, false, false>(
                part, matrix_descriptor(from) + k * kDescriptorStepK<false>,
                matrix_descriptor(from + kBoxBytes) + k * kDescriptorStepK<false>);
        }
        wgmma_commit();
        wgmma_wait<0>();
        if (thread == 0) mbarrier_arrive(empty(stage));
#pragma unroll
        for (int i = 0; i < kLogitsExperts / 2; ++i) {
            const float term = part[i] - excess[i], total = sum[i] + term;
            excess[i] = (total - sum[i]) - term;
            sum[i] = total;
        }
    }
    auto* others = reinterpret_cast<float2*>(smem_raw + (smem - smem_address(smem_raw)));
    named_barrier_sync(kStagesRead, kLogitsMathThreads);
    if (warpgroup == 1) {
#pragma unroll
        for (int i = 0; i < kLogitsExperts / 2; ++i) {
            others[i * 128 + thread] = {sum[i], excess[i]};
        }
    }
    named_barrier_sync(kSumsWritten, kLogitsMathThreads);
    if (warpgroup == 1) return;
    const int token = first_token + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < kLogitsExperts / 2; ++i) {
        const int row = token + i % 4 / 2 * 8;
        const int expert = first_expert + i / 4 * 8 + thread % 4 * 2 + i % 2;
        if (row < p.num_tokens && expert < p.num_experts) {
            const float2 other = others[i * 128 + thread];
            p.logits[int64_t{row} * p.num_experts + expert] =
                sum[i] + (other.x - (excess[i] + other.y));
        }
    }
}

}  // namespace comet_ds
