// SPDX-License-Identifier: Apache-2.0
// Which tile a CTA of a grouped GEMM computes next, and how its roles learn of it.
//
// 1. A tile is kTileM x kTileCols of the result. A cluster tile is what the CTAs of a cluster
//    compute together: neighbouring positions of the tile order, the same columns. Without
//    communication cluster i computes cluster tiles i, i + number of clusters, ...; with
//    communication, where CTAs start late or stop early, it takes them from a queue.
// 2. Roles: the scheduling thread of each CTA (find_tiles) finds tiles, kTileRing ahead of the
//    others; the loading thread and every math warp read them. In a cluster, the first CTA's
//    scheduling thread takes cluster tiles from the queue and tells the other's.
// 3. mbarriers, in shared memory. Parity is that of the ring's turn; nothing is reset.
//        mbarrier     arrivals                                awaited by
//        full[i]      scheduling thread                       loading thread, math warps
//        empty[i]     loading thread, every math warp         scheduling thread
//        word full    scheduling thread of the first CTA,     scheduling thread of the second CTA
//                     and the bytes of the word
//        word empty   scheduling thread of the second CTA     scheduling thread of the first CTA
//    Counters::next_cluster_tile in global memory: overlap.cuh.
// 4. Shared memory, at C::kTilesOffset: full[kTileRing], empty[kTileRing], tiles[kTileRing]; at
//    C::kClusterTileOffset: word full, word empty, word.
#pragma once

#include "gemm/expert_gemm.h"
#include "gemm/overlap.cuh"
#include "gemm/timeline.cuh"
#include "ptx/tma.cuh"

namespace comet_ds {

constexpr int kMbarrierBytes = sizeof(uint64_t);

struct alignas(16) Tile {
    int expert;
    int row;        // first row of the result; kWeightGrad: within the expert's result
    int col;        // first column
    int first_k;    // kWeightGrad: first row of the expert
    int num_steps;  // steps of kTileK
    int distance;   // kDown with communication: ring distance of the farthest rank it may serve
    bool is_valid;  // false for the one after the last
    bool is_stored;
    bool shares_b;  // whether the cluster's CTAs have the same B tile
};

// Maps cluster tiles to tiles. Cluster tiles that run at the same time share operands in L2: a
// strip of kStripRows rows of cluster tiles is walked column by column. Where results are pushed
// (overlap.cuh), rows are walked from the last to the first, and those that hold the farthest
// rank's tokens are walked before all others.
template <typename C>
class Schedule {
public:
    using Params = typename C::Params;

    __device__ Schedule(const Params& p, const typename C::Comm& comm) : p_(p), comm_(comm) {
        num_cols_ = ceil_div(p.shape.n, C::kTileCols);
        if constexpr (C::kPass == Pass::kWeightGrad) {
            num_rows_ = ceil_div(p.m, C::kTileM);
        } else {
            num_blocks_ = p.shape.expert_offsets[p.shape.num_experts] / C::kTileM;
            num_rows_ = ceil_div(num_blocks_, C::kClusterSize);
            constexpr int kSums = C::kPass == Pass::kUpGrad ? C::kMatrices : 1;
            num_steps_ = kSums * ceil_div(p.tiles.k, C::kTileK);
            if constexpr (C::kPushesResults) {
                const int begin = comm.remote_begin[comm.exchange.sources.num_ranks - 1];
                num_farthest_rows_ = num_rows_ - begin / C::kClusterSize;
            }
        }
    }

    // Returns how many cluster tiles, the first ones, may hold the farthest rank's tokens.
    __device__ int num_farthest() const { return num_farthest_rows_ * num_cols_; }

