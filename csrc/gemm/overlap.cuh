// SPDX-License-Identifier: Apache-2.0
// Communication beside a GEMM: what CTAs do before or after their tiles, and how tiles and it wait
// for each other.
//
// 1. kUp, kDownGrad: the CTAs set apart first pull other ranks' tokens into rows; a tile is loaded
//    when the rows of its block have come. Meanwhile there are tiles of this rank's own tokens
//    (orders of blocks: dispatch.h).
//    kWeightGrad: they first push rows that were complete before the launch.
//    kDown: tiles with rows of the farthest rank's tokens come first, those with this rank's own
//    only last (the orders of kUp, backwards); when all pieces of a rank's tiles are stored, its
//    sums are pushed: by the CTAs set apart, which take no more tiles when the farthest rank's are
//    all taken, and by every CTA that finds no more tiles.
// 2. Grid: the CTAs set apart are the first num_ctas, which are scheduled first. All take tiles
//    from one queue (Units in expert_gemm.cuh) and groups of routes from another, so that nobody
//    has to be given the right share.
// 3. Flags, in this GPU's memory, zero before the launch:
//        progress[block]  kUp, kDownGrad: += 1 for every row by the warp that wrote it (proxy
//                         fence, release, GPU scope), awaited by the thread that finds tiles
//                         (acquire, proxy fence: the copy engine reads the rows), which hands the
//                         tile to the loading thread by a barrier
//        progress[distance]
//                         kDown: += 1 by every math warp whose piece of a tile is in memory (bulk
//                         group complete, proxy fence, release, GPU scope), awaited by warps that
//                         push (acquire). A tile counts for the farthest rank it may have rows of;
//                         one with this rank's own only does not count.
//    Pulling waits for nothing, so tiles get their rows, on however few SMs. In kDown the CTAs set
//    apart wait for tiles of the others, so it needs more than num_ctas SMs that other kernels
//    leave it at some time; with those, tiles wait for nothing and all ranks' get complete.
// 4. Shared memory: rings of slices (token_stream.cuh) in place of the GEMM's stages and staging
//    buffers, below its barriers.
#pragma once

#include "gemm/expert_gemm.h"
#include "gemm/timeline.h"
#include "peer/exchange.h"
#include "peer/token_stream.cuh"
#include "ptx/memory_order.cuh"
#include "ptx/tma.cuh"

namespace comet_ds {

// In place of Communication in kernels without.
struct NoCommunication {};

__device__ inline bool is_set_apart(const Communication& c) { return blockIdx.x < c.num_ctas; }
__device__ inline bool is_set_apart(const NoCommunication&) { return false; }

// Waits for progress[index]. Past the deadline it notes what it waited for and goes on, as do all
// waits after it; the next meeting prints the note and traps. (A call to printf in a GEMM kernel
// would serialise its wgmma.)
__device__ inline void wait_for_count(const Communication& c, int index, uint32_t expected) {
    const uint32_t* count = c.counters->progress + index;
    const uint64_t start = global_time_ns();
    for (uint32_t seen; (seen = load_acquire_gpu(count)) < expected; __nanosleep(50)) {
        if (*static_cast<const volatile uint32_t*>(&c.late->is_set)) return;
        if (global_time_ns() - start < c.timeout_ns) continue;
        *c.late = {1, uint32_t(index), seen, expected};
        return;
    }
}

// Waits until the rows of a block are there for the copy engine.
__device__ inline void wait_for_rows(const Communication& c, int block) {
    const int expected = c.exchange.plan.remote_rows[block];
    if (expected == 0) return;
    wait_for_count(c, block, expected);
    fence_proxy_async_global();
}

// The distance of the farthest rank whose tokens may have rows in kDown's block at a position of
// its order; 0 is this one.
__device__ inline int farthest_distance(const Communication& c, int position) {
    int distance = c.exchange.sources.num_ranks - 1;
    while (position < c.remote_begin[distance]) --distance;
    return distance;
}

// A math warp's pieces of kDown's tiles: counted when they are in memory, which is known when the
// next tile's are about to leave.
class StoredPieces {
public:
    // After the piece's last store was committed.
    __device__ void add(int distance) { distance_ = distance; }
    // Waits for the piece before, if it counts, and counts it.
    __device__ void flush(const Communication& c) {
        if (distance_ == 0) return;
        if (threadIdx.x % 32 == 0) {
            bulk_wait_group<0>();
            fence_proxy_async_global();
            add_release_gpu(c.counters->progress + distance_, 1);
        }
        distance_ = 0;
    }

private:
    int distance_ = 0;
};

// Adds up how long CTAs do not compute, if anyone asks: one thread of each does.
class ExposureClock {
public:
    __device__ ExposureClock(const Communication& c, bool is_thread)
        : exposure_(is_thread ? c.exposure : nullptr) {
        if (exposure_ != nullptr) start_ns_ = global_time_ns();
    }
    __device__ void stop() {
        if (exposure_ == nullptr) return;
        auto* sum = reinterpret_cast<unsigned long long*>(&exposure_->communicating);
        atomicAdd(sum, global_time_ns() - start_ns_);
    }

private:
    Exposure* exposure_;
    uint64_t start_ns_ = 0;
};

// What a CTA set apart does before its tiles, all warps that find room for a ring.
template <typename Element, Pass kPass, int kRingBytes>
__device__ inline void communicate_first(const Communication& c, uint8_t* smem) {
    constexpr bool kPulls = kPass == Pass::kUp || kPass == Pass::kDownGrad;
    using Ring = std::conditional_t<kPulls, PullRing, PushRing<Element>>;
    const int warp = threadIdx.x / 32;
    if (warp >= int(kRingBytes / sizeof(Ring))) return;
    Ring& ring = reinterpret_cast<Ring*>(smem)[warp];
    ExposureClock clock(c, threadIdx.x == 0);
    if constexpr (kPulls) {
        pull_tokens(c.exchange, static_cast<uint4*>(c.rows), &c.counters->groups,
                    c.counters->progress, ring);
    } else {
        push_tokens<Element, false>(c.exchange, static_cast<const Element*>(c.rows),
                                    &c.counters->groups, ring, [](int) {});
    }
    clock.stop();
}

// What a math warp of any CTA does after kDown's tiles: pushes what is left of the sums of rows in
// num_blocks blocks, each stored in pieces_per_block pieces.
template <typename Element, typename Recorder>
__device__ inline void push_results(const Communication& c, PushRing<Element>& ring,
                                    int num_blocks, int pieces_per_block, Recorder& recorder) {
    int complete = c.exchange.sources.num_ranks;  // for ranks at this distance the warp has waited
    int end = num_blocks;                         // of their blocks
    const auto await = [&](int distance) {
        if (distance >= complete) return;
        recorder.stop(Activity::kPush);
        while (complete > distance) {
            const int begin = c.remote_begin[--complete];
            if (threadIdx.x % 32 == 0) {
                wait_for_count(c, complete, (end - begin) * pieces_per_block);
            }
            end = begin;
        }
        __syncwarp();
        recorder.stop(Activity::kAwaitTiles);
    };
    constexpr int kFirstMathThread = 128;
    ExposureClock clock(c, threadIdx.x == kFirstMathThread);
    recorder.start();
    push_tokens<Element, true>(c.exchange, static_cast<const Element*>(c.rows),
                               &c.counters->groups, ring, await);
    recorder.stop(Activity::kPush);
    clock.stop();
}

}  // namespace comet_ds
