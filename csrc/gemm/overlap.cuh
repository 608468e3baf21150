// SPDX-License-Identifier: Apache-2.0
// Communication that a GEMM kernel overlaps with its tiles: what CTAs do before or after their
// tiles, and how tiles and communication wait for each other.
//
// 1. kUp, kDownGrad: communication CTAs first pull other ranks' tokens to their rows. A tile is
//    loaded when the rows of its row block have arrived; until then there are tiles of own tokens
//    (tile orders: rows/dispatch.h). kWeightGrad: communication CTAs first push sums of rows that
//    were complete before the launch. kDown: the tile order is walked backwards: tiles that the
//    farthest rank waits for come first, tiles of own tokens only come last. When all tiles for a
//    rank are stored, its sums are pushed. Communication CTAs push once the farthest rank's tiles
//    are all taken, the other CTAs once they find no more tiles.
// 2. Grid and roles: the first num_comm_ctas CTAs, which are scheduled first, are communication
//    CTAs. All CTAs take tiles from one queue (ClusterTiles in tile_schedule.cuh) and all warps
//    that communicate take route groups from another, so no CTA needs a share fixed in advance.
//    Pulling, and pushing before tiles, uses every warp with room for a ring; pushing after tiles
//    uses the math warps.
// 3. Flags, in this GPU's memory (Counters in peer/exchange.h). Reset: plan_and_dispatch and
//    dispatch_rows, which precede the kernel on the stream, zero all of them.
//        flag and pass                  writer, release          reader, acquire
//        arrived_rows[row block]        pull_tokens, one lane    wait_for_rows: ld.acquire.gpu;
//        kUp, kDownGrad                 per row:                 then the tile's mbarrier to the
//                                       red.release.gpu += 1     loading thread (tile_schedule.cuh)
//            Proxy fence: fence.proxy.async.global by the writer, whose stores are generic, and by
//            the reader, because TMA loads the rows.
//        stored_sub_tiles[distance]     StoredSubTiles, lane 0   push_results, lane 0 of each warp:
//        kDown                          of each math warp:       ld.acquire.gpu; then syncwarp
//                                       red.release.gpu += 1
//            Proxy fence: fence.proxy.async.global by the writer, after its bulk group is complete,
//            because TMA stored the rows; the reader's loads are generic. A tile counts for the
//            farthest rank it may hold tokens of; one with own tokens only is not counted.
//        next_cluster_tile,             relaxed atomic add by whoever takes work: it hands out
//        next_route_group               indices, no data
//        late                           plain store by the       sync_ranks of a later launch; it
//                                       first late reader        prints and traps: never reset
//    Progress: pulling waits for nothing, so tiles get their rows on however few SMs. In kDown,
//    CTAs that push wait for tiles of others: the kernel needs more than num_comm_ctas SMs at some
//    time. With these, tiles wait for nothing and every rank's tiles are stored.
// 4. Shared memory: rings of slices (token_stream.cuh) where the GEMM has its stages and staging
//    buffers, below its mbarriers.
#pragma once

#include "gemm/expert_gemm.h"
#include "gemm/timeline.h"
#include "peer/exchange.h"
#include "peer/token_stream.cuh"
#include "ptx/memory_order.cuh"
#include "ptx/tma.cuh"