    // Writes this CTA's tile of a cluster tile; an invalid one where the cluster tile does not
    // exist.
    __device__ void get(int cluster_tile, Tile& tile) const {
        const int cta_in_cluster = blockIdx.x % C::kClusterSize;
        int cluster_row, cluster_col;
        if constexpr (C::kPass == Pass::kWeightGrad) {
            tile.expert = cluster_tile / (num_rows_ * num_cols_);
            tile.is_valid = tile.expert < p_.shape.num_experts;
            if (!tile.is_valid) return;
            place(cluster_tile - tile.expert * num_rows_ * num_cols_, cluster_row, cluster_col,
                  num_rows_);
            tile.row = cluster_row * C::kTileM;
            tile.is_stored = true;
            tile.shares_b = false;
            tile.first_k = p_.shape.expert_offsets[tile.expert];
            tile.num_steps = (p_.shape.expert_offsets[tile.expert + 1] - tile.first_k) / C::kTileK;
        } else {
            tile.is_valid = cluster_tile < num_rows_ * num_cols_;
            if (!tile.is_valid) return;
            if constexpr (C::kPushesResults) {
                const bool is_farthest = cluster_tile < num_farthest();
                const int before = is_farthest ? 0 : num_farthest_rows_;
                const int end = is_farthest ? num_farthest_rows_ : num_rows_;
                place(cluster_tile - before * num_cols_, cluster_row, cluster_col, end - before);
                cluster_row = num_rows_ - 1 - before - cluster_row;
            } else {
                place(cluster_tile, cluster_row, cluster_col, num_rows_);
            }
            const int first = cluster_row * C::kClusterSize, position = first + cta_in_cluster;
            if constexpr (C::kPushesResults) tile.distance = farthest_distance(comm_, first);
            // NOTE: a CTA without a row block of its own still loads its half of the other's B.
            tile.is_stored = position < num_blocks_;
            tile.row = (tile.is_stored ? p_.tiles.block_order[position] : position) * C::kTileM;
            tile.expert = p_.tiles.expert_order[tile.is_stored ? position : first];
            tile.shares_b = C::kClusterSize > 1 &&
                            (first + 1 >= num_blocks_ || p_.tiles.expert_order[first] ==
                                                             p_.tiles.expert_order[first + 1]);
            tile.num_steps = num_steps_;
        }
        tile.col = cluster_col * C::kTileCols;
    }

private:
    static constexpr int kStripRows = 16 / C::kClusterSize;

    static __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

    // Places the i-th cluster tile among num_rows rows of cluster tiles.
    __device__ void place(int i, int& row, int& col, int num_rows) const {
        const int strip = i / (kStripRows * num_cols_), first = strip * kStripRows;
        const int size = min(kStripRows, num_rows - first);
        const int rest = i - first * num_cols_;
        row = first + rest % size;
        col = rest / size;
    }

    const Params& p_;
    const typename C::Comm& comm_;
    int num_blocks_;                      // row blocks
    int num_rows_, num_cols_;             // of cluster tiles; kWeightGrad: of one expert
    int num_steps_;
    int num_farthest_rows_ = 0;
};

// The ring of tiles between the scheduling thread and the other roles of a CTA. Each role has a
// TileRing of its own, which counts its turns.
template <typename C>
struct TileRing {
    static constexpr int kSize = C::kTileRing;
    uint32_t smem;
    int index = 0;  // of the next tile

    __device__ uint32_t full() const {
        return smem + C::kTilesOffset + index % kSize * kMbarrierBytes;
    }
    __device__ uint32_t empty() const { return full() + kSize * kMbarrierBytes; }
    __device__ uint32_t tile() const {
        static_assert(sizeof(Tile) == C::kTileBytes);
        return smem + C::kTilesOffset + kSize * 2 * kMbarrierBytes + index % kSize * C::kTileBytes;
    }
    __device__ uint32_t parity() const { return index / kSize % 2; }

    __device__ void init_barriers() {
        constexpr int kLoadingThreads = 1;
        for (index = 0; index < kSize; ++index) {
            mbarrier_init(full(), 1);
            mbarrier_init(empty(), C::kMathWarps + kLoadingThreads);
        }
        index = 0;
    }

