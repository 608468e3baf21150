// SPDX-License-Identifier: Apache-2.0
// One grouped GEMM body for every product of the experts' MLPs on Hopper.
//
// 1. Math: the passes of expert_gemm.h. Rows are sorted by expert, each expert's padded with zero
//    rows to a multiple of 128, so no tile of rows belongs to two experts and none needs a mask;
//    columns and k outside the matrices are cut off by the copy engine.
//        pass          A (rows x k)        B (columns x k)     result
//        kUp           x, k contiguous     up, k contiguous    gated: half a tile gate, half up
//        kDown         h, k contiguous     down, k contiguous
//        kDownGrad     dy, k contiguous    down, transposed
//        kUpGrad       dpre, k contiguous  up, transposed      gated: k runs over gate, then up
//        kWeightGrad   dpre, transposed    x, transposed       k runs over an expert's rows
// 2. Grid and roles: persistent clusters of one or two CTAs. Two work on neighbouring blocks of
//    rows and the same columns; where both blocks are one expert's, each loads half of B for both.
//    In a CTA warpgroup 0 loads (one thread), warpgroups 1 and 2 multiply. Either both work on one
//    128 x 256 tile, 64 rows each, or (ping-pong) each on 128 x 128 tiles of its own, so that one's
//    epilogue runs under the other's products. In warpgroup 0 another thread finds the tiles, two
//    ahead, for all roles. CTAs may communicate before or after their tiles (overlap.cuh).
// 3. Barriers, in shared memory, one of each a stage (TileSlots has the like for tiles):
//        full[s]   arrivals: the loading thread, plus the bytes of both operands (also those the
//                  other CTA loads); waited for by the math warpgroup(s)
//        empty[s]  arrivals: every math warpgroup that has read the stage, of all CTAs of the
//                  cluster, since all may write into it; waited for by the loading thread
//    The parity of a phase is that of the ring's turn; nothing is reset. Loads wait for products,
//    products for loads, both for tiles; tiles for roles to have read earlier ones and, where CTAs
//    bring rows (overlap.cuh), for these; stores for nothing: there is no cycle.
// 4. Shared memory: kStages x (A 16 KB + B 32 or 16 KB), then 2 to 4 staging buffers of 2 KB for
//    every math warp, then barriers and tiles. Products are summed in order of k, results have one
//    writer: the same input gives the same bits.
// 5. Sources: PTX ISA (wgmma, cp.async.bulk.tensor, mbarrier); CUTLASS names the two schedules
//    cooperative and ping-pong.
#pragma once

#include <type_traits>

#include "gemm/expert_epilogue.cuh"
#include "gemm/expert_gemm.h"
#include "gemm/overlap.cuh"
#include "gemm/timeline.cuh"
#include "ptx/kernel_order.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace comet_ds {

template <typename ElementType, Pass kPassValue, bool kIsGated,
          Activation kActivationValue = Activation::kRelu, bool kCommunicatesValue = false>
struct ExpertGemmConfig {
    using Element = ElementType;
    static constexpr Pass kPass = kPassValue;
    static constexpr bool kGated = kIsGated;
    static constexpr Activation kActivation = kActivationValue;
    // Whether there is communication beside the tiles (overlap.cuh).
    static constexpr bool kCommunicates = kCommunicatesValue;
    static constexpr bool kAwaitsRows =
        kCommunicates && (kPass == Pass::kUp || kPass == Pass::kDownGrad);
    static constexpr bool kPushesResults = kCommunicates && kPass == Pass::kDown;
    using Comm = std::conditional_t<kCommunicates, Communication, NoCommunication>;
    using Communicating = ExpertGemmConfig<Element, kPass, kGated, kActivation, true>;

