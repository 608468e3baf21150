// SPDX-License-Identifier: Apache-2.0
// One grouped GEMM body for every product of the experts' MLPs on Hopper.
//
// 1. Math: the passes of expert_gemm.h. Rows are sorted by expert, and each expert's are padded
//    with zero rows to a multiple of 128, so no tile spans two experts and none needs a mask. TMA
//    cuts off columns and k outside the matrices.
//        pass          A (rows x k)                B (columns x k)     result
//        kUp           x, k contiguous             up, k contiguous    gated: a tile is half gate
//                                                                      and half up
//        kDown         h, k contiguous             down, k contiguous
//        kDownGrad     dy, k contiguous            down, transposed
//        kUpGrad       grad_preact, k contiguous   up, transposed      gated: k runs over gate,
//                                                                      then over up
//        kWeightGrad   a, transposed               b, transposed       k runs over an expert's rows
// 2. Grid and roles: persistent clusters of one or two CTAs. The two CTAs of a cluster work on
//    neighbouring row blocks and the same columns; where both row blocks belong to one expert, each
//    CTA loads half of B for both. Warpgroup 0 of a CTA has a loading and a scheduling thread,
//    warpgroups 1 and 2 do the math (GemmThread). Either both math warpgroups work on one 128 x 256
//    tile, 64 rows each, or (ping-pong) each on 128 x 128 tiles of its own, so that the epilogue of
//    one overlaps the products of the other. The part of a tile that one warp stores is its
//    sub-tile. tile_schedule.cuh has the scheduling thread; CTAs that communicate before or after
//    their tiles are in overlap.cuh.
// 3. Flags. In global memory: overlap.cuh. Named barriers: GemmBarrier below. mbarriers in shared
//    memory, one of each per stage (those for tiles: tile_schedule.cuh):
//        mbarrier   arrivals                                             awaited by
//        full[s]    the loading thread, and the bytes of both operands   the math warpgroup(s)
//                   (also those that the other CTA loads)
//        empty[s]   every math warpgroup that has read the stage, of     the loading thread
//                   all CTAs of the cluster, because all write into it
//    Parity is that of the ring's turn; nothing is reset. There is no cycle: loads wait for
//    products, products for loads, both for tiles; tiles wait for the roles to have read earlier
//    ones and, where CTAs pull rows, for these; stores wait for nothing.
// 4. Shared memory: kStages x (A 16 KB + B 32 or 16 KB), then 2 to 4 staging buffers of 2 KB for
//    each math warp, then mbarriers and tiles (offsets in ExpertGemmConfig). Products are summed in
//    order of k and a result has one writer: the same input gives the same bits.
// 5. Sources: PTX ISA (wgmma, cp.async.bulk.tensor, mbarrier); CUTLASS calls the two schedules
//    cooperative and ping-pong.
#pragma once

#include <type_traits>

#include "gemm/expert_epilogue.cuh"
#include "gemm/expert_gemm.h"
#include "gemm/overlap.cuh"
#include "gemm/tile_schedule.cuh"
#include "gemm/timeline.cuh"
#include "ptx/kernel_order.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace comet_ds {

constexpr int kWarpgroupThreads = 128;

// The threads of a CTA that have a role.
enum GemmThread : int {
    kLoadingThread = 0,                    // loads operands (load_tiles)
    kSchedulingThread = 32,                // finds tiles (find_tiles)
    kFirstMathThread = kWarpgroupThreads,  // it and all later ones do the math (compute_tiles)
};

// Named barriers of a CTA; 0 is __syncthreads. Each counts both math warpgroups.
enum GemmBarrier : int {
    // Ping-pong: a math warpgroup syncs at its own to take its turn to multiply; the other arrives
    // there after its last product. NOTE: without turns a warpgroup could lap the ring and misread
    // an mbarrier's parity.
    kTurnOfWarpgroup0 = 1,
    kTurnOfWarpgroup1 = 2,
    // kDown that pushes results: all stages have been read, rings of slices may take their place.
    kStagesRead = 3,
};
constexpr int kGemmBarrierThreads = 2 * kWarpgroupThreads;

