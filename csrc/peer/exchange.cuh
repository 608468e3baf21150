// SPDX-License-Identifier: Apache-2.0
// Tokens and results between the ranks of an expert parallel group.
//
// 1. Math: exchange.h. A rank reads a token's activation once, for all its experts that the token
//    is routed to, and returns one partial sum of their results. The memory of the token's rank has
//    a slot for each other rank that the token is routed to, in order of these ranks.
// 2. Grid and roles: publish and sum_partials have as many CTAs as there is work. sync_ranks is one
//    CTA; thread r handles rank r. CTAs of the GEMM kernels pull tokens and push results
//    (gemm/overlap.cuh); push_sums pushes where there is no GEMM to overlap it. In forward, copy
//    engines may push all tokens to all ranks instead, overlapped with the gate and
//    plan_and_dispatch.
// 3. Flags. All waiting for another rank happens in sync_ranks: one CTA, which holds nothing that a
//    peer needs, whatever else runs on the GPUs.
//        flag          writer             release            reader             acquire
//        flags[r][s]   rank s, thread r   st.release.sys,    rank r, thread s   ld.acquire.sys,
//                      of sync_ranks      after a            of sync_ranks      then a
//                                         threadfence_system                    threadfence_system
//        epoch         thread 0 of        end of kernel      the next           start of kernel
//                      sync_ranks                            sync_ranks
//    Proxy fence: none; TMA reads what peers wrote only in later kernels.
//    Reset: never. flags[r][s] is the number of barriers rank s has reached and only grows. A rank
//    counts its barriers in memory (epoch), so a captured graph can be replayed.
//    A direction has two barriers: kTokens after publish (or after dispatch_rows, which publishes
//    too), kResults after the last push. Where copy engines push the tokens, kPushedTokens comes
//    between them. Everything else on the stream follows a barrier and finds its input complete;
//    publish and push_by_copy_engine, also on their own stream, follow the last barrier of the
//    previous direction. Why memory can be reused:
//        published tokens   A rank reaches kResults only when it has read them.
//        slots              They are written again after kTokens of the next direction, which their
//                           owner reaches only when it has read them.
//        tables, tokens     They arrive before kTokens, in a part of memory from which nothing is
//        pushed by copy     read after the previous kResults (Exchange.parts in
//        engines            comet_ds/fused/peer/exchange.py).
// 4. Shared memory: push_sums one ring of slices per warp (token_stream.cuh). A partial sum has one
//    writer, and sums are added in a fixed order: the same input gives the same bits.
// 5. Sources: PTX ISA, memory consistency model (system scope, cumulativity).
#pragma once

#include <cstdio>

#include "peer/exchange.h"
#include "peer/token_stream.cuh"
#include "ptx/kernel_order.cuh"
#include "ptx/memory_order.cuh"
#include "ptx/vector.cuh"

