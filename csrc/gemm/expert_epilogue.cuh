// SPDX-License-Identifier: Apache-2.0
// What the math warps do with a finished tile: activation or its derivative, rounding, store.
//
// Results leave through shared memory: a warp packs 16 rows x 64 columns into one of its staging
// buffers and hands it to the copy engine, so the math warps never wait for global memory.
// kDownGrad, which reads as much as it writes, moves its blocks itself, 16 bytes a lane.
#pragma once

#include "gemm/activation.cuh"
#include "gemm/expert_gemm.h"
#include "ptx/tma.cuh"
#include "ptx/vector.cuh"
#include "ptx/wgmma.cuh"

namespace comet_ds {

constexpr int kStagingRows = 16;
constexpr int kStagingBytes = kStagingRows * kBlockElements * 2;
// Epilogues go through a block 16 columns at a time. Of these a thread has four packed values, of
// two columns each: [column group of 8][row, row + 8].
constexpr int kSliceCols = 16;
constexpr int kSlices = kBlockElements / kSliceCols;
using Packed = uint32_t[4];

template <typename Element>
__device__ inline uint32_t pack(float low, float high) {
    const Vector<Element, 2> pair{from_float<Element>(low), from_float<Element>(high)};
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename Element>
__device__ inline float2 unpack(uint32_t packed) {
    const auto pair = *reinterpret_cast<const Vector<Element, 2>*>(&packed);
    return {to_float(pair.value[0]), to_float(pair.value[1])};
}

// A warp's staging buffers: 16 rows of 128 bytes, 16-byte chunks swizzled by row.
template <int kBuffers>
class Staging {
public:
    __device__ Staging(uint32_t smem, int lane) : smem_(smem), lane_(lane) {}

    // --- as fragments of accumulators ---
    __device__ void write(int buffer, int slice, const Packed& packed) const {
        stmatrix_x4(fragment_address(buffer, slice), packed);
    }
    __device__ void read(int buffer, int slice, Packed& packed) const {
        ldmatrix_x4(fragment_address(buffer, slice), packed);
    }

    // --- out through the copy engine: begin, write ..., hand_over, send ..., end ---

    // Waits until what was sent has left the buffers.
    __device__ void begin() const {
        if (lane_ == 0) bulk_wait_group_read<0>();
        __syncwarp();
    }
    __device__ void hand_over() const {
        fence_proxy_async();
        __syncwarp();
    }
    // Writes a buffer to `map` at (row, col).
    __device__ void send(int buffer, const CUtensorMap* map, int col, int row, int batch) const {
        if (lane_ == 0) tma_store(map, smem_ + buffer * kStagingBytes, col, row, batch);
    }
    // Adds a buffer to what is there.
    __device__ void send_to_add(int buffer, const CUtensorMap* map, int col, int row,
                                int batch) const {
        if (lane_ == 0) tma_reduce_add(map, smem_ + buffer * kStagingBytes, col, row, batch);
    }
    __device__ void end() const {
        if (lane_ == 0) bulk_commit_group();
    }

    // --- in and out by the warp: lane l has chunk l % 8 of rows l / 8 + 4 i ---

    // Loads a block of a row-major matrix into registers; zeros beyond column n.
    template <typename Element>
    __device__ void load(const Element* block, int cols, int n, uint4 (&chunks)[4]) const {
        block += int64_t{lane_ / 8} * n + lane_ % 8 * 8;
        auto* from = reinterpret_cast<const uint4*>(block);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            chunks[i] = lane_ % 8 * 8 < cols ? __ldcs(from) : uint4{};
            from += n / 2;
        }
    }
    __device__ void put(int buffer, const uint4 (&chunks)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) st_shared(chunk_address(buffer, i), chunks[i]);
    }
    // Streamed, results do not take the place of operands in L2.
    template <bool kIsStreamed, typename Element>
    __device__ void store(int buffer, Element* block, int cols, int n) const {
        block += int64_t{lane_ / 8} * n + lane_ % 8 * 8;
        auto* to = reinterpret_cast<uint4*>(block);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 chunk = ld_shared(chunk_address(buffer, i));
            if (lane_ % 8 * 8 < cols) {
                if constexpr (kIsStreamed) __stcs(to, chunk);
                else *to = chunk;
            }
            to += n / 2;
        }
    }

private:
    __device__ uint32_t fragment_address(int buffer, int slice) const {
        const int row = lane_ % 16, chunk = 2 * slice + lane_ / 16;
        return smem_ + buffer * kStagingBytes + row * 128 + ((chunk ^ row % 8) << 4);
    }
    __device__ uint32_t chunk_address(int buffer, int i) const {
        const int row = lane_ / 8 + 4 * i, chunk = lane_ % 8;
        return smem_ + buffer * kStagingBytes + row * 128 + ((chunk ^ row % 8) << 4);
    }

    uint32_t smem_;
    int lane_;
};

// Where a thread's accumulators of a block lie.
struct Fragment {
    int warp_row;   // first of the warp's 16 rows, in the whole matrix
    int block_col;  // first of the block's 64 columns
};

