// SPDX-License-Identifier: Apache-2.0
// What a warp does with a token and its rows, of this rank or of another.
#pragma once

#include "device/memory_order.cuh"
#include "device/vector.cuh"
#include "exchange.h"

namespace comet_ds {

constexpr int kCopyVectors = 4;  // 16-byte loads a lane has in flight

// The rank a token belongs to.
__device__ inline int source_of(const Sources& sources, int64_t token) {
    int rank = 0;
    while (token >= sources.source[rank].first_token + sources.source[rank].num_tokens) ++rank;
    return rank;
}

// Copies kCopyVectors x 32 vectors of a token to all its rows, a warp together; the token is read
// once.
__device__ inline void copy_part(const uint4* token, uint4* rows, int64_t row_vectors,
                                 int64_t first, const int64_t* row_of_route, int64_t top_k) {
    first += threadIdx.x % 32;
    uint4 part[kCopyVectors];
#pragma unroll
    for (int i = 0; i < kCopyVectors; ++i) {
        if (first + i * 32 < row_vectors) part[i] = token[first + i * 32];
    }
    for (int64_t k = 0; k < top_k; ++k) {
        const int64_t row = row_of_route[k];
        if (row < 0) continue;
#pragma unroll
        for (int i = 0; i < kCopyVectors; ++i) {
            const int64_t at = first + i * 32;
            if (at < row_vectors) rows[row * row_vectors + at] = part[i];
        }
    }
}

// Which of the tokens of other ranks a warp turns to, in ring order from the own rank.
class ForeignTokens {
public:
    __device__ ForeignTokens(const Sources& sources, int worker, int num_workers)
        : sources_(sources), index_(worker), num_workers_(num_workers) {
        skip_ranks();
    }
    __device__ bool is_valid() const { return distance_ < sources_.num_ranks; }
    __device__ const Source& source() const { return sources_.source[rank()]; }
    __device__ int rank() const { return (sources_.rank + distance_) % sources_.num_ranks; }
    __device__ int64_t token() const { return index_; }  // among its rank's
    __device__ void advance() {
        index_ += num_workers_;
        skip_ranks();
    }

private:
    __device__ void skip_ranks() {
        while (is_valid() && index_ >= source().num_tokens) {
            index_ -= source().num_tokens;
            ++distance_;
        }
    }
    const Sources& sources_;
    int64_t index_;
    int num_workers_, distance_ = 1;
};

// Whether any route of a token has a row here; the same for all lanes.
__device__ inline bool has_rows(const int64_t* row_of_route, int64_t top_k) {
    bool found = false;
    for (int64_t k = threadIdx.x % 32; k < top_k; k += 32) found |= row_of_route[k] >= 0;
    return __any_sync(~0u, found);
}

// Ranks other than its own that a token goes to, a bit each; the same for all lanes.
__device__ inline uint32_t peers_of(const RowPlan& plan, int64_t token, int own_rank) {
    const int64_t* topk_ids = plan.topk_ids + token * plan.top_k;
    uint32_t peers = 0;
    for (int64_t k = threadIdx.x % 32; k < plan.top_k; k += 32) {
        if (topk_ids[k] >= 0) peers |= 1u << topk_ids[k] / plan.num_experts;
    }
    return __reduce_or_sync(~0u, peers) & ~(1u << own_rank);
}

// Copies tokens of other ranks to their rows, and counts these by block in `arrived` (release, GPU
// scope).
__device__ inline void pull_tokens(const ExchangeParams& p, uint4* rows, int worker,
                                   int num_workers, uint32_t* arrived) {
    const RowPlan& plan = p.plan;
    const int64_t row_vectors = p.hidden * 2 / sizeof(uint4);
    for (ForeignTokens at(p.sources, worker, num_workers); at.is_valid(); at.advance()) {
        const Source& source = at.source();
        const int64_t* row_of_route =
            plan.row_of_route + (source.first_token + at.token()) * plan.top_k;
        if (!has_rows(row_of_route, plan.top_k)) continue;
        const auto* token = static_cast<const uint4*>(source.tokens) + at.token() * row_vectors;
        for (int64_t first = 0; first < row_vectors; first += kCopyVectors * 32) {
            copy_part(token, rows, row_vectors, first, row_of_route, plan.top_k);
        }
        // The copy engine will read them.
        fence_proxy_async_global();
        __syncwarp();
        for (int64_t k = threadIdx.x % 32; k < plan.top_k; k += 32) {
            if (row_of_route[k] < 0) continue;
            add_release_gpu(arrived + row_of_route[k] / kRowBlock, 1);
        }
    }
}

// Adds to sum[i] elements col + i of a token's rows, in order of its routes.
template <typename T, bool kIsWeighted, int kSize>
__device__ inline void add_rows(float (&sum)[kSize], const T* rows, int64_t hidden, int64_t col,
                                const RowPlan& plan, const int64_t* row_of_route) {
    using Vec = Vector<T, kSize>;
#pragma unroll 4
    for (int64_t k = 0; k < plan.top_k; ++k) {
        const int64_t row = row_of_route[k];
        if (row < 0) continue;
        const float weight = kIsWeighted ? plan.row_weights[row] : 1.0f;
        const Vec in = *reinterpret_cast<const Vec*>(rows + row * hidden + col);
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] += weight * to_float(in.value[i]);
    }
}

template <typename T, int kSize>
__device__ inline void store_rounded(T* to, const float (&sum)[kSize]) {
    Vector<T, kSize> out;
#pragma unroll
    for (int i = 0; i < kSize; ++i) out.value[i] = from_float<T>(sum[i]);
    *reinterpret_cast<Vector<T, kSize>*>(to) = out;
}

// Sums columns first_col to end_col of the rows of other ranks' tokens into their slots.
template <typename T, bool kIsWeighted>
__device__ inline void push_tokens(const ExchangeParams& p, const T* rows, int worker,
                                   int num_workers, int64_t first_col, int64_t end_col) {
    constexpr int kSize = kVectorBytes / sizeof(T);
    const RowPlan& plan = p.plan;
    for (ForeignTokens at(p.sources, worker, num_workers); at.is_valid(); at.advance()) {
        const Source& source = at.source();
        const int64_t* row_of_route =
            plan.row_of_route + (source.first_token + at.token()) * plan.top_k;
        if (!has_rows(row_of_route, plan.top_k)) continue;
        const uint32_t peers = peers_of(plan, source.first_token + at.token(), at.rank());
        const int64_t slot = __popc(peers & ((1u << p.sources.rank) - 1));
        T* to =
            static_cast<T*>(source.slots) + (slot * source.num_tokens + at.token()) * p.hidden;
        for (int64_t col = first_col + threadIdx.x % 32 * kSize; col < end_col;
             col += 32 * kSize) {
            float sum[kSize] = {};
            add_rows<T, kIsWeighted>(sum, rows, p.hidden, col, plan, row_of_route);
            store_rounded(to + col, sum);
        }
    }
}

}  // namespace comet_ds