    // NOTE: measured on an H200, all shapes of comet_ds.bench: activations in the epilogue want
    // ping-pong (kUp +7 to 12%, kDownGrad +2 to 9%), plain products the larger tile (+0 to 12%).
    // Sharing B in a cluster spares L2 (ping-pong +4 to 17%), except where k is strided (-2%).
    static constexpr bool kHasActivation = kPass == Pass::kUp || kPass == Pass::kDownGrad;
    static constexpr bool kPingPong = kHasActivation;
    static constexpr int kClusterSize = kPass == Pass::kWeightGrad ? 1 : 2;

    static constexpr bool kTransposeA = kPass == Pass::kWeightGrad;
    static constexpr bool kTransposeB = kPass != Pass::kUp && kPass != Pass::kDown;

    static constexpr int kTileM = kRowBlock;
    static constexpr int kTileN = kPingPong ? 128 : 256;
    static constexpr int kTileK = kBlockElements;
    // Columns of the result a tile covers: gate and up columns of kUp lie side by side.
    static constexpr int kTileCols = kPass == Pass::kUp && kGated ? kTileN / 2 : kTileN;
    static constexpr int kBlocksA = kTileM / kBlockElements;
    static constexpr int kBlocksB = kTileN / kBlockElements;
    static constexpr int kStageBytes = (kBlocksA + kBlocksB) * kBlockBytes;

    static constexpr int kMathWarpgroups = 2;
    static constexpr int kThreads = 128 * (1 + kMathWarpgroups);
    static constexpr int kMmaRows = kPingPong ? 2 : 1;  // 64-row products a warpgroup
    // Blocks of 16 x 64 an epilogue has in flight for a warp.
    static constexpr int kStagingBuffers =
        kPass == Pass::kWeightGrad ? 4 : kHasActivation && kGated ? 3 : 2;
    static constexpr int kStagingBytesWarp = kStagingBuffers * kStagingBytes;
    static constexpr int kMathWarps = 4 * kMathWarpgroups;
    static constexpr int kStages = kPingPong ? 5 : kPass == Pass::kWeightGrad ? 3 : 4;
    static constexpr int kArrivalsEmpty = (kPingPong ? 1 : kMathWarpgroups) * kClusterSize;

    static constexpr int kTileSlots = 2;

    static constexpr int kSwizzleAlignment = 1024;
    static constexpr int kBarriersOffset = kStages * kStageBytes + kMathWarps * kStagingBytesWarp;
    static constexpr int kSlotsOffset = kBarriersOffset + 2 * kStages * sizeof(uint64_t);
    static constexpr int kTileBytes = 32;
    static constexpr int kUnitOffset =
        kSlotsOffset + kTileSlots * (2 * sizeof(uint64_t) + kTileBytes);
    static constexpr int kEnd = kUnitOffset + 3 * sizeof(uint64_t);
    static constexpr int kSmemBytes = kSwizzleAlignment + kEnd;
    static_assert(kPass != Pass::kDownGrad || kTileCols == kDownGradTileCols);
    static_assert(kSmemBytes <= 227 * 1024, "a CTA has 227 KB of shared memory");
};

// Named barriers of a CTA; 0 is __syncthreads. Ping-pong: a math warpgroup's turn to multiply. One
// that ran ahead would take a stage's phase for the one two turns before it.
enum Barrier : int { kTurn = 1 };

// Which tile of the result a CTA works on.
struct alignas(16) Tile {
    int expert;
    int row;        // first row of the result (kWeightGrad: of out[expert])
    int col;        // first column
    int first_k;    // kWeightGrad: first row of the expert
    int num_steps;  // steps of kTileK
    int distance;   // kDown with communication: of the farthest rank it may have rows of
    bool is_valid;  // false behind the last one
    bool is_stored;
    bool shares_b;  // the cluster's CTAs have the same B tile
};