__device__ inline int turn_of(int math_warpgroup) { return kTurnOfWarpgroup0 + math_warpgroup; }

template <Pass kPass>
struct ParamsOf;
template <>
struct ParamsOf<Pass::kUp> { using Type = UpParams; };
template <>
struct ParamsOf<Pass::kDown> { using Type = DownParams; };
template <>
struct ParamsOf<Pass::kDownGrad> { using Type = DownGradParams; };
template <>
struct ParamsOf<Pass::kUpGrad> { using Type = UpGradParams; };
template <>
struct ParamsOf<Pass::kWeightGrad> { using Type = WeightGradParams; };

template <typename ElementType, Pass kPassValue, bool kIsGated,
          Activation kActivationValue = Activation::kRelu, bool kCommunicatesValue = false>
struct ExpertGemmConfig {
    using Element = ElementType;
    static constexpr Pass kPass = kPassValue;
    using Params = typename ParamsOf<kPass>::Type;
    static constexpr bool kGated = kIsGated;
    static constexpr Activation kActivation = kActivationValue;
    static constexpr int kMatrices =
        kGated && (kPass == Pass::kUp || kPass == Pass::kUpGrad) ? 2 : 1;  // B is of gate, up
    // Whether tiles are overlapped with communication (overlap.cuh).
    static constexpr bool kCommunicates = kCommunicatesValue;
    static constexpr bool kAwaitsRows =
        kCommunicates && (kPass == Pass::kUp || kPass == Pass::kDownGrad);
    static constexpr bool kPushesResults = kCommunicates && kPass == Pass::kDown;
    using Comm = std::conditional_t<kCommunicates, Communication, NoCommunication>;
    using Communicating = ExpertGemmConfig<Element, kPass, kGated, kActivation, true>;

    // NOTE: measured on an H200, all shapes of comet_ds.bench: activations in the epilogue want
    // ping-pong (kUp +7 to 12%, kDownGrad +2 to 9%), plain products the larger tile (+0 to 12%).
    // Sharing B in a cluster relieves L2 (ping-pong +4 to 17%), except where k is strided (-2%).
    static constexpr bool kHasActivation = kPass == Pass::kUp || kPass == Pass::kDownGrad;
    static constexpr bool kPingPong = kHasActivation;
    static constexpr int kClusterSize = kPass == Pass::kWeightGrad ? 1 : 2;

    static constexpr bool kTransposeA = kPass == Pass::kWeightGrad;
    static constexpr bool kTransposeB = kPass != Pass::kUp && kPass != Pass::kDown;

    static constexpr int kTileM = kRowBlock;
    static constexpr int kTileN = kPingPong ? 128 : 256;
    static constexpr int kTileK = kBoxSide;
    // Columns of the result that a tile covers; a gated kUp has gate and up columns side by side.
    static constexpr int kTileCols = kPass == Pass::kUp && kGated ? kTileN / 2 : kTileN;
    static constexpr int kBoxesA = kTileM / kBoxSide;
    static constexpr int kBoxesB = kTileN / kBoxSide;
    static constexpr int kStageBytes = (kBoxesA + kBoxesB) * kBoxBytes;

    static constexpr int kMathWarpgroups = 2;
    static constexpr int kMathWarps = 4 * kMathWarpgroups;
    static constexpr int kThreads = kWarpgroupThreads * (1 + kMathWarpgroups);
    static constexpr int kMmaRows = kPingPong ? 2 : 1;  // 64-row products of a warpgroup
    static constexpr int kArrivalsEmpty = (kPingPong ? 1 : kMathWarpgroups) * kClusterSize;
    // Result boxes that a warp has in flight.
    static constexpr int kStagingBuffers =
        kPass == Pass::kWeightGrad ? 4 : kHasActivation && kGated ? 3 : 2;
    static constexpr int kStagingBytesWarp = kStagingBuffers * kStagingBytes;
    static constexpr int kStages = kPingPong ? 5 : kPass == Pass::kWeightGrad ? 3 : 4;
    static constexpr int kTileRing = 2;  // tiles found ahead
    static constexpr int kTileBytes = 32;

