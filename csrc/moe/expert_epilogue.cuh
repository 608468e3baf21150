// SPDX-License-Identifier: Apache-2.0
// What the math warps do with a finished tile: bias, activation or its derivative, rounding, store.
//
// Results leave through shared memory: a warp packs 16 rows x 64 columns into one of its staging
// buffers and hands it to the copy engine, so the math warps never wait for global memory.
#pragma once

#include "device/activation.cuh"
#include "device/tma.cuh"
#include "device/vector.cuh"
#include "device/wgmma.cuh"
#include "expert_gemm.h"

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

// A warp's staging buffers. Results: begin, write ..., send ..., end. Saved pre-activations come
// in the same way, asked for a block ahead: request, wait, read.
template <int kBuffers>
class Staging {
public:
    __device__ Staging(uint32_t smem, uint32_t barrier, int lane)
        : smem_(smem), barrier_(barrier), is_leader_(lane == 0), chunk_(lane / 16) {
        const int row = lane % 8 + lane / 8 % 2 * 8;
        row_offset_ = row * 128;
        swizzle_ = row % 8;
    }

    // Waits until what was sent has left the buffers.
    __device__ void begin() const {
        if (is_leader_) bulk_wait_group_read<0>();
        __syncwarp();
    }

    __device__ void write(int buffer, int slice, const Packed& packed) const {
        stmatrix_x4(address(buffer, slice), packed);
    }

    // Ends writing and reading; the copy engine may take over.
    __device__ void hand_over() const {
        fence_proxy_async();
        __syncwarp();
    }

    // Writes a buffer to `map` at (row, col).
    __device__ void send(int buffer, const CUtensorMap* map, int col, int row, int batch) const {
        if (is_leader_) tma_store(map, smem_ + buffer * kStagingBytes, col, row, batch);
    }

    __device__ void end() const {
        if (is_leader_) bulk_commit_group();
    }

    // Brings a block of kTensors tensors to where `request` finds it sooner.
    template <int kTensors>
    __device__ void prefetch(const CUtensorMap* maps, int col, int row) const {
        if (!is_leader_) return;
#pragma unroll
        for (int i = 0; i < kTensors; ++i) tma_prefetch(maps + i, col, row, 0);
    }

    // Asks for a block of kTensors tensors, into the last buffers, once these have been sent.
    template <int kTensors>
    __device__ void request(const CUtensorMap* maps, int col, int row) const {
        if (!is_leader_) return;
        bulk_wait_group_read<0>();
        mbarrier_arrive_expect_tx(barrier_, kTensors * kStagingBytes);
#pragma unroll
        for (int i = 0; i < kTensors; ++i) {
            const int buffer = kBuffers - kTensors + i;
            tma_load(smem_ + buffer * kStagingBytes, maps + i, barrier_, col, row, 0);
        }
    }

    __device__ void wait() {
        mbarrier_wait(barrier_, parity_);
        parity_ ^= 1;
    }

    __device__ void read(int buffer, int slice, Packed& packed) const {
        ldmatrix_x4(address(buffer, slice), packed);
    }

private:
    // Of this lane's matrix row.
    __device__ uint32_t address(int buffer, int slice) const {
        return smem_ + buffer * kStagingBytes + row_offset_ +
               (((2 * slice + chunk_) ^ swizzle_) << 4);
    }

    uint32_t smem_, barrier_;
    bool is_leader_;
    int chunk_, row_offset_, swizzle_;
    uint32_t parity_ = 0;
};

// Where a thread's accumulators of a block lie.
struct Fragment {
    int warp_row;   // first of the warp's 16 rows, in the whole matrix
    int block_col;  // first of the block's 64 columns
    int col;        // the thread's first, block_col + 2 (lane % 4)
};

// Reads two neighbouring bias entries; 0 without bias or outside.
template <typename Element>
__device__ inline float2 load_bias(const void* bias, int col, int n) {
    if (bias == nullptr || col >= n) return {0.0f, 0.0f};
    return unpack<Element>(
        *reinterpret_cast<const uint32_t*>(static_cast<const Element*>(bias) + col));
}