// Walks the tiles. Neighbouring clusters get tiles of neighbouring rows in groups of kGroupRows,
// then the next columns, so that what runs at one time shares its operands in L2. Where results
// travel (overlap.cuh), from the last row on, and those the farthest rank waits for by themselves.
template <typename C>
class Schedule {
public:
    __device__ Schedule(const ExpertGemmParams& p, const typename C::Comm& comm)
        : p_(p), comm_(comm) {
        units_n_ = ceil_div(p.n, C::kTileCols);
        if constexpr (C::kPass == Pass::kWeightGrad) {
            units_m_ = ceil_div(p.m, C::kTileM);
        } else {
            num_blocks_ = p.expert_offsets[p.num_experts] / C::kTileM;
            units_m_ = ceil_div(num_blocks_, C::kClusterSize);
            const int segments = C::kPass == Pass::kUpGrad && C::kGated ? 2 : 1;
            num_steps_ = segments * ceil_div(p.k, C::kTileK);
            if constexpr (C::kPushesResults) {
                const int begin = comm.remote_begin[comm.exchange.sources.num_ranks - 1];
                farthest_units_m_ = units_m_ - begin / C::kClusterSize;
            }
        }
    }

    // The first so many units are those the farthest rank waits for.
    __device__ int farthest_units() const { return farthest_units_m_ * units_n_; }

    // The tile of a unit that is this CTA's; no valid one where there is no such unit.
    __device__ void get(int unit, Tile& tile) const {
        const int rank = blockIdx.x % C::kClusterSize;
        int unit_m, unit_n;
        if constexpr (C::kPass == Pass::kWeightGrad) {
            tile.expert = unit / (units_m_ * units_n_);
            tile.is_valid = tile.expert < p_.num_experts;
            if (!tile.is_valid) return;
            place(unit - tile.expert * units_m_ * units_n_, unit_m, unit_n, units_m_);
            tile.row = unit_m * C::kTileM;
            tile.is_stored = true;
            tile.shares_b = false;
            tile.first_k = p_.expert_offsets[tile.expert];
            tile.num_steps = (p_.expert_offsets[tile.expert + 1] - tile.first_k) / C::kTileK;
        } else {
            tile.is_valid = unit < units_m_ * units_n_;
            if (!tile.is_valid) return;
            if constexpr (C::kPushesResults) {
                const bool is_farthest = unit < farthest_units();
                const int before = is_farthest ? 0 : farthest_units_m_;
                const int end = is_farthest ? farthest_units_m_ : units_m_;
                place(unit - before * units_n_, unit_m, unit_n, end - before);
                unit_m = units_m_ - 1 - before - unit_m;
            } else {
                place(unit, unit_m, unit_n, units_m_);
            }
            const int first = unit_m * C::kClusterSize, position = first + rank;
            if constexpr (C::kPushesResults) tile.distance = farthest_distance(comm_, first);
            // Without a block of its own a CTA still loads its part of the other's operand.
            tile.is_stored = position < num_blocks_;
            tile.row = (tile.is_stored ? p_.block_order[position] : position) * C::kTileM;
            tile.expert = p_.expert_order[tile.is_stored ? position : first];
            tile.shares_b =
                C::kClusterSize > 1 &&
                (first + 1 >= num_blocks_ || p_.expert_order[first] == p_.expert_order[first + 1]);
            tile.num_steps = num_steps_;
        }
        tile.col = unit_n * C::kTileCols;
    }

private:
    static constexpr int kGroupRows = 16 / C::kClusterSize;

    static __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

    // The place of a unit among so many rows of units.
    __device__ void place(int unit, int& m, int& n, int units_m) const {
        const int group = unit / (kGroupRows * units_n_), first = group * kGroupRows;
        const int size = min(kGroupRows, units_m - first);
        const int rest = unit - first * units_n_;
        m = first + rest % size;
        n = rest / size;
    }

    const ExpertGemmParams& p_;
    const typename C::Comm& comm_;
    int num_blocks_, units_m_, units_n_, num_steps_;
    int farthest_units_m_ = 0;
};

// How a CTA's tiles get from the thread that finds them to all other roles: a ring of slots in
// shared memory, each with a full and an empty barrier.
template <typename C>
struct TileSlots {
    static constexpr int kSlots = C::kTileSlots;
    uint32_t smem;
    int index = 0;  // of the tile whose turn it is