    // Offsets in shared memory, in bytes from an address that kSwizzleAlignment divides.
    static constexpr int kSwizzleAlignment = 1024;
    static constexpr int kStagingOffset = kStages * kStageBytes;
    static constexpr int kBarriersOffset = kStagingOffset + kMathWarps * kStagingBytesWarp;
    static constexpr int kTilesOffset = kBarriersOffset + 2 * kStages * kMbarrierBytes;
    static constexpr int kClusterTileOffset =
        kTilesOffset + kTileRing * (2 * kMbarrierBytes + kTileBytes);
    static constexpr int kEnd = kClusterTileOffset + 2 * kMbarrierBytes + sizeof(uint64_t);
    static constexpr int kSmemBytes = kSwizzleAlignment + kEnd;
    static_assert(kPass != Pass::kDownGrad || kTileCols == kDownGradTileCols);
    static_assert(kSmemBytes <= 227 * 1024, "a CTA has 227 KB of shared memory");
};

// The ring of stages. Each role has a StageRing of its own, which counts its turns.
template <typename C>
struct StageRing {
    uint32_t smem;  // of stage 0
    int stage = 0;
    uint32_t parity = 0;

    __device__ uint32_t a() const { return smem + stage * C::kStageBytes; }
    __device__ uint32_t b() const { return a() + C::kBoxesA * kBoxBytes; }
    __device__ uint32_t full(int of_stage) const {
        return smem + C::kBarriersOffset + of_stage * kMbarrierBytes;
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

// --- role: loading thread ------------------------------------------------------------------------

// Loads kBoxes boxes of an operand: rows mn ... and columns k ..., or transposed.
template <bool kTranspose, int kBoxes>
__device__ inline void load_boxes(uint32_t smem, const CUtensorMap* map, uint32_t barrier, int mn,
                                  int k, bool into_cluster) {
    constexpr uint16_t kBothCtas = 0b11;
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
        const int along = mn + i * kBoxSide;
        const int col = kTranspose ? along : k, row = kTranspose ? k : along;
        const uint32_t box = smem + i * kBoxBytes;
        if (into_cluster) {
            tma_load_multicast(box, map, barrier, col, row, 0, kBothCtas);
        } else {
            tma_load(box, map, barrier, col, row, 0);
        }
    }
}

// The one operand A of a pass that has one.
__device__ inline const CUtensorMap* operand_a(const UpParams& p) { return &p.x; }
__device__ inline const CUtensorMap* operand_a(const DownParams& p) { return &p.h; }
__device__ inline const CUtensorMap* operand_a(const DownGradParams& p) { return &p.grad_y; }

// The first or only matrices of a pass, one per expert.
template <typename Params>
__device__ inline const CUtensorMap* first_weights(const Params& p) { return p.weights[0]; }
__device__ inline const CUtensorMap* first_weights(const DownParams& p) { return p.weights; }
__device__ inline const CUtensorMap* first_weights(const DownGradParams& p) { return p.weights; }

// Finds an expert's matrices and, where the expert is not the last one's, acquires their maps.
// `second` is up where the pass has two matrices.
template <typename C>
__device__ inline void find_weights(const typename C::Params& p, int expert, int& last_expert,
                                    const CUtensorMap*& first, const CUtensorMap*& second) {
    first = first_weights(p) + expert;
    if constexpr (C::kMatrices > 1) second = p.weights[1] + expert;
    if (expert == last_expert) return;
    last_expert = expert;
    fence_tensormap_acquire(first);
    if constexpr (C::kMatrices > 1) fence_tensormap_acquire(second);
}

template <typename C>
__device__ inline void load_tiles(const typename C::Params& p, StageRing<C> ring) {
    const int cta_in_cluster = C::kClusterSize > 1 ? cluster_cta_rank() : 0;
    TileRing<C> tiles{ring.smem};
    int last_expert = -1;
    Tile tile;
    while (tiles.template get<false>(tile)) {
        [[maybe_unused]] const CUtensorMap *first = nullptr, *second = nullptr;
        if constexpr (C::kPass != Pass::kWeightGrad) {
            find_weights<C>(p, tile.expert, last_expert, first, second);
        }
        for (int step = 0; step < tile.num_steps; ++step, ring.advance()) {
            const uint32_t full = ring.full(ring.stage);
            mbarrier_wait(ring.empty(ring.stage), ring.parity ^ 1);
            mbarrier_arrive_expect_tx(full, C::kStageBytes);
            const auto load_a = [&](const CUtensorMap* map, int k) {
                load_boxes<C::kTransposeA, C::kBoxesA>(ring.a(), map, full, tile.row, k, false);
            };
            // B in two halves; a cluster's CTAs with the same B load one half each for both.
            const auto load_b = [&](const CUtensorMap* map, int half, int col, int k) {
                constexpr int kHalf = C::kBoxesB / 2;
                if (tile.shares_b && half != cta_in_cluster) return;
                load_boxes<C::kTransposeB, kHalf>(ring.b() + half * kHalf * kBoxBytes, map, full,
                                                  col, k, tile.shares_b);
            };
            constexpr int kHalfCols = C::kTileN / 2;
            if constexpr (C::kPass == Pass::kWeightGrad) {
                const int k = tile.first_k + step * C::kTileK;
                load_a(&p.a, k);
                load_b(&p.b, 0, tile.col, k);
                load_b(&p.b, 1, tile.col + kHalfCols, k);
            } else if constexpr (C::kPass == Pass::kUp && C::kGated) {
                load_a(&p.x, step * C::kTileK);
                load_b(first, 0, tile.col, step * C::kTileK);
                load_b(second, 1, tile.col, step * C::kTileK);
            } else if constexpr (C::kPass == Pass::kUpGrad) {
                const int steps_per_matrix = (p.tiles.k + C::kTileK - 1) / C::kTileK;
                const bool is_second = C::kMatrices > 1 && step >= steps_per_matrix;
                const int k = (is_second ? step - steps_per_matrix : step) * C::kTileK;
                load_a(&p.grad_preact[is_second ? 1 : 0], k);
                load_b(is_second ? second : first, 0, tile.col, k);
                load_b(is_second ? second : first, 1, tile.col + kHalfCols, k);
            } else {
                load_a(operand_a(p), step * C::kTileK);
                load_b(first, 0, tile.col, step * C::kTileK);
                load_b(first, 1, tile.col + kHalfCols, step * C::kTileK);
            }
        }
    }
}

// --- role: math warpgroups -----------------------------------------------------------------------

// A math warpgroup's accumulators of a tile.
template <typename C>
using Accumulators = float[C::kMmaRows][C::kTileN / 2];

// Sums the products of a tile. Returns with the ring after the tile and all its stages released.
template <typename C>
__device__ inline void multiply(Accumulators<C>& acc, int num_steps, StageRing<C>& ring,
                                int warpgroup) {
    const int thread = threadIdx.x % kWarpgroupThreads;
    const auto release = [&](int stage) {
        if constexpr (C::kClusterSize == 1) {
            if (thread == 0) mbarrier_arrive(ring.empty(stage));
        } else {
            if (thread < C::kClusterSize) mbarrier_arrive_cluster(ring.empty(stage), thread);
        }
    };
    const uint32_t first_box = C::kPingPong ? 0 : warpgroup * kBoxBytes;
    // NOTE: these zeros are also the weight gradient of an expert without rows.
#pragma unroll
    for (int m = 0; m < C::kMmaRows; ++m) {
#pragma unroll
        for (int i = 0; i < C::kTileN / 2; ++i) acc[m][i] = 0.0f;
    }
    int previous = -1;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
        mbarrier_wait(ring.full(ring.stage), ring.parity);
        const uint64_t a = matrix_descriptor(ring.a() + first_box);
        const uint64_t b = matrix_descriptor(ring.b());
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < C::kTileK / 16; ++k) {
#pragma unroll
            for (int m = 0; m < C::kMmaRows; ++m) {
                wgmma<typename C::Element, C::kTransposeA, C::kTransposeB>(
                    acc[m], a + m * (kBoxBytes >> 4) + k * kDescriptorStepK<C::kTransposeA>,
                    b + k * kDescriptorStepK<C::kTransposeB>);
            }
        }
        wgmma_commit();
        wgmma_wait<1>();
        if (previous >= 0) release(previous);
        previous = ring.stage;
        ring.advance();
    }
    if constexpr (C::kPingPong) named_barrier_arrive(turn_of(1 - warpgroup), kGemmBarrierThreads);
    wgmma_wait<0>();
    if (previous >= 0) release(previous);
}