// kUp: acc holds pre-activations, gated ones in acc_gate beside those of the up matrix.
template <typename Element, Activation kActivation, bool kGated, int kBuffers>
__device__ inline void finish_up(const float* acc, const float* acc_gate, const Fragment& at,
                                 const ExpertGemmParams& p, const void* bias, const void* bias_gate,
                                 const Staging<kBuffers>& staging) {
    staging.begin();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        Packed hidden, up, gate;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int i = 8 * slice + 2 * q, col = at.col + slice * kSliceCols + q / 2 * 8;
            const float2 b = load_bias<Element>(bias, col, p.n);
            const float u0 = acc[i] + b.x, u1 = acc[i + 1] + b.y;
            up[q] = pack<Element>(u0, u1);
            if constexpr (kGated) {
                const float2 bg = load_bias<Element>(bias_gate, col, p.n);
                const float g0 = acc_gate[i] + bg.x, g1 = acc_gate[i + 1] + bg.y;
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

// kDownGrad: acc holds dh, not yet multiplied by the routing weight. The saved pre-activations are
// in the buffers that take their gradients. Adds <dh, h> to dots.
template <typename Element, Activation kActivation, bool kGated, int kBuffers>
__device__ inline void finish_down_grad(const float* acc, const Fragment& at,
                                        const ExpertGemmParams& p, const float2& weight,
                                        float2& dots, Staging<kBuffers>& staging) {
    constexpr int kUpBuffer = kGated ? 2 : 1;
    staging.wait();
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        Packed hidden, up, gate;
        if constexpr (kGated) staging.read(1, slice, gate);
        staging.read(kUpBuffer, slice, up);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const float w = q % 2 ? weight.y : weight.x;
            const float d0 = acc[8 * slice + 2 * q], d1 = acc[8 * slice + 2 * q + 1];
            const float2 u = unpack<Element>(up[q]);
            float h0, h1;
            if constexpr (kGated) {
                const float2 g = unpack<Element>(gate[q]);
                const ValueAndSlope a0 = activate<kActivation>(g.x);
                const ValueAndSlope a1 = activate<kActivation>(g.y);
                h0 = a0.value * u.x, h1 = a1.value * u.y;
                gate[q] = pack<Element>(w * d0 * u.x * a0.slope, w * d1 * u.y * a1.slope);
                up[q] = pack<Element>(w * d0 * a0.value, w * d1 * a1.value);
            } else {
                const ValueAndSlope a0 = activate<kActivation>(u.x);
                const ValueAndSlope a1 = activate<kActivation>(u.y);
                h0 = a0.value, h1 = a1.value;
                up[q] = pack<Element>(w * d0 * a0.slope, w * d1 * a1.slope);
            }
            (q % 2 ? dots.y : dots.x) += d0 * h0 + d1 * h1;
            hidden[q] = pack<Element>(w * h0, w * h1);
        }
        staging.write(0, slice, hidden);
        if constexpr (kGated) staging.write(1, slice, gate);
        staging.write(kUpBuffer, slice, up);
    }
    staging.hand_over();
#pragma unroll
    for (int i = 0; i <= kUpBuffer; ++i) {
        staging.send(i, &p.out[i], at.block_col, at.warp_row, 0);
    }
    staging.end();
}

// The other passes: acc as it is, plus a bias, into a buffer.
template <typename Element, int kBuffers>
__device__ inline void write_plain(const float* acc, const Fragment& at, const void* bias, int n,
                                   int buffer, const Staging<kBuffers>& staging) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
        Packed out;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int i = 8 * slice + 2 * q;
            const float2 b =
                load_bias<Element>(bias, at.col + slice * kSliceCols + q / 2 * 8, n);
            out[q] = pack<Element>(acc[i] + b.x, acc[i + 1] + b.y);
        }
        staging.write(buffer, slice, out);
    }
}

}  // namespace comet_ds