    __device__ uint32_t full() const { return smem + C::kSlotsOffset + index % kSlots * 8; }
    __device__ uint32_t empty() const { return full() + kSlots * 8; }
    __device__ uint32_t tile() const {
        static_assert(sizeof(Tile) == C::kTileBytes);
        return smem + C::kSlotsOffset + kSlots * 16 + index % kSlots * C::kTileBytes;
    }
    __device__ uint32_t parity() const { return index / kSlots % 2; }

    __device__ void init_barriers() {
        for (index = 0; index < kSlots; ++index) {
            mbarrier_init(full(), 1);
            mbarrier_init(empty(), C::kMathWarps + 1);
        }
        index = 0;
    }

    // One thread writes.
    __device__ void put(const Tile& found) {
        const auto* words = reinterpret_cast<const uint4*>(&found);
        st_shared(tile(), words[0]);
        st_shared(tile() + 16, words[1]);
        mbarrier_arrive(full());
        ++index;
    }

    // Every math warp and the loading thread read all; whether there is one.
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

// The i-th unit of tiles a cluster computes: in its turn among all clusters or, where CTAs come
// late or leave early, the next of all that nobody has taken. Its first CTA takes and tells the
// other, through a word and two barriers in shared memory.
template <typename C>
class Units {
public:
    __device__ Units(const typename C::Comm& comm, const Schedule<C>& schedule, uint32_t smem) {
        if constexpr (C::kCommunicates) {
            queue_ = &comm.counters->units;
            full_ = smem + C::kUnitOffset;
            if constexpr (C::kPushesResults) {
                if (is_set_apart(comm)) limit_ = schedule.farthest_units();
            }
        }
    }

    static __device__ void init_barriers(uint32_t smem) {
        if constexpr (C::kCommunicates) {
            mbarrier_init(smem + C::kUnitOffset, 1);
            mbarrier_init(smem + C::kUnitOffset + 8, 1);
        }
    }

    __device__ int get(int i) {
        if constexpr (!C::kCommunicates) {
            return (blockIdx.x + i * gridDim.x) / C::kClusterSize;
        } else {
            const uint32_t empty = full_ + 8, word = full_ + 16, parity = i % 2;
            if (C::kClusterSize > 1 && blockIdx.x % C::kClusterSize > 0) {
                mbarrier_wait(full_, parity);
                const int unit = ld_shared_word(word);
                mbarrier_arrive_cluster(empty, 0);
                return unit;
            }
            last_ = last_ < limit_ ? int(atomicAdd(queue_, 1)) : kNone;
            if constexpr (C::kClusterSize > 1) {
                mbarrier_wait(empty, parity ^ 1);
                mbarrier_arrive_expect_tx_cluster(full_, sizeof(int), 1);
                st_async(word, last_, full_, 1);
            }
            return last_;
        }
    }

private:
    static constexpr int kNone = 0x7fffffff;
    uint32_t* queue_ = nullptr;
    uint32_t full_ = 0;
    int last_ = -1, limit_ = kNone;
};

// One thread of every CTA: finds its tiles, and waits for the rows they read.
template <typename C>
__device__ inline void find_tiles(const ExpertGemmParams& p, const typename C::Comm& comm,
                                  uint32_t smem) {
    const Schedule<C> schedule(p, comm);
    Units<C> units(comm, schedule, smem);
    TileSlots<C> slots{smem};
    Recorder<C::kPass> recorder(p.records, Recording::kTiles, 0, true);
    Tile tile;
    do {
        mbarrier_wait(slots.empty(), slots.parity() ^ 1);
        schedule.get(units.get(slots.index), tile);
        if constexpr (C::kAwaitsRows) {
            recorder.start();
            if (tile.is_valid && tile.is_stored) wait_for_rows(comm, tile.row / C::kTileM);
            recorder.stop(Activity::kAwaitRows);
        }
        slots.put(tile);
    } while (tile.is_valid);
}

// The ring of stages; each role has its own.
template <typename C>
struct Ring {
    uint32_t smem;  // stages, 1024-byte aligned; behind them C::kBarriersOffset
    int stage = 0;
    uint32_t parity = 0;

