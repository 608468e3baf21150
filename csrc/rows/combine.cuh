// SPDX-License-Identifier: Apache-2.0
// Combine on one rank: the weighted sum of each token's rows, and its gradients.
//
// 1. Math, with r = row_of_route[t, k] (skipped where -1):
//        output[t]           = sum_k weights[t, k] * rows[r]      fp32, rounded once
//        grad_rows[r]        = weights[t, k] * grad[t]            fp32 product, rounded once
//        grad_weights[t, k]  = <grad[t], rows[r]>                 fp32
//    Without weights the forward is the plain sum.
// 2. Grid and roles: forward one CTA per token, backward one warp per route; all threads are alike.
//    Routes are summed in order of k and dot products in a fixed tree, without atomics: the same
//    input gives the same bits.
// 3. Flags: none; a row belongs to one route.
// 4. Shared memory: none. Both kernels are limited by memory: a row is read once, and in backward
//    written once.
// 5. Sources: deepspeed/moe/sharded_moe.py (the einsum after the second all-to-all in MOELayer).
#pragma once

#include "ptx/kernel_order.cuh"
#include "ptx/vector.cuh"
#include "rows/combine.h"

namespace comet_ds {

constexpr int kForwardThreads = 128;
constexpr int kWarpsPerCta = 8;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T, int kSize, bool kIsWeighted>
__global__ void __launch_bounds__(kForwardThreads) combine_forward_kernel(CombineParams p) {
    begin_kernel();
    using Vec = Vector<T, kSize>;
    const int64_t token = blockIdx.x;
    const int64_t* row_of_route = p.row_of_route + token * p.top_k;
    const auto* rows = static_cast<const T*>(p.rows);
    auto* output = static_cast<T*>(p.output) + token * p.hidden;

    for (int64_t col = threadIdx.x * kSize; col < p.hidden; col += kForwardThreads * kSize) {
        float sum[kSize] = {};
#pragma unroll 4
        for (int64_t k = 0; k < p.top_k; ++k) {
            const int64_t row = row_of_route[k];
            if (row < 0) continue;
            const float weight = kIsWeighted ? p.weights[token * p.top_k + k] : 1.0f;
            const Vec in = *reinterpret_cast<const Vec*>(rows + row * p.hidden + col);
#pragma unroll
            for (int i = 0; i < kSize; ++i) sum[i] += weight * to_float(in.value[i]);
        }
        Vec out;
#pragma unroll
        for (int i = 0; i < kSize; ++i) out.value[i] = from_float<T>(sum[i]);
        *reinterpret_cast<Vec*>(output + col) = out;
    }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kWarpsPerCta * 32) combine_backward_kernel(CombineParams p) {
    begin_kernel();
    using Vec = Vector<T, kSize>;
    const int64_t route = int64_t{blockIdx.x} * kWarpsPerCta + threadIdx.x / 32;
    if (route >= p.num_tokens * p.top_k) return;
    const int lane = threadIdx.x % 32;
    const int64_t row = p.row_of_route[route];
    if (row < 0) {
        if (lane == 0) p.grad_weights[route] = 0.0f;
        return;
    }
    const float weight = p.weights[route];
    const auto* grad = static_cast<const T*>(p.grad) + route / p.top_k * p.hidden;
    const auto* in = static_cast<const T*>(p.rows) + row * p.hidden;
    auto* out = static_cast<T*>(p.grad_rows) + row * p.hidden;

    float dot = 0.0f;
#pragma unroll 4
    for (int64_t col = lane * kSize; col < p.hidden; col += 32 * kSize) {
        const Vec g = *reinterpret_cast<const Vec*>(grad + col);
        const Vec x = *reinterpret_cast<const Vec*>(in + col);
        Vec y;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
            dot += to_float(g.value[i]) * to_float(x.value[i]);
            y.value[i] = from_float<T>(weight * to_float(g.value[i]));
        }
        *reinterpret_cast<Vec*>(out + col) = y;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(kAllLanes, dot, offset);
    if (lane == 0) p.grad_weights[route] = dot;
}

}  // namespace comet_ds