namespace comet_ds {

// Takes the place of Communication in kernels without.
struct NoCommunication {};

__device__ inline bool is_comm_cta(const Communication& c) { return blockIdx.x < c.num_comm_ctas; }
__device__ inline bool is_comm_cta(const NoCommunication&) { return false; }

// Waits until flags[index] is at least `expected`. Past the deadline it writes `late` and returns,
// as do all later waits; the next barrier between ranks prints `late` and traps. NOTE: it does not
// print itself: a call to printf in a GEMM kernel would serialise its wgmma.
__device__ inline void wait_for_flag(const Communication& c, const uint32_t* flags, int index,
                                     uint32_t expected) {
    const uint32_t* flag = flags + index;
    const uint64_t start = global_time_ns();
    for (uint32_t seen; (seen = load_acquire_gpu(flag)) < expected; __nanosleep(50)) {
        if (*static_cast<const volatile uint32_t*>(&c.late->is_set)) return;
        if (global_time_ns() - start < c.timeout_ns) continue;
        *c.late = {1, uint32_t(index), seen, expected};
        return;
    }
}

// Waits until TMA can read all rows of a row block.
__device__ inline void wait_for_rows(const Communication& c, int block) {
    const int expected = c.exchange.plan.remote_rows[block];
    if (expected == 0) return;
    wait_for_flag(c, c.counters->arrived_rows(), block, expected);
    fence_proxy_async_global();
}

// Returns the ring distance of the farthest rank whose tokens the row block at a position of
// kDown's tile order may hold; 0 is this rank.
__device__ inline int farthest_distance(const Communication& c, int position) {
    int distance = c.exchange.sources.num_ranks - 1;
    while (position < c.remote_begin[distance]) --distance;
    return distance;
}

// Counts a math warp's sub-tiles of kDown when they are in memory.
// NOTE: the warp waits for its stores only when the next tile's are about to start.
class StoredSubTiles {
public:
    // Called when the sub-tile's last store was committed.
    __device__ void add(int distance) { distance_ = distance; }
    // Waits for the sub-tile that was added last and counts it, unless it holds own tokens only.
    __device__ void flush(const Communication& c) {
        if (distance_ == 0) return;
        if (threadIdx.x % 32 == 0) {
            bulk_wait_group<0>();
            fence_proxy_async_global();
            add_release_gpu(c.counters->stored_sub_tiles() + distance_, 1);
        }
        distance_ = 0;
    }

private:
    int distance_ = 0;  // of a sub-tile that is to be counted
};

// Adds to Exposure the time one thread of a CTA measures from construction to stop().
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

// What a communication CTA does before its tiles, with every warp that has room for a ring.
template <typename Element, Pass kPass, int kRingBytes>
__device__ inline void communicate_first(const Communication& c, uint8_t* smem) {
    constexpr bool kPulls = kPass == Pass::kUp || kPass == Pass::kDownGrad;
    using Ring = std::conditional_t<kPulls, PullRing, PushRing<Element>>;
    const int warp = threadIdx.x / 32;
    if (warp >= int(kRingBytes / sizeof(Ring))) return;
    Ring& ring = reinterpret_cast<Ring*>(smem)[warp];
    ExposureClock clock(c, threadIdx.x == 0);
    if constexpr (kPulls) {
        pull_tokens(c.exchange, static_cast<uint4*>(c.rows), &c.counters->next_route_group,
                    c.counters->arrived_rows(), ring);
    } else {
        push_tokens<Element, false>(c.exchange, static_cast<const Element*>(c.rows),
                                    &c.counters->next_route_group, ring, [](int) {});
    }
    clock.stop();
}

// What a math warp of any CTA does after kDown's tiles: takes part in pushing the sums that are not
// pushed yet. There are num_blocks row blocks with sub_tiles_per_block warp sub-tiles each. The
// thread `clock_thread` measures for Exposure.
template <typename Element, typename Recorder>
__device__ inline void push_results(const Communication& c, PushRing<Element>& ring,
                                    int num_blocks, int sub_tiles_per_block, int clock_thread,
                                    Recorder& recorder) {
    // The warp has waited for tiles of ranks at this ring distance and farther ones: for all row
    // blocks from this position on.
    int complete = c.exchange.sources.num_ranks, complete_begin = num_blocks;
    const auto await = [&](int distance) {
        if (distance >= complete) return;
        recorder.stop(Activity::kPush);
        while (complete > distance) {
            const int begin = c.remote_begin[--complete];
            if (threadIdx.x % 32 == 0) {
                wait_for_flag(c, c.counters->stored_sub_tiles(), complete,
                              (complete_begin - begin) * sub_tiles_per_block);
            }
            complete_begin = begin;
        }
        __syncwarp();
        recorder.stop(Activity::kAwaitTiles);
    };
    ExposureClock clock(c, threadIdx.x == clock_thread);
    recorder.start();
    push_tokens<Element, true>(c.exchange, static_cast<const Element*>(c.rows),
                               &c.counters->next_route_group, ring, await);
    recorder.stop(Activity::kPush);
    clock.stop();
}

}  // namespace comet_ds