    // The scheduling thread calls it.
    __device__ void put(const Tile& found) {
        const auto* words = reinterpret_cast<const uint4*>(&found);
        st_shared(tile(), words[0]);
        st_shared(tile() + 16, words[1]);
        mbarrier_arrive(full());
        ++index;
    }

    // Every math warp (kIsWarp) and the loading thread call it. Returns whether the tile is valid.
    template <bool kIsWarp>
    __device__ bool get(Tile& found) {
        mbarrier_wait(full(), parity());
        auto* words = reinterpret_cast<uint4*>(&found);
        words[0] = ld_shared(tile());
        words[1] = ld_shared(tile() + 16);
        if (kIsWarp) __syncwarp();
        if (!kIsWarp || threadIdx.x % 32 == 0) mbarrier_arrive(empty());
        ++index;
        return found.is_valid;
    }
};

// The cluster tiles that a cluster computes, one after the other.
template <typename C>
class ClusterTiles {
public:
    __device__ ClusterTiles(const typename C::Comm& comm, const Schedule<C>& schedule,
                            uint32_t smem) {
        if constexpr (C::kCommunicates) {
            queue_ = &comm.counters->next_cluster_tile;
            full_ = smem + C::kClusterTileOffset;
            if constexpr (C::kPushesResults) {
                if (is_comm_cta(comm)) limit_ = schedule.num_farthest();
            }
        }
    }

    static __device__ void init_barriers(uint32_t smem) {
        if constexpr (C::kCommunicates) {
            mbarrier_init(smem + C::kClusterTileOffset, 1);
            mbarrier_init(smem + C::kClusterTileOffset + kMbarrierBytes, 1);
        }
    }

    // Returns the i-th one. Called with i = 0, 1, 2, ...
    __device__ int get(int i) {
        if constexpr (!C::kCommunicates) {
            return (blockIdx.x + i * gridDim.x) / C::kClusterSize;
        } else {
            const uint32_t empty = full_ + kMbarrierBytes, word = full_ + 2 * kMbarrierBytes;
            const uint32_t parity = i % 2;
            if (C::kClusterSize > 1 && blockIdx.x % C::kClusterSize > 0) {
                mbarrier_wait(full_, parity);
                const int told = ld_shared_word(word);
                mbarrier_arrive_cluster(empty, 0);
                return told;
            }
            taken_ = taken_ < limit_ ? int(atomicAdd(queue_, 1)) : kNone;
            if constexpr (C::kClusterSize > 1) {
                mbarrier_wait(empty, parity ^ 1);
                mbarrier_arrive_expect_tx_cluster(full_, sizeof(int), 1);
                st_async(word, taken_, full_, 1);
            }
            return taken_;
        }
    }

private:
    static constexpr int kNone = 0x7fffffff;  // beyond the last cluster tile
    uint32_t* queue_ = nullptr;
    uint32_t full_ = 0;
    int taken_ = -1, limit_ = kNone;  // takes no more after one that is not below limit_
};

// The scheduling thread: finds the CTA's tiles and waits for the rows that they read.
template <typename C>
__device__ inline void find_tiles(const typename C::Params& p, const typename C::Comm& comm,
                                  uint32_t smem) {
    const Schedule<C> schedule(p, comm);
    ClusterTiles<C> cluster_tiles(comm, schedule, smem);
    TileRing<C> tiles{smem};
    Recorder<C::kPass> recorder(p.shape.records, Recording::kTiles, 0, true);
    Tile tile;
    do {
        mbarrier_wait(tiles.empty(), tiles.parity() ^ 1);
        schedule.get(cluster_tiles.get(tiles.index), tile);
        if constexpr (C::kAwaitsRows) {
            recorder.start();
            if (tile.is_valid && tile.is_stored) wait_for_rows(comm, tile.row / C::kTileM);
            recorder.stop(Activity::kAwaitRows);
        }
        tiles.put(tile);
    } while (tile.is_valid);
}

}  // namespace comet_ds
