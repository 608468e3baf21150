// SPDX-License-Identifier: Apache-2.0
// Epilogues of the grouped GEMMs: what a math warp does with its accumulators of a finished tile.
//
// A warp works on result boxes of 16 rows x 64 columns. It packs a box into one of its staging
// buffers in shared memory and TMA stores it, so math warps never wait for global memory. kDownGrad
// reads as much as it writes and moves its boxes itself, 16 bytes per lane.
#pragma once

#include "gemm/activation.cuh"
#include "gemm/expert_gemm.h"
#include "ptx/tma.cuh"
#include "ptx/vector.cuh"
#include "ptx/wgmma.cuh"

namespace comet_ds {

constexpr int kStagingRows = 16;  // of a result box: the rows of a warp in wgmma's accumulators
constexpr int kStagingBytes = kStagingRows * kBoxSide * 2;
// Epilogues walk a box in strips of 16 columns. A thread's part of a strip is four values of two
// packed columns each: [8 columns][row, row + 8].
constexpr int kStripCols = 16;
constexpr int kStrips = kBoxSide / kStripCols;
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

// A warp's staging buffers, one result box each: 16 rows of 128 bytes, in chunks of 16 bytes that
// are swizzled by row.
template <int kBuffers>
class Staging {
public:
    __device__ Staging(uint32_t smem, int lane) : smem_(smem), lane_(lane) {}

    // --- strips, as wgmma's accumulators are distributed ---
    __device__ void write(int buffer, int strip, const Packed& packed) const {
        stmatrix_x4(strip_address(buffer, strip), packed);
    }
    __device__ void read(int buffer, int strip, Packed& packed) const {
        ldmatrix_x4(strip_address(buffer, strip), packed);
    }

    // --- stores by TMA: begin, write ..., hand_over, store_box ..., end ---

    // Waits until TMA has read the buffers of earlier stores.
    __device__ void begin() const {
        if (lane_ == 0) bulk_wait_group_read<0>();
        __syncwarp();
    }
    // Makes what all lanes wrote visible to TMA.
    __device__ void hand_over() const {
        fence_proxy_async();
        __syncwarp();
    }
    __device__ void store_box(int buffer, const CUtensorMap* map, int col, int row,
                              int batch) const {
        if (lane_ == 0) tma_store(map, smem_ + buffer * kStagingBytes, col, row, batch);
    }
    __device__ void add_box(int buffer, const CUtensorMap* map, int col, int row,
                            int batch) const {
        if (lane_ == 0) tma_reduce_add(map, smem_ + buffer * kStagingBytes, col, row, batch);
    }
    __device__ void end() const {
        if (lane_ == 0) bulk_commit_group();
    }

    // --- loads and stores by the warp: lane l has chunk l % 8 of rows l / 8 + 4 i ---

