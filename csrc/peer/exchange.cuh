// SPDX-License-Identifier: Apache-2.0
// Tokens and results between the ranks of an expert parallel group.
//
// 1. Math: exchange.h. A token's activation is read once by every rank that has an expert of it,
//    and comes back as one partial sum from each: a token of rank s has, for every other rank it
//    goes to, one slot in s's memory, in order of these ranks.
// 2. Grid: publish and sum_partials as many blocks as there is work; meet one block, a thread a
//    rank. Tokens are pulled and results pushed by CTAs of the GEMM kernels (overlap.cuh);
//    push_sums does the latter where there is no GEMM beside it. In forward copy engines may send
//    all tokens to all ranks instead, beside the gate and plan_and_dispatch.
// 3. Flags: flags[r][s] in r's memory, written by rank s (release, system scope), read by r
//    (acquire, system scope): how many meetings s has come to. It only grows, and every rank counts
//    its own meetings in memory, so nothing is reset and a captured graph can be replayed.
//    Only meet waits for another rank, in one block that holds nothing a peer needs, whatever else
//    runs beside it; everything else comes behind a meeting and finds what it reads, publish and
//    send behind the last one of the direction before, also on a stream of their own.
//    Two meetings a direction: after publish, or dispatch_rows in its place (tables have come, and
//    tokens can be read), and after the last push (slots are complete). Between them a third where
//    tokens are sent: they have come. Memory is reused safely: who comes to the last has read what
//    was published or has come, and a slot is written again only after the first meeting of the
//    next direction, to which its owner comes when it has read it. Tables, and tokens that are
//    sent, come before that meeting: to a part of the memory of which nothing is read after the
//    last one (Exchange.parts in exchange.py).
// 4. Shared memory: push_sums a ring of slices for every warp (token_stream.cuh). Partial sums have
//    one writer each and are added in order: the same input gives the same bits.
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

__global__ void __launch_bounds__(kMaxRanks) meet_kernel(const __grid_constant__ MeetParams p) {
    await_previous_kernel();
    const int peer = threadIdx.x, rank = p.mailboxes.rank;
    const uint64_t come_ns = global_time_ns();
    const uint64_t before = *p.epoch, step = before % kMeetings;
    const uint64_t epoch = before - step + uint64_t(p.what) + 1;
    const char* what = p.what == Meeting::kResults ? "results" : "tokens";
    const bool is_in_step = p.what == Meeting::kTokens ? step == 0 : step > 0 && epoch > before;
    if (p.late->is_set || !is_in_step) {
        if (threadIdx.x > 0) return;
        printf("comet_ds: rank %d of the expert parallel group: ", rank);
        if (is_in_step) {
            printf("progress[%u] beside a GEMM was %u, not %u, after %llu s\n", p.late->index,
                   p.late->seen, p.late->expected, p.timeout_ns / 1000000000ull);
        } else {
            printf("a forward or backward before was not finished, meeting %llu is for \"%s\"\n",
                   static_cast<unsigned long long>(epoch), what);
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
                   rank, p.timeout_ns / 1000000000ull, peer, what,
                   static_cast<unsigned long long>(seen),
                   static_cast<unsigned long long>(epoch));
            __trap();
        }
        __threadfence_system();
    }
    __syncthreads();
    // Not before: its CTAs would hold SMs that a peer may be waiting for.
    admit_next_kernel();
    if (threadIdx.x > 0) return;
    *p.epoch = epoch;
    if (p.exposure != nullptr) p.exposure->meeting += global_time_ns() - come_ns;
}

constexpr int kPushWarps = 8;

template <typename T, bool kIsWeighted>
__global__ void __launch_bounds__(kPushWarps * 32)
    push_sums_kernel(const __grid_constant__ Communication c) {
    begin_kernel();
    extern __shared__ __align__(16) uint8_t smem[];
    auto& ring = reinterpret_cast<PushRing<T>*>(smem)[threadIdx.x / 32];
    push_tokens<T, kIsWeighted>(c.exchange, static_cast<const T*>(c.rows), &c.counters->groups,
                                ring, [](int) {});
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