// The bias of a pass's i-th matrix.
__device__ inline const void* const* bias_of(const UpParams& p, int i) { return p.bias[i]; }
__device__ inline const void* const* bias_of(const DownParams& p, int) { return p.bias; }

template <typename C>
__device__ inline void add_bias(Accumulators<C>& acc, const Tile& tile,
                                const typename C::Params& p) {
    using Element = typename C::Element;
    constexpr int kOctets = C::kTileN / 8 / C::kMatrices;  // of 8 columns, on 4 lanes
    const int col = tile.col + threadIdx.x % 4 * 2;
#pragma unroll
    for (int matrix = 0; matrix < C::kMatrices; ++matrix) {
        if (bias_of(p, matrix) == nullptr) continue;
        const auto* bias = static_cast<const Element*>(bias_of(p, matrix)[tile.expert]) + col;
#pragma unroll
        for (int octet = 0; octet < kOctets; ++octet) {
            if (col + octet * 8 >= p.shape.n) continue;
            const float2 pair =
                unpack<Element>(*reinterpret_cast<const uint32_t*>(bias + octet * 8));
#pragma unroll
            for (int m = 0; m < C::kMmaRows; ++m) {
                float* to = acc[m] + (matrix * kOctets + octet) * 4;
                to[0] += pair.x, to[1] += pair.y;
                to[2] += pair.x, to[3] += pair.y;
            }
        }
    }
}