namespace comet_ds {

__global__ void publish_kernel(const __grid_constant__ CopyParams p) {
    begin_kernel();
    const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
    for (int i = 0; i < p.num_copies; ++i) {
        const int64_t num_vectors = p.num_bytes[i] / sizeof(uint4);
        const auto* from = static_cast<const uint4*>(p.from[i]);
        auto* to = static_cast<uint4*>(p.to[i]);
#pragma unroll 4
        for (int64_t j = thread; j < num_vectors; j += num_threads) to[j] = from[j];
        const int64_t num_words = p.num_bytes[i] / sizeof(uint32_t);
        for (int64_t j = num_vectors * 4 + thread; j < num_words; j += num_threads) {
            static_cast<uint32_t*>(p.to[i])[j] = static_cast<const uint32_t*>(p.from[i])[j];
        }
    }
}

__global__ void __launch_bounds__(kMaxRanks)
    rank_barrier_kernel(const __grid_constant__ RankBarrierParams p) {
    await_previous_kernel();
    const int peer = threadIdx.x, rank = p.mailboxes.rank;
    const uint64_t arrival_ns = global_time_ns();
    const uint64_t before = *p.epoch, step = before % kRankBarriers;
    const uint64_t epoch = before - step + uint64_t(p.barrier) + 1;
    const char* name = p.barrier == RankBarrier::kResults ? "results" : "tokens";
    const bool is_in_order =
        p.barrier == RankBarrier::kTokens ? step == 0 : step > 0 && epoch > before;
    if (p.late->is_set || !is_in_order) {
        if (threadIdx.x > 0) return;
        printf("comet_ds: rank %d of the expert parallel group: ", rank);
        if (is_in_order) {
            printf("flag %u of a GEMM that communicates was %u, not %u, after %llu s\n",
                   p.late->index, p.late->seen, p.late->expected, p.timeout_ns / 1000000000ull);
        } else {
            printf("an earlier forward or backward was not finished, barrier %llu is for \"%s\"\n",
                   static_cast<unsigned long long>(epoch), name);
        }
        __trap();
    }
    if (peer < p.mailboxes.num_ranks && peer != rank) {
        __threadfence_system();
        store_release_system(p.mailboxes.flags[peer] + rank, epoch);
        const uint64_t* flag = p.mailboxes.flags[rank] + peer;
        const uint64_t start = global_time_ns();
        for (uint64_t seen; (seen = load_acquire_system(flag)) < epoch; __nanosleep(100)) {
            if (global_time_ns() - start < p.timeout_ns) continue;
            printf("comet_ds: rank %d of the expert parallel group waited %llu s for rank %d: "
                   "its flag for \"%s\" is %llu, not %llu\n",
                   rank, p.timeout_ns / 1000000000ull, peer, name,
                   static_cast<unsigned long long>(seen),
                   static_cast<unsigned long long>(epoch));
            __trap();
        }
        __threadfence_system();
    }
    __syncthreads();
    // NOTE: not earlier, because its CTAs would hold SMs that a peer may be waiting for.
    admit_next_kernel();
    if (threadIdx.x > 0) return;
    *p.epoch = epoch;
    if (p.exposure != nullptr) p.exposure->rank_barriers += global_time_ns() - arrival_ns;
}

constexpr int kPushWarps = 8;

template <typename T, bool kIsWeighted>
__global__ void __launch_bounds__(kPushWarps * 32)
    push_sums_kernel(const __grid_constant__ Communication c) {
    begin_kernel();
    extern __shared__ __align__(16) uint8_t smem[];
    auto& ring = reinterpret_cast<PushRing<T>*>(smem)[threadIdx.x / 32];
    push_tokens<T, kIsWeighted>(c.exchange, static_cast<const T*>(c.rows),
                                &c.counters->next_route_group, ring, [](int) {});
}

constexpr int kSumThreads = 128;

template <typename T, bool kIsWeighted>
__global__ void __launch_bounds__(kSumThreads)
    sum_partials_kernel(const __grid_constant__ ExchangeParams p, const T* rows, T* output) {
    begin_kernel();
    constexpr int kSize = kVectorBytes / sizeof(T);
    const RowPlan& plan = p.plan;
    const Source& own = p.sources.source[p.sources.rank];
    const int64_t token = blockIdx.x;
    const int64_t* row_of_route = plan.row_of_route + (own.first_token + token) * plan.top_k;
    const int num_slots = __popc(plan.peers[own.first_token + token]);
    for (int64_t col = threadIdx.x * kSize; col < p.hidden; col += kSumThreads * kSize) {
        float sum[kSize] = {};
#pragma unroll 4
        for (int64_t k = 0; k < plan.top_k; ++k) {
            const int64_t row = row_of_route[k];
            if (row < 0) continue;
            const float weight = kIsWeighted ? plan.row_weights[row] : 1.0f;
            const auto in = *reinterpret_cast<const Vector<T, kSize>*>(rows + row * p.hidden + col);
#pragma unroll
            for (int i = 0; i < kSize; ++i) sum[i] += weight * to_float(in.value[i]);
        }
        for (int64_t slot = 0; slot < num_slots; ++slot) {
            const auto in = *reinterpret_cast<const Vector<T, kSize>*>(
                static_cast<const T*>(own.slots) + (slot * own.num_tokens + token) * p.hidden +
                col);
#pragma unroll
            for (int i = 0; i < kSize; ++i) sum[i] += to_float(in.value[i]);
        }
        Vector<T, kSize> out;
#pragma unroll
        for (int i = 0; i < kSize; ++i) out.value[i] = from_float<T>(sum[i]);
        *reinterpret_cast<Vector<T, kSize>*>(output + token * p.hidden + col) = out;
    }
}

}  // namespace comet_ds