    // Loads a box of a row-major matrix of n columns to registers. The box has `cols` columns
    // inside the matrix; columns beyond are zeros.
    template <typename Element>
    __device__ void load(const Element* box, int cols, int n, uint4 (&chunks)[4]) const {
        box += int64_t{lane_ / 8} * n + lane_ % 8 * 8;
        auto* from = reinterpret_cast<const uint4*>(box);
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
    // Stores a box from a buffer. NOTE: streamed results do not evict operands from L2.
    template <bool kIsStreamed, typename Element>
    __device__ void store(int buffer, Element* box, int cols, int n) const {
        box += int64_t{lane_ / 8} * n + lane_ % 8 * 8;
        auto* to = reinterpret_cast<uint4*>(box);
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
    __device__ uint32_t strip_address(int buffer, int strip) const {
        const int row = lane_ % 16, chunk = 2 * strip + lane_ / 16;
        return smem_ + buffer * kStagingBytes + row * 128 + ((chunk ^ row % 8) << 4);
    }
    __device__ uint32_t chunk_address(int buffer, int i) const {
        const int row = lane_ / 8 + 4 * i, chunk = lane_ % 8;
        return smem_ + buffer * kStagingBytes + row * 128 + ((chunk ^ row % 8) << 4);
    }

    uint32_t smem_;
    int lane_;
};

// Where a result box lies in the result.
struct BoxPosition {
    int row;  // first of 16
    int col;  // first of 64
};

// kUp: acc holds the box's pre-activations of up, acc_gate those of gate where gated. Buffers: h,
// then the pre-activations that are saved.
template <typename Element, Activation kActivation, bool kGated, int kBuffers>
__device__ inline void finish_up(const float* acc, const float* acc_gate, const BoxPosition& at,
                                 const UpParams& p, const Staging<kBuffers>& staging) {
    staging.begin();
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
        Packed hidden, up, gate;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int i = 8 * strip + 2 * q;
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
        staging.write(0, strip, hidden);
        if (p.saves_gate_up) {
            if constexpr (kGated) staging.write(1, strip, gate);
            staging.write(kGated ? 2 : 1, strip, up);
        }
    }
    staging.hand_over();
    staging.store_box(0, &p.h, at.col, at.row, 0);
    const int num_saved = p.saves_gate_up ? 1 + kGated : 0;
    for (int i = 0; i < num_saved; ++i) {
        staging.store_box(1 + i, &p.gate_up[i], at.col, at.row, 0);
    }
    staging.end();
}

// kDownGrad: the saved pre-activations of a box, in registers on their way to the buffers.
template <bool kGated>
struct SavedGateUp {
    static constexpr int kTensors = 1 + kGated;
    uint4 chunks[kTensors][4];

    template <typename Element, int kBuffers>
    __device__ void load(const DownGradParams& p, int row, int col,
                         const Staging<kBuffers>& staging) {
#pragma unroll
        for (int i = 0; i < kTensors; ++i) {
            const auto* from = static_cast<const Element*>(p.gate_up[i]);
            const int n = p.shape.n;
            staging.load(from + int64_t{row} * n + col, n - col, n, chunks[i]);
        }
    }
};

// kDownGrad: acc holds the box's dh, not yet multiplied by the routing weights. Buffers: weighted
// h, then the pre-activations in `saved`, which their gradients replace. Calls load_next() once the
// registers of `saved` are free. Adds <dh, h> to dots.
template <typename Element, Activation kActivation, bool kGated, int kBuffers, typename LoadNext>
__device__ inline void finish_down_grad(const float* acc, const BoxPosition& at,
                                        const DownGradParams& p, const float2& weight,
                                        float2& dots, const SavedGateUp<kGated>& saved,
                                        const Staging<kBuffers>& staging, LoadNext load_next) {
    constexpr int kUpBuffer = kGated ? 2 : 1;
    __syncwarp();  // all lanes have stored the previous box
#pragma unroll
    for (int i = 0; i < SavedGateUp<kGated>::kTensors; ++i) staging.put(1 + i, saved.chunks[i]);
    __syncwarp();
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
        if (strip == kStrips / 2) load_next();  // NOTE: earlier, no registers are free
        Packed hidden, up, gate;
        if constexpr (kGated) staging.read(1, strip, gate);
        staging.read(kUpBuffer, strip, up);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const float w = q % 2 ? weight.y : weight.x;
            const float d0 = acc[8 * strip + 2 * q], d1 = acc[8 * strip + 2 * q + 1];
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
        staging.write(0, strip, hidden);
        if constexpr (kGated) staging.write(1, strip, gate);
        staging.write(kUpBuffer, strip, up);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i <= kUpBuffer; ++i) {
        const int n = p.shape.n;
        auto* result = static_cast<Element*>(i == 0 ? p.weighted_h : p.grad_preact[i - 1]);
        // NOTE: not streamed without gate: results are smaller then, and no registers are free.
        staging.template store<kGated>(i, result + int64_t{at.row} * n + at.col, n - at.col, n);
    }
}

// The other passes: packs acc into a buffer as it is.
template <typename Element, int kBuffers>
__device__ inline void write_plain(const float* acc, int buffer, const Staging<kBuffers>& staging) {
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
        Packed out;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const int i = 8 * strip + 2 * q;
            out[q] = pack<Element>(acc[i], acc[i + 1]);
        }
        staging.write(buffer, strip, out);
    }
}

}  // namespace comet_ds