    __device__ uint32_t a() const { return smem + stage * C::kStageBytes; }
    __device__ uint32_t b() const { return a() + C::kBlocksA * kBlockBytes; }
    __device__ uint32_t full(int of_stage) const {
        return smem + C::kBarriersOffset + of_stage * 8;
    }
    __device__ uint32_t empty(int of_stage) const { return full(C::kStages + of_stage); }
    __device__ void advance() {
        if (++stage == C::kStages) stage = 0, parity ^= 1;
    }
    __device__ void skip(int num_steps) {
        const int turns = (stage + num_steps) / C::kStages;
        stage += num_steps - turns * C::kStages;
        parity ^= turns & 1;
    }
};

// Loads kBlocks blocks of 64 x 64 of an operand: rows mn ... and columns k ..., or transposed.
template <bool kTranspose, int kBlocks>
__device__ inline void load_blocks(uint32_t smem, const CUtensorMap* map, uint32_t barrier, int mn,
                                   int k, bool into_cluster) {
    constexpr uint16_t kBothCtas = 0b11;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
        const int along = mn + i * kBlockElements;
        const int col = kTranspose ? along : k, row = kTranspose ? k : along;
        const uint32_t block = smem + i * kBlockBytes;
        if (into_cluster) {
            tma_load_multicast(block, map, barrier, col, row, 0, kBothCtas);
        } else {
            tma_load(block, map, barrier, col, row, 0);
        }
    }
}

template <typename C>
__device__ inline void load_tiles(const ExpertGemmParams& p, Ring<C> ring) {
    const int rank = C::kClusterSize > 1 ? cluster_cta_rank() : 0;
    TileSlots<C> slots{ring.smem};
    const int steps_per_matrix = (p.k + C::kTileK - 1) / C::kTileK;
    int mapped_expert = -1;
    Tile tile;
    while (slots.template get<false>(tile)) {
        const CUtensorMap *first = nullptr, *second = nullptr;
        if constexpr (C::kPass != Pass::kWeightGrad) {
            first = p.weights[0] + tile.expert;
            if constexpr (C::kGated) second = p.weights[1] + tile.expert;
            if (tile.expert != mapped_expert) {
                mapped_expert = tile.expert;
                fence_tensormap_acquire(first);
                if constexpr (C::kGated) fence_tensormap_acquire(second);
            }
        }
        for (int step = 0; step < tile.num_steps; ++step, ring.advance()) {
            const uint32_t full = ring.full(ring.stage);
            mbarrier_wait(ring.empty(ring.stage), ring.parity ^ 1);
            mbarrier_arrive_expect_tx(full, C::kStageBytes);
            const auto load_a = [&](const CUtensorMap* map, int k) {
                load_blocks<C::kTransposeA, C::kBlocksA>(ring.a(), map, full, tile.row, k, false);
            };
            // B in two halves, which a cluster's CTAs may divide among themselves.
            const auto load_b = [&](const CUtensorMap* map, int half, int col, int k) {
                constexpr int kHalf = C::kBlocksB / 2;
                if (tile.shares_b && half != rank) return;
                load_blocks<C::kTransposeB, kHalf>(ring.b() + half * kHalf * kBlockBytes, map, full,
                                                   col, k, tile.shares_b);
            };
            constexpr int kHalfCols = C::kTileN / 2;
            if constexpr (C::kPass == Pass::kWeightGrad) {
                const int k = tile.first_k + step * C::kTileK;
                load_a(&p.a[0], k);
                load_b(&p.b, 0, tile.col, k);
                load_b(&p.b, 1, tile.col + kHalfCols, k);
            } else if constexpr (C::kPass == Pass::kUp && C::kGated) {
                load_a(&p.a[0], step * C::kTileK);
                load_b(first, 0, tile.col, step * C::kTileK);
                load_b(second, 1, tile.col, step * C::kTileK);
            } else {
                const bool is_second = step >= steps_per_matrix;
                const int k = (is_second ? step - steps_per_matrix : step) * C::kTileK;
                load_a(&p.a[is_second ? 1 : 0], k);
                load_b(is_second ? second : first, 0, tile.col, k);
                load_b(is_second ? second : first, 1, tile.col + kHalfCols, k);
            }
        }
    }
}