// Returns the first of a warp's 16 rows in its m-th 64 rows of a tile.
template <typename C>
__device__ inline int warp_row(const Tile& tile, int warpgroup, int m) {
    const int warp = threadIdx.x % kWarpgroupThreads / 32;
    return tile.row + (C::kPingPong ? m : warpgroup) * kBoxSide + warp * kStagingRows;
}

// kDown, kUpGrad, kWeightGrad: stores the c-th result box of a warp. As many boxes as there are
// staging buffers are stored together, with the last of them.
template <typename C>
__device__ inline void finish_plain(const float* acc, int c, const BoxPosition& at,
                                    const Tile& tile, const typename C::Params& p,
                                    const Staging<C::kStagingBuffers>& staging) {
    constexpr int kTogether = C::kStagingBuffers;
    const int buffer = c % kTogether;
    if (buffer == 0) staging.begin();
    write_plain<typename C::Element>(acc, buffer, staging);
    if (buffer + 1 < kTogether) return;
    staging.hand_over();
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
        const int col = at.col + (i - buffer) * kBoxSide;
        if constexpr (C::kPass == Pass::kWeightGrad) {
            if (p.accumulates) staging.add_box(i, &p.grad, col, at.row, tile.expert);
            else staging.store_box(i, &p.grad, col, at.row, tile.expert);
        } else if constexpr (C::kPass == Pass::kDown) {
            staging.store_box(i, &p.y, col, at.row, 0);
        } else {
            staging.store_box(i, &p.grad_x, col, at.row, 0);
        }
    }
    staging.end();
}

