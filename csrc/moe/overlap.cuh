// SPDX-License-Identifier: Apache-2.0
// Communication beside a GEMM: what the CTAs set apart do, and how tiles and they wait for each
// other.
//
// 1. kUp, kDownGrad: the CTAs set apart pull other ranks' tokens into rows, token by token; a tile
//    is loaded when the rows of its block have come. Blocks of this rank's own tokens need none
//    and come first in RowPlan::block_order.
//    kDown: tiles run panel by panel of columns; when all pieces of a panel are stored, the CTAs
//    set apart sum it for other ranks' tokens and push it to them.
//    kWeightGrad: they push rows that were complete before the launch.
// 2. Grid: the first num_ctas CTAs, which are scheduled first; all their warps take turns.
// 3. Flags, in this GPU's memory, zero before the launch:
//        progress[block]  kUp, kDownGrad: += 1 for every row by the warp that wrote it (proxy
//                         fence, release, GPU scope), awaited by the loading thread (acquire,
//                         proxy fence: the copy engine reads the rows)
//        progress[panel]  kDown: += 1 by every math warp whose piece of a tile is in memory (bulk
//                         group complete, proxy fence, release, GPU scope), awaited by warps that
//                         push (acquire)
//    Pulling waits for nothing, so tiles get their rows; tiles of kDown wait for nothing, so panels
//    get complete; whatever other kernels occupy, the CTAs of a launch that do not fit come when
//    others of it are done.
// 4. Shared memory: none.
#pragma once

#include "device/memory_order.cuh"
#include "device/tma.cuh"
#include "exchange.h"
#include "expert_gemm.h"
#include "token_rows.cuh"

namespace comet_ds {

// In place of Communication in kernels that have no CTAs set apart.
struct NoCommunication {};

__device__ inline int num_set_apart(const Communication& c) { return c.num_ctas; }
__device__ inline int num_set_apart(const NoCommunication&) { return 0; }

// Waits for progress[index]. Past the deadline it notes what it waited for and goes on, as do all
// waits after it; the next meeting prints the note and traps. (A call to printf in a GEMM kernel
// would serialise its wgmma.)
__device__ inline void wait_for_count(const Communication& c, int index, uint32_t expected) {
    const volatile uint32_t* is_late = &c.late->is_set;
    const uint64_t start = global_time_ns();
    for (uint32_t seen; (seen = load_acquire_gpu(c.progress + index)) < expected; __nanosleep(50)) {
        if (*is_late) return;
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

// A math warp's pieces of kDown's tiles: counted when they are in memory, which is known when the
// next tile's are about to leave.
class StoredPieces {
public:
    __device__ explicit StoredPieces(uint32_t* progress) : progress_(progress) {}
    // After the piece's last store was committed.
    __device__ void add(int col) { panel_ = col / kPanelCols; }
    // Waits for the piece before, if any, and counts it.
    __device__ void flush() {
        if (panel_ < 0) return;
        if (threadIdx.x % 32 == 0) {
            bulk_wait_group<0>();
            fence_proxy_async_global();
            add_release_gpu(progress_ + panel_, 1);
        }
        panel_ = -1;
    }

private:
    uint32_t* progress_;
    int panel_ = -1;
};

// The part of a CTA set apart. kDown stores pieces_per_tile pieces for a tile of tile_cols columns.
template <typename Element, Pass kPass>
__device__ inline void communicate(const Communication& c, int num_row_blocks, int tile_cols,
                                   int pieces_per_tile) {
    const int warps = blockDim.x / 32;
    const int worker = blockIdx.x * warps + threadIdx.x / 32, num_workers = c.num_ctas * warps;
    const ExchangeParams& p = c.exchange;
    if constexpr (kPass == Pass::kUp || kPass == Pass::kDownGrad) {
        pull_tokens(p, static_cast<uint4*>(c.rows), worker, num_workers, c.progress);
    } else if constexpr (kPass == Pass::kDown) {
        for (int col = 0; col < p.hidden; col += kPanelCols) {
            const int end = min(int64_t{col} + kPanelCols, p.hidden), panel = col / kPanelCols;
            const int tiles = num_row_blocks * ((end - col + tile_cols - 1) / tile_cols);
            if (threadIdx.x % 32 == 0) wait_for_count(c, panel, tiles * pieces_per_tile);
            __syncwarp();
            push_tokens<Element, true>(p, static_cast<const Element*>(c.rows), worker,
                                       num_workers, col, end);
        }
    } else if constexpr (kPass == Pass::kWeightGrad) {
        push_tokens<Element, false>(p, static_cast<const Element*>(c.rows), worker, num_workers, 0,
                                    p.hidden);
    }
}

}  // namespace comet_ds