// Sums the products of one tile; returns with the ring behind it and all its stages released.
template <typename C>
__device__ inline void multiply(float (&acc)[C::kMmaRows][C::kTileN / 2], int num_steps,
                                Ring<C>& ring, int warpgroup) {
    const int thread = threadIdx.x % 128;
    const auto release = [&](int stage) {
        if constexpr (C::kClusterSize == 1) {
            if (thread == 0) mbarrier_arrive(ring.empty(stage));
        } else {
            if (thread < C::kClusterSize) mbarrier_arrive_cluster(ring.empty(stage), thread);
        }
    };
    const uint32_t first_block = C::kPingPong ? 0 : warpgroup * kBlockBytes;
    // Also what makes the weight gradient of an expert without rows zero.
#pragma unroll
    for (int m = 0; m < C::kMmaRows; ++m) {
#pragma unroll
        for (int i = 0; i < C::kTileN / 2; ++i) acc[m][i] = 0.0f;
    }
    int previous = -1;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
        mbarrier_wait(ring.full(ring.stage), ring.parity);
        const uint64_t a = matrix_descriptor(ring.a() + first_block);
        const uint64_t b = matrix_descriptor(ring.b());
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < C::kTileK / 16; ++k) {
#pragma unroll
            for (int m = 0; m < C::kMmaRows; ++m) {
                wgmma<typename C::Element, C::kTransposeA, C::kTransposeB>(
                    acc[m], a + m * (kBlockBytes >> 4) + k * kDescriptorStepK<C::kTransposeA>,
                    b + k * kDescriptorStepK<C::kTransposeB>);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (previous >= 0) release(previous);
        previous = ring.stage;
        ring.advance();
    }
    if constexpr (C::kPingPong) named_barrier_arrive(kTurn + 1 - warpgroup, 2 * 128);
    wgmma_wait<0>();
    if (previous >= 0) release(previous);
}

template <typename C>
__device__ inline void add_bias(float (&acc)[C::kMmaRows][C::kTileN / 2], const Tile& tile,
                                const ExpertGemmParams& p) {
    using Element = typename C::Element;
    constexpr int kMatrices = C::kPass == Pass::kUp && C::kGated ? 2 : 1;
    constexpr int kGroups = C::kTileN / 8 / kMatrices;  // of 8 columns
    const int col = tile.col + threadIdx.x % 4 * 2;
#pragma unroll
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
        if (p.bias[matrix] == nullptr) continue;
        const auto* bias = static_cast<const Element*>(p.bias[matrix][tile.expert]) + col;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            if (col + group * 8 >= p.n) continue;
            const float2 pair =
                unpack<Element>(*reinterpret_cast<const uint32_t*>(bias + group * 8));
#pragma unroll
            for (int m = 0; m < C::kMmaRows; ++m) {
                float* to = acc[m] + (matrix * kGroups + group) * 4;
                to[0] += pair.x, to[1] += pair.y;
                to[2] += pair.x, to[3] += pair.y;
            }
        }
    }
}

// First of a warp's 16 rows in its m-th 64 rows of a tile.
template <typename C>
__device__ inline int warp_row(const Tile& tile, int warpgroup, int m) {
    return tile.row + (C::kPingPong ? m : warpgroup) * kBlockElements + threadIdx.x % 128 / 32 * 16;
}