// kUp: acc holds pre-activations, gated ones in acc_gate beside those of the up matrix.
template <typename Element, Activation kActivation, bool kGated, int kBuffers>
__device__ inline void finish_up(const float* acc, const float* acc_gate, const Fragment& at,
                                 const ExpertGemmParams& p, const Staging<kBuffers>& staging) {
    staging.begin();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        Packed hidden, up, gate;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int i = 8 * slice + 2 * q;
            const float u0 = acc[i], u1 = acc[i + 1];
            up[q] = pack<Element>(u0, u1);
            if constexpr (kGated) {
                const float g0 = acc_gate[i], g1 = acc_gate[i + 1];
                gate[q] = pack<Element>(g0, g1);
                hidden[q] = pack<Element>(activate<kActivation>(g0).value * u0,
                                          activate<kActivation>(g1).value * u1);
            } else {
                hidden[q] = pack<Element>(activate<kActivation>(u0).value,
                                          activate<kActivation>(u1).value);
            }
        }
        staging.write(0, slice, hidden);
        if (p.save_pre) {
            if constexpr (kGated) staging.write(1, slice, gate);
            staging.write(kGated ? 2 : 1, slice, up);
        }
    }
    staging.hand_over();
    const int num_results = p.save_pre ? (kGated ? 3 : 2) : 1;
    for (int i = 0; i < num_results; ++i) {
        staging.send(i, &p.out[i], at.block_col, at.warp_row, 0);
    }
    staging.end();
}

// kDownGrad: saved pre-activations of a block on their way to the buffers.
template <bool kGated>
struct SavedBlock {
    static constexpr int kTensors = 1 + kGated;
    uint4 chunks[kTensors][4];

    template <typename Element, int kBuffers>
    __device__ void load(const ExpertGemmParams& p, int row, int col,
                         const Staging<kBuffers>& staging) {
#pragma unroll
        for (int i = 0; i < kTensors; ++i) {
            const auto* pre = static_cast<const Element*>(p.pre[i]);
            staging.load(pre + int64_t{row} * p.n + col, p.n - col, p.n, chunks[i]);
        }
    }
};

// kDownGrad: acc holds dh, not yet multiplied by the routing weight. Buffers: weighted hidden, then
// the saved pre-activations, which `saved` brings and whose gradients take their place. When they
// are in the buffers load_next() may load the next ones. Adds <dh, h> to dots.
template <typename Element, Activation kActivation, bool kGated, int kBuffers, typename LoadNext>
__device__ inline void finish_down_grad(const float* acc, const Fragment& at,
                                        const ExpertGemmParams& p, const float2& weight,
                                        float2& dots, const SavedBlock<kGated>& saved,
                                        const Staging<kBuffers>& staging, LoadNext load_next) {
    constexpr int kUpBuffer = kGated ? 2 : 1;
    __syncwarp();  // the block before has left
#pragma unroll
    for (int i = 0; i < SavedBlock<kGated>::kTensors; ++i) staging.put(1 + i, saved.chunks[i]);
    __syncwarp();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        if (slice == kSlices / 2) load_next();  // sooner there is no register free
        Packed hidden, up, gate;
        if constexpr (kGated) staging.read(1, slice, gate);
        staging.read(kUpBuffer, slice, up);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const float w = q % 2 ? weight.y : weight.x;
            const float d0 = acc[8 * slice + 2 * q], d1 = acc[8 * slice + 2 * q + 1];
            const float2 u = unpack<Element>(up[q]);
            float& dot = q % 2 ? dots.y : dots.x;
            if constexpr (kGated) {
                const float2 g = unpack<Element>(gate[q]);
                const ValueAndSlope a0 = activate<kActivation>(g.x);
                const ValueAndSlope a1 = activate<kActivation>(g.y);
                const float du0 = d0 * u.x, du1 = d1 * u.y;
                const float weighted0 = w * a0.value, weighted1 = w * a1.value;
                dot += du0 * a0.value + du1 * a1.value;
                gate[q] = pack<Element>(w * du0 * a0.slope, w * du1 * a1.slope);
                up[q] = pack<Element>(d0 * weighted0, d1 * weighted1);
                hidden[q] = pack<Element>(weighted0 * u.x, weighted1 * u.y);
            } else {
                const ValueAndSlope a0 = activate<kActivation>(u.x);
                const ValueAndSlope a1 = activate<kActivation>(u.y);
                dot += d0 * a0.value + d1 * a1.value;
                up[q] = pack<Element>(w * d0 * a0.slope, w * d1 * a1.slope);
                hidden[q] = pack<Element>(w * a0.value, w * a1.value);
            }
        }
        staging.write(0, slice, hidden);
        if constexpr (kGated) staging.write(1, slice, gate);
        staging.write(kUpBuffer, slice, up);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i <= kUpBuffer; ++i) {
        auto* block = static_cast<Element*>(p.results[i]) + int64_t{at.warp_row} * p.n;
        // Without gate there is less of them, and no register free.
        staging.template store<kGated>(i, block + at.block_col, p.n - at.block_col, p.n);
    }
}

// The other passes: acc as it is, into a buffer.
template <typename Element, int kBuffers>
__device__ inline void write_plain(const float* acc, int buffer, const Staging<kBuffers>& staging) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        Packed out;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int i = 8 * slice + 2 * q;
            out[q] = pack<Element>(acc[i], acc[i + 1]);
        }
        staging.write(buffer, slice, out);
    }
}

}  // namespace comet_ds