// kDownGrad: sums a row's dots over the 4 lanes that have its columns, and stores them.
template <typename C>
__device__ inline void store_row_dots(float2 dots, int row, const Tile& tile,
                                      const DownGradParams& p) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
        dots.x += __shfl_xor_sync(~0u, dots.x, lanes);
        dots.y += __shfl_xor_sync(~0u, dots.y, lanes);
    }
    if (threadIdx.x % 4 == 0) {
        float* out = p.row_dots + int64_t{tile.col / C::kTileCols} * p.num_rows + row;
        out[0] = dots.x;
        out[8] = dots.y;
    }
}

// The epilogue of a warp's sub-tile.
template <typename C>
__device__ inline void finish_tile(Accumulators<C>& acc, const Tile& tile,
                                   const typename C::Params& p, int warpgroup,
                                   SavedGateUp<C::kGated>& saved,
                                   const Staging<C::kStagingBuffers>& staging) {
    using Element = typename C::Element;
    constexpr int kBoxes = C::kTileCols / kBoxSide;
    if constexpr (C::kPass == Pass::kUp || C::kPass == Pass::kDown) add_bias<C>(acc, tile, p);
#pragma unroll
    for (int m = 0; m < C::kMmaRows; ++m) {
        BoxPosition at;
        at.row = warp_row<C>(tile, warpgroup, m);
        const int row = at.row + threadIdx.x % 32 / 4;  // the thread has this one and the 8th below
        float2 weight, dots{0.0f, 0.0f};
        if constexpr (C::kPass == Pass::kDownGrad) {
            weight = {p.row_weights[row], p.row_weights[row + 8]};
        }
#pragma unroll
        for (int c = 0; c < kBoxes; ++c) {
            at.col = tile.col + c * kBoxSide;
            const float* box = acc[m] + c * kBoxSide / 2;
            if constexpr (C::kPass == Pass::kUp) {
                constexpr int kUpColumns = C::kGated ? C::kTileN / 4 : 0;
                finish_up<Element, C::kActivation, C::kGated>(box + kUpColumns, box, at, p,
                                                              staging);
            } else if constexpr (C::kPass == Pass::kDownGrad) {
                const SavedGateUp<C::kGated> current = saved;
                finish_down_grad<Element, C::kActivation>(
                    box, at, p, weight, dots, current, staging, [&] {
                        const int next = m * kBoxes + c + 1;
                        if (next == C::kMmaRows * kBoxes) return;
                        saved.template load<Element>(
                            p, warp_row<C>(tile, warpgroup, next / kBoxes),
                            tile.col + next % kBoxes * kBoxSide, staging);
                    });
            } else {
                finish_plain<C>(box, c, at, tile, p, staging);
            }
        }
        if constexpr (C::kPass == Pass::kDownGrad) store_row_dots<C>(dots, row, tile, p);
    }
}

