// SPDX-License-Identifier: Apache-2.0
// Logits of the gate on tensor cores, as accurate as fp32.
//
// 1. Math: logits[t, e] = sum_h x[t, h] weight[e, h], x and weight bf16, logits fp32. Products of
//    bf16 are exact in fp32. Tensor cores sum with truncation, which over a whole row costs a
//    factor 17 in accuracy; so they sum 64 products at a time, added up with compensation (Kahan).
// 2. Grid and roles: one CTA for 64 tokens and 128 experts; warp 4 loads (one thread), warps 0 to 3
//    multiply.
// 3. Barriers, in shared memory: full[s] (the loading thread and its bytes), empty[s] (one arrival
//    of the math warps); parities as in expert_gemm.cuh.
// 4. Shared memory: kLogitsStages x (x 8 KB + weight 16 KB), then the barriers.
#pragma once

#include "device/kernel_order.cuh"
#include "device/tma.cuh"
#include "device/wgmma.cuh"
#include "gate_logits.h"

namespace comet_ds {

constexpr int kLogitsTokens = 64;
constexpr int kLogitsExperts = 128;
constexpr int kLogitsStages = 8;
constexpr int kLogitsThreads = 128 + 32;
constexpr int kLogitsStageBytes = 3 * kBlockBytes;
constexpr int kLogitsSmemBytes =
    1024 + kLogitsStages * (kLogitsStageBytes + 2 * sizeof(uint64_t));

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

    const int num_steps = (p.hidden + kBlockElements - 1) / kBlockElements;
    const int first_token = blockIdx.x * kLogitsTokens, first_expert = blockIdx.y * kLogitsExperts;
    if (threadIdx.x >= 128) {
        if (threadIdx.x != 128) return;
        for (int step = 0; step < num_steps; ++step) {
            const int stage = step % kLogitsStages;
            const uint32_t to = smem + stage * kLogitsStageBytes;
            mbarrier_wait(empty(stage), step / kLogitsStages % 2 ^ 1);
            mbarrier_arrive_expect_tx(full(stage), kLogitsStageBytes);
            const int k = step * kBlockElements;
            tma_load(to, &p.x, full(stage), k, first_token, 0);
            tma_load(to + kBlockBytes, &p.weight, full(stage), k, first_expert, 0);
            tma_load(to + 2 * kBlockBytes, &p.weight, full(stage), k, first_expert + 64, 0);
        }
        return;
    }
    float sum[kLogitsExperts / 2] = {}, excess[kLogitsExperts / 2] = {};
    for (int step = 0; step < num_steps; ++step) {
        const int stage = step % kLogitsStages;
        const uint32_t from = smem + stage * kLogitsStageBytes;
        float part[kLogitsExperts / 2] = {};
        mbarrier_wait(full(stage), step / kLogitsStages % 2);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kBlockElements / 16; ++k) {
            wgmma<__nv_bfloat16, false, false>(
                part, matrix_descriptor(from) + k * kDescriptorStepK<false>,
                matrix_descriptor(from + kBlockBytes) + k * kDescriptorStepK<false>);
        }
        wgmma_commit();
        wgmma_wait<0>();
        if (threadIdx.x == 0) mbarrier_arrive(empty(stage));
#pragma unroll
        for (int i = 0; i < kLogitsExperts / 2; ++i) {
            const float term = part[i] - excess[i], total = sum[i] + term;
            excess[i] = (total - sum[i]) - term;
            sum[i] = total;
        }
    }
    const int token = first_token + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < kLogitsExperts / 2; ++i) {
        const int row = token + i % 4 / 2 * 8;
        const int expert = first_expert + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (row < p.num_tokens && expert < p.num_experts) {
            p.logits[int64_t{row} * p.num_experts + expert] = sum[i];
        }
    }
}

}  // namespace comet_ds