template <typename C>
__device__ inline void finish_tile(float (&acc)[C::kMmaRows][C::kTileN / 2], const Tile& tile,
                                   const ExpertGemmParams& p, int warpgroup,
                                   SavedBlock<C::kGated>& saved,
                                   const Staging<C::kStagingBuffers>& staging) {
    using Element = typename C::Element;
    constexpr int kBlocks = C::kTileCols / kBlockElements;
    const int lane = threadIdx.x % 32;
    if constexpr (C::kPass == Pass::kUp || C::kPass == Pass::kDown) add_bias<C>(acc, tile, p);
#pragma unroll
    for (int m = 0; m < C::kMmaRows; ++m) {
        Fragment at;
        at.warp_row = warp_row<C>(tile, warpgroup, m);
        const int row = at.warp_row + lane / 4;  // the thread's, and 8 below
        float2 weight, dots{0.0f, 0.0f};
        if constexpr (C::kPass == Pass::kDownGrad) {
            weight = {p.row_weights[row], p.row_weights[row + 8]};
        }
#pragma unroll
        for (int c = 0; c < kBlocks; ++c) {
            at.block_col = tile.col + c * kBlockElements;
            const float* block = acc[m] + c * kBlockElements / 2;
            if constexpr (C::kPass == Pass::kUp) {
                constexpr int kUpColumns = C::kGated ? C::kTileN / 4 : 0;
                finish_up<Element, C::kActivation, C::kGated>(block + kUpColumns, block, at, p,
                                                              staging);
            } else if constexpr (C::kPass == Pass::kDownGrad) {
                const SavedBlock<C::kGated> current = saved;
                finish_down_grad<Element, C::kActivation>(
                    block, at, p, weight, dots, current, staging, [&] {
                        const int next = m * kBlocks + c + 1;
                        if (next == C::kMmaRows * kBlocks) return;
                        saved.template load<Element>(
                            p, warp_row<C>(tile, warpgroup, next / kBlocks),
                            tile.col + next % kBlocks * kBlockElements, staging);
                    });
            } else {
                constexpr bool kIsWeightGrad = C::kPass == Pass::kWeightGrad;
                // As many blocks as there are buffers leave together.
                constexpr int kTogether = C::kStagingBuffers;
                const int buffer = c % kTogether;
                if (buffer == 0) staging.begin();
                write_plain<Element>(block, buffer, staging);
                if (buffer + 1 < kTogether) continue;
                staging.hand_over();
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    const int col = at.block_col + (i - buffer) * kBlockElements;
                    if (kIsWeightGrad && p.accumulates) {
                        staging.send_to_add(i, &p.out[0], col, at.warp_row, tile.expert);
                    } else {
                        staging.send(i, &p.out[0], col, at.warp_row,
                                     kIsWeightGrad ? tile.expert : 0);
                    }
                }
                staging.end();
            }
        }
        if constexpr (C::kPass == Pass::kDownGrad) {
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                dots.x += __shfl_xor_sync(~0u, dots.x, lanes);
                dots.y += __shfl_xor_sync(~0u, dots.y, lanes);
            }
            if (lane % 4 == 0) {
                float* out = p.row_dots + int64_t{tile.col / C::kTileCols} * p.max_rows + row;
                out[0] = dots.x;
                out[8] = dots.y;
            }
        }
    }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    expert_gemm_kernel(const __grid_constant__ ExpertGemmParams p,
                       const __grid_constant__ typename C::Comm comm) {
    using Element = typename C::Element;
    extern __shared__ uint8_t smem_raw[];
    constexpr uint32_t kAlign = C::kSwizzleAlignment;
    const uint32_t smem = (smem_address(smem_raw) + kAlign - 1) / kAlign * kAlign;
    [[maybe_unused]] uint8_t* const smem_rings = smem_raw + (smem - smem_address(smem_raw));
    Ring<C> ring{smem};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < C::kStages; ++stage) {
            mbarrier_init(ring.full(stage), 1);
            mbarrier_init(ring.empty(stage), C::kArrivalsEmpty);
        }
        TileSlots<C>{smem}.init_barriers();
        Units<C>::init_barriers(smem);
        fence_mbarrier_init();
    }
    const auto sync_cluster = [] {
        C::kClusterSize > 1 ? cluster_sync() : __syncthreads();
    };
    sync_cluster();
    begin_kernel();
    if constexpr (C::kCommunicates && !C::kPushesResults) {
        if (is_set_apart(comm)) {
            Recorder<C::kPass> recorder(p.records, Recording::kCommunication, 0, threadIdx.x == 0);
            recorder.start();
            communicate_first<Element, C::kPass, C::kBarriersOffset>(comm, smem_rings);
            recorder.stop(C::kAwaitsRows ? Activity::kPull : Activity::kPush);
            fence_proxy_async();  // the copy engine will write there, also the other CTA's
            sync_cluster();
        }
    }

    constexpr int kLoadRegisters = 40, kMathRegisters = 232;
    if (threadIdx.x < 128) {
        setmaxnreg_dec<kLoadRegisters>();
        if (threadIdx.x == 0) load_tiles<C>(p, ring);
        if (threadIdx.x == 32) find_tiles<C>(p, comm, smem);
    } else {
        setmaxnreg_inc<kMathRegisters>();
        const int warpgroup = threadIdx.x / 128 - 1;
        const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
        const Staging<C::kStagingBuffers> staging(
            smem + C::kStages * C::kStageBytes + warp * C::kStagingBytesWarp, lane);
        TileSlots<C> slots{smem};
        [[maybe_unused]] StoredPieces pieces;
        Recorder<C::kPass> recorder(p.records, Recording::kMath, warpgroup, threadIdx.x % 128 == 0);
        if (C::kPingPong && warpgroup == 1) named_barrier_arrive(kTurn, 2 * 128);
        Tile tile;
#pragma unroll 1
        for (int i = 0; slots.template get<true>(tile); ++i) {
            if (C::kPingPong && i % C::kMathWarpgroups != warpgroup) {
                ring.skip(tile.num_steps);
                continue;
            }
            float acc[C::kMmaRows][C::kTileN / 2];
            SavedBlock<C::kGated> saved;  // of the first block, on its way while products run
            if (C::kPass == Pass::kDownGrad && tile.is_stored) {
                saved.template load<Element>(p, warp_row<C>(tile, warpgroup, 0), tile.col, staging);
            }
            if constexpr (C::kPingPong) named_barrier_sync(kTurn + warpgroup, 2 * 128);
            recorder.start();
            multiply<C>(acc, tile.num_steps, ring, warpgroup);
            recorder.stop(Activity::kMultiply);
            if constexpr (C::kPushesResults) pieces.flush(comm);
            if (!tile.is_stored) continue;
            finish_tile<C>(acc, tile, p, warpgroup, saved, staging);
            recorder.stop(Activity::kFinish);
            if constexpr (C::kPushesResults) pieces.add(tile.distance);
        }
        if constexpr (C::kPushesResults) {
            pieces.flush(comm);
            static_assert(C::kMathWarps * sizeof(PushRing<Element>) <= C::kStages * C::kStageBytes);
            named_barrier_sync(kTurn, 2 * 128);  // the stages have been read
            Recorder<C::kPass> pushes(p.records, Recording::kCommunication, 0, threadIdx.x == 128);
            const int pieces_per_block = (p.n + C::kTileCols - 1) / C::kTileCols * C::kMathWarps;
            push_results(comm, reinterpret_cast<PushRing<Element>*>(smem_rings)[warp],
                         p.expert_offsets[p.num_experts] / C::kTileM, pieces_per_block, pushes);
        }
        staging.begin();
    }
    // No CTA may end while another can still write into its shared memory.
    __syncwarp();
    if constexpr (C::kClusterSize > 1) cluster_sync();
}

}  // namespace comet_ds