// The math warps: compute the CTA's tiles, then push results where the pass does.
template <typename C>
__device__ inline void compute_tiles(const typename C::Params& p, const typename C::Comm& comm,
                                     StageRing<C> ring, uint8_t* smem_rings) {
    using Element = typename C::Element;
    const int warpgroup = threadIdx.x / kWarpgroupThreads - 1;  // of the two
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const Staging<C::kStagingBuffers> staging(
        ring.smem + C::kStagingOffset + warp * C::kStagingBytesWarp, lane);
    TileRing<C> tiles{ring.smem};
    [[maybe_unused]] StoredSubTiles sub_tiles;
    Recorder<C::kPass> recorder(p.shape.records, Recording::kMath, warpgroup,
                                threadIdx.x % kWarpgroupThreads == 0);
    // Warpgroup 0 has the first turn.
    if (C::kPingPong && warpgroup == 1) named_barrier_arrive(turn_of(0), kGemmBarrierThreads);
    Tile tile;
#pragma unroll 1
    for (int i = 0; tiles.template get<true>(tile); ++i) {
        if (C::kPingPong && i % C::kMathWarpgroups != warpgroup) {
            ring.skip(tile.num_steps);
            continue;
        }
        Accumulators<C> acc;
        SavedGateUp<C::kGated> saved;  // kDownGrad: of the next box; loaded during the products
        if constexpr (C::kPass == Pass::kDownGrad) {
            if (tile.is_stored) {
                saved.template load<Element>(p, warp_row<C>(tile, warpgroup, 0), tile.col, staging);
            }
        }
        if constexpr (C::kPingPong) named_barrier_sync(turn_of(warpgroup), kGemmBarrierThreads);
        recorder.start();
        multiply<C>(acc, tile.num_steps, ring, warpgroup);
        recorder.stop(Activity::kMultiply);
        if constexpr (C::kPushesResults) sub_tiles.flush(comm);
        if (!tile.is_stored) continue;
        finish_tile<C>(acc, tile, p, warpgroup, saved, staging);
        recorder.stop(Activity::kFinish);
        if constexpr (C::kPushesResults) sub_tiles.add(tile.distance);
    }
    if constexpr (C::kPushesResults) {
        sub_tiles.flush(comm);
        static_assert(C::kMathWarps * sizeof(PushRing<Element>) <= C::kStagingOffset);
        named_barrier_sync(kStagesRead, kGemmBarrierThreads);
        Recorder<C::kPass> pushes(p.shape.records, Recording::kCommunication, 0,
                                  threadIdx.x == kFirstMathThread);
        const int sub_tiles_per_block =
            (p.shape.n + C::kTileCols - 1) / C::kTileCols * C::kMathWarps;
        push_results(comm, reinterpret_cast<PushRing<Element>*>(smem_rings)[warp],
                     p.shape.expert_offsets[p.shape.num_experts] / C::kTileM, sub_tiles_per_block,
                     kFirstMathThread, pushes);
    }
    staging.begin();
}

// --- the kernel ----------------------------------------------------------------------------------

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    expert_gemm_kernel(const __grid_constant__ typename C::Params p,
                       const __grid_constant__ typename C::Comm comm) {
    extern __shared__ uint8_t smem_raw[];
    constexpr uint32_t kAlign = C::kSwizzleAlignment;
    const uint32_t smem = (smem_address(smem_raw) + kAlign - 1) / kAlign * kAlign;
    [[maybe_unused]] uint8_t* const smem_rings = smem_raw + (smem - smem_address(smem_raw));
    StageRing<C> ring{smem};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < C::kStages; ++stage) {
            mbarrier_init(ring.full(stage), 1);
            mbarrier_init(ring.empty(stage), C::kArrivalsEmpty);
        }
        TileRing<C>{smem}.init_barriers();
        ClusterTiles<C>::init_barriers(smem);
        fence_mbarrier_init();
    }
    const auto sync_cluster = [] {
        C::kClusterSize > 1 ? cluster_sync() : __syncthreads();
    };
    sync_cluster();
    begin_kernel();
    if constexpr (C::kCommunicates && !C::kPushesResults) {
        if (is_comm_cta(comm)) {
            Recorder<C::kPass> recorder(p.shape.records, Recording::kCommunication, 0,
                                        threadIdx.x == 0);
            recorder.start();
            communicate_first<typename C::Element, C::kPass, C::kBarriersOffset>(comm, smem_rings);
            recorder.stop(C::kAwaitsRows ? Activity::kPull : Activity::kPush);
            // TMA, also the other CTA's, writes there next.
            fence_proxy_async();
            sync_cluster();
        }
    }

    // NOTE: 128 x 40 + 256 x 232 registers are what the launch gives, 384 x 168; else setmaxnreg
    // hangs.
    constexpr int kLoadRegisters = 40, kMathRegisters = 232;
    if (threadIdx.x < kFirstMathThread) {
        setmaxnreg_dec<kLoadRegisters>();
        if (threadIdx.x == kLoadingThread) load_tiles<C>(p, ring);
        if (threadIdx.x == kSchedulingThread) find_tiles<C>(p, comm, smem);
    } else {
        setmaxnreg_inc<kMathRegisters>();
        compute_tiles<C>(p, comm, ring, smem_rings);
    }
    // No CTA may end while the other can still write to its shared memory.
    __syncwarp();
    if constexpr (C::kClusterSize > 1) cluster_sync();
}

}  // namespace comet_ds
