// SPDX-License-Identifier: Apache-2.0
// Rows of the experts' GEMMs: where each token's rows lie, dispatch into them, and small sums over
// them.
//
// 1. Math: dispatch.h. Rows are sorted by expert, then by the ring distance of the token's rank,
//    then by token. Each expert's rows are padded to a multiple of kRowBlock.
// 2. Grid and roles:
//        plan_and_dispatch  CTAs in this order: tile orders, kRowBlock threads per expert for each
//                           order (they take longest); rows of the plan, one thread per route or
//                           padding row; own tokens, one warp per kCopyVectors x 32 vectors of a
//                           token; padding and counters, one CTA per expert. The last two do not
//                           wait for the plan: every CTA counts the experts' rows for itself.
//        count_rows         one CTA; thread 0 writes to host memory
//        dispatch_rows      the last two of these roles, with a plan that is complete
//        sum_row_dots       kDotLanes lanes per route, with biases a warp per route
//        sum_expert_rows    one CTA per expert and kSumCols columns
// 3. Flags: between CTAs none. No atomics; sums run in a fixed order. The counters of the GEMM
//    kernels that follow on the stream (gemm/overlap.cuh) are zeroed here. To the host:
//        flag       writer                  release                  reader         reset
//        count[1]   thread 0 of count_rows  threadfence_system, then LayerCall in   never: the tag
//        (the tag)                          a volatile store         host/          only grows
// 4. Shared memory: plan_and_dispatch 4 (E (2 W + 2) + 1) bytes for E experts and W ranks (an
//    expert has 4 bytes for its offset, 4 W for its counts, 4 (W + 1) for sizes of segments);
//    sum_expert_rows 2 KB.
#pragma once

#include <cstdio>

#include "ptx/kernel_order.cuh"
#include "ptx/vector.cuh"
#include "rows/dispatch.h"

namespace comet_ds {

constexpr int kRowWarps = 8;
constexpr int kPlanThreads = kRowWarps * 32;
constexpr int kCopyVectors = 4;  // 16-byte loads that a lane has in flight
constexpr int kDotLanes = 8;     // 8 lanes take half as long as 32, a single lane longer than 32
constexpr int kSumCols = 64;
constexpr int kSumSlices = 8;  // threads that share a column, each with every 8th row

// Returns the rank a token belongs to.
__device__ inline int source_of(const Sources& sources, int64_t token) {
    int rank = 0;
    while (token >= sources.source[rank].first_token + sources.source[rank].num_tokens) ++rank;
    return rank;
}

// Returns the source at a ring distance.
__host__ __device__ inline const Source& source_at(const Sources& sources, int distance) {
    return sources.source[(sources.rank + distance) % sources.num_ranks];
}

// Returns the ranks, other than its own, that a token is routed to: one bit per rank.
__device__ inline uint32_t peers_of(const int64_t* topk_ids, int64_t top_k, int num_experts,
                                    int own_rank) {
    uint32_t peers = 0;
    for (int64_t k = 0; k < top_k; ++k) {
        if (topk_ids[k] >= 0) peers |= 1u << topk_ids[k] / num_experts;
    }
    return peers & ~(1u << own_rank);
}

// Returns the position of a segment's i-th element. Segments follow each other, but pairs of a
// segment's elements start at even positions (a cluster computes a pair). The last element of a
// segment of odd size is therefore held back and pairs with the last one of the next such segment.
// Example: sizes 3, 2, 1 give a0 a1 b0 b1 a2 c0.
__device__ inline int position_of(int segment, int i, const int* sizes, int num_segments) {
    int before = 0, num_odd = 0;
    for (int other = 0; other < segment; ++other) {
        before += sizes[other];
        num_odd += sizes[other] % 2;
    }
    const int num_held_back = num_odd % 2;
    if (i < sizes[segment] / 2 * 2) return before - num_held_back + i;
    if (num_held_back == 1) return before + i;
    int end = before + sizes[segment];
    for (int other = segment + 1; other < num_segments; ++other) {
        end += sizes[other];
        if (sizes[other] % 2 == 1) return end - 2;
    }
    return end - 1;
}

__device__ inline int padded(int num_rows) {
    return (num_rows + kRowBlock - 1) / kRowBlock * kRowBlock;
}

// Rows of this rank's experts, in shared memory. Every CTA that needs them counts for itself.
struct ExpertRows {
    int num_experts;
    int* offsets;  // [num_experts + 1]: first row
    int* counts;   // [num_ranks, num_experts]: rows of tokens up to this ring distance
    int* totals;   // [num_experts]: rows without padding; the last row of counts

    __device__ ExpertRows(const Sources& sources, int num_experts, int* smem)
        : num_experts(num_experts), offsets(smem), counts(smem + num_experts + 1),
          totals(counts + (sources.num_ranks - 1) * num_experts) {
        const int lane = threadIdx.x % 32;
        for (int expert = threadIdx.x; expert < num_experts; expert += kPlanThreads) {
            int count = 0;
            for (int distance = 0; distance < sources.num_ranks; ++distance) {
                const int32_t* kept = source_at(sources, distance).kept_counts;
                count += kept[sources.rank * num_experts + expert];
                counts[distance * num_experts + expert] = count;
            }
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            int end = 0;
            for (int first = 0; first < num_experts; first += 32) {
                const int expert = first + lane;
                int sum = expert < num_experts ? padded(totals[expert]) : 0;
#pragma unroll
                for (int before = 1; before < 32; before *= 2) {
                    const int other = __shfl_up_sync(~0u, sum, before);
                    if (lane >= before) sum += other;
                }
                if (expert < num_experts) offsets[expert + 1] = end + sum;
                end += __shfl_sync(~0u, sum, 31);
            }
            if (lane == 0) offsets[0] = 0;
        }
        __syncthreads();
    }

    // Returns the rest of shared memory: room for the sizes of segments.
    __device__ int* sizes() const { return totals + num_experts; }

    // Returns how many row blocks of an expert are complete once the tokens up to a ring distance
    // have arrived.
    __device__ int complete_blocks(int expert, int distance) const {
        const int count = counts[distance * num_experts + expert];
        return (count == totals[expert] ? padded(count) : count) / kRowBlock;
    }

    // Returns the row of a route to an expert from a rank at a ring distance; `slot` is the route's
    // position among that rank's routes to the expert. -1 where the route is dropped (the expert is
    // negative) or the expert is on another rank.
    __device__ int row(int64_t expert, int distance, int slot) const {
        if (expert < 0 || expert >= num_experts) return -1;
        const int before = distance == 0 ? 0 : counts[(distance - 1) * num_experts + expert];
        return offsets[expert] + before + slot;
    }
};

// Writes one tile order. `thread` counts the threads of all its CTAs. A segment is what one expert
// has in one round. Round 0 holds the blocks of split experts with own tokens only, and all blocks
// of the others. Later rounds hold the remaining blocks of split experts: round d those that become
// complete at ring distance d where all experts are split, else round 1 all of them.
__device__ inline void plan_tile_order(const RowPlan& plan, const ExpertRows& rows, int num_ranks,
                                       int tile_order, int thread) {
    int* const sizes = rows.sizes();
    const int num_experts = rows.num_experts, num_split = plan.num_split_experts[tile_order];
    const bool by_distance = num_split == num_experts;
    const int num_segments = by_distance ? num_ranks * num_experts : num_experts + num_split;
    for (int segment = threadIdx.x; segment < num_segments; segment += kPlanThreads) {
        const int expert = segment % num_experts, round = segment / num_experts;
        const int first = round == 0 ? 0 : rows.complete_blocks(expert, round - 1);
        const bool is_rest = expert >= num_split || (round > 0 && !by_distance);
        sizes[segment] = rows.complete_blocks(expert, is_rest ? num_ranks - 1 : round) - first;
    }
    __syncthreads();
    if (thread < num_ranks) {
        const int before = by_distance || thread == 0 ? thread * num_experts : num_split;
        int position = 0;
        for (int segment = 0; segment < before; ++segment) position += sizes[segment];
        plan.remote_begin[tile_order * num_ranks + thread] = position / 2 * 2;
    }
    const int expert = thread / kRowBlock;
    if (expert >= num_experts) return;
    const int num_blocks = rows.complete_blocks(expert, num_ranks - 1);
    for (int j = thread % kRowBlock; j < num_blocks; j += kRowBlock) {
        int segment = expert, index = j;
        while (index >= sizes[segment]) index -= sizes[segment], segment += num_experts;
        const int position = position_of(segment, index, sizes, num_segments);
        const int64_t at = tile_order * (plan.max_rows / kRowBlock) + position;
        plan.block_order[at] = rows.offsets[expert] / kRowBlock + j;
        plan.expert_order[at] = expert;
    }
}

// Writes the plan of the i-th route of all ranks. Also of padding row i % kRowBlock of expert
// i / kRowBlock, and of row block i % kRowBlock of that expert (and every kRowBlock-th after it).
__device__ inline void plan_rows(const Sources& sources, const RowPlan& plan,
                                 const ExpertRows& rows, int64_t i) {
    const int num_ranks = sources.num_ranks, num_experts = rows.num_experts;
    if (i < plan.num_tokens * plan.top_k) {
        const int64_t token = i / plan.top_k;
        const int rank = source_of(sources, token);
        const Source& source = sources.source[rank];
        const int64_t route = i - source.first_token * plan.top_k, id = source.topk_ids[route];
        if (plan.topk_ids != source.topk_ids) plan.topk_ids[i] = id;
        const int distance = (rank - sources.rank + num_ranks) % num_ranks;
        const int64_t expert = id - int64_t{sources.rank} * num_experts;
        const int row = rows.row(expert, distance, source.slot_in_expert[route]);
        plan.row_of_route[i] = row;
        if (row >= 0) {
            plan.token_of_row[row] = token;
            plan.row_weights[row] = plan.route_weights[i] = source.topk_weights[route];
        }
        if (i % plan.top_k == 0) {
            plan.peers[token] = peers_of(source.topk_ids + route, plan.top_k, num_experts, rank);
        }
    }
    const int64_t expert = i / kRowBlock;
    if (expert >= num_experts) return;
    const int begin = rows.offsets[expert], end = rows.offsets[expert + 1];
    const int total = rows.totals[expert], own = rows.counts[expert];
    const int row = begin + total + i % kRowBlock;
    if (row < end) {
        plan.token_of_row[row] = -1;
        plan.row_weights[row] = 0.0f;
    }
    for (int j = i % kRowBlock; j < (end - begin) / kRowBlock; j += kRowBlock) {
        plan.remote_rows[begin / kRowBlock + j] =
            max(min(total, (j + 1) * kRowBlock) - max(own, j * kRowBlock), 0);
    }
}

// Rows of a GEMM's operand, in 16-byte vectors.
struct OperandRows {
    uint4* rows;
    int64_t row_vectors;

    // Returns the number of parts of a row; one warp copies one part.
    __host__ __device__ int64_t parts() const {
        return (row_vectors + kCopyVectors * 32 - 1) / (kCopyVectors * 32);
    }
};

struct Words {
    uint32_t* words;
    int64_t size;
};

// A warp's part of a token: read once and stored to each of the token's rows.
class TokenPart {
public:
    __device__ TokenPart(const OperandRows& to, const void* tokens, int64_t token, int part)
        : to_(to), first_(part * kCopyVectors * 32 + threadIdx.x % 32) {
        const auto* from = static_cast<const uint4*>(tokens) + token * to.row_vectors;
#pragma unroll
        for (int i = 0; i < kCopyVectors; ++i) {
            if (first_ + i * 32 < to.row_vectors) vectors_[i] = from[first_ + i * 32];
        }
    }

    __device__ void store(uint4* rows, int64_t row) const {
#pragma unroll
        for (int i = 0; i < kCopyVectors; ++i) {
            const int64_t at = first_ + i * 32;
            if (at < to_.row_vectors) rows[row * to_.row_vectors + at] = vectors_[i];
        }
    }

    // Stores to row_of(k) for each of the token's routes k unless it is negative. Lanes share the
    // routes to find their rows.
    template <typename RowOf>
    __device__ void store_all(int64_t top_k, const RowOf& row_of) const {
        for (int64_t first = 0; first < top_k; first += 32) {
            const int64_t k = first + threadIdx.x % 32, own = k < top_k ? row_of(k) : -1;
            for (uint32_t left = __ballot_sync(~0u, own >= 0); left != 0; left &= left - 1) {
                store(to_.rows, __shfl_sync(~0u, own, __ffs(left) - 1));
            }
        }
    }

private:
    const OperandRows& to_;
    int64_t first_;
    uint4 vectors_[kCopyVectors];
};

// Zeroes an expert's padding rows, walking down from `end` while is_padding(row), and this expert's
// share of the counters.
template <typename IsPadding>
__device__ inline void clear(const OperandRows& to, int64_t end, const IsPadding& is_padding,
                             const Words& counters, int64_t expert, int64_t num_experts) {
    const int64_t thread = expert * blockDim.x + threadIdx.x;
    for (int64_t i = thread; i < counters.size; i += num_experts * blockDim.x) {
        counters.words[i] = 0;
    }
    for (int64_t row = end - 1 - threadIdx.x / 32; is_padding(row); row -= kRowWarps) {
        for (int64_t i = threadIdx.x % 32; i < to.row_vectors; i += 32) {
            to.rows[row * to.row_vectors + i] = uint4{};
        }
    }
}

// One CTA.
__global__ void __launch_bounds__(kPlanThreads)
    count_rows_kernel(const __grid_constant__ Sources sources, int num_experts,
                      volatile int64_t* count, int64_t tag) {
    begin_kernel();
    extern __shared__ int smem[];
    const ExpertRows rows(sources, num_experts, smem);
    if (threadIdx.x > 0) return;
    count[0] = rows.offsets[num_experts];
    __threadfence_system();  // the host reads the tag first
    count[1] = tag;
}

// Returns whether the buffers have room for the routing's rows; else one thread of the launch
// traps.
__device__ inline bool has_room(const Sources& sources, const RowPlan& plan,
                                const ExpertRows& rows) {
    const int num_rows = rows.offsets[rows.num_experts];
    if (num_rows <= plan.num_rows) return true;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        printf("comet_ds: rank %d of the expert parallel group has %d rows, \"max_rows_factor\" "
               "leaves room for %lld: raise it, or leave it out\n",
               sources.rank, num_rows, static_cast<long long>(plan.num_rows));
        __trap();
    }
    return false;
}

__global__ void __launch_bounds__(kPlanThreads)
    plan_and_dispatch_kernel(const __grid_constant__ Sources sources,
                             const __grid_constant__ RowPlan plan, int ctas_per_tile_order,
                             int num_plan_ctas, int num_token_ctas, OperandRows to,
                             Words counters) {
    begin_kernel();
    extern __shared__ int smem[];
    const int num_experts = plan.num_experts;
    const int tile_order = blockIdx.x / ctas_per_tile_order;
    const int token_cta = blockIdx.x - num_plan_ctas;
    const int64_t expert = token_cta - num_token_ctas;
    const Source& own = sources.source[sources.rank];
    if (tile_order < plan.num_tile_orders) {  // role: tile orders
        const ExpertRows rows(sources, num_experts, smem);
        if (!has_room(sources, plan, rows)) return;
        const int thread = blockIdx.x % ctas_per_tile_order * kPlanThreads + threadIdx.x;
        plan_tile_order(plan, rows, sources.num_ranks, tile_order, thread);
    } else if (token_cta < 0) {  // role: rows of the plan
        const ExpertRows rows(sources, num_experts, smem);
        if (!has_room(sources, plan, rows)) return;
        const int64_t cta = blockIdx.x - plan.num_tile_orders * ctas_per_tile_order;
        plan_rows(sources, plan, rows, cta * kPlanThreads + threadIdx.x);
        for (int i = threadIdx.x; cta == 0 && i <= num_experts; i += kPlanThreads) {
            plan.expert_offsets[i] = rows.offsets[i];
        }
    } else if (expert < 0) {  // role: own tokens
        const int64_t item = int64_t{token_cta} * kRowWarps + threadIdx.x / 32;
        const int64_t token = item / to.parts(), last = own.num_tokens - 1;
        // NOTE: the loads are in flight while the rows are counted.
        const TokenPart part(to, own.tokens, min(token, last), item % to.parts());
        const ExpertRows rows(sources, num_experts, smem);
        if (token > last || !has_room(sources, plan, rows)) return;
        part.store_all(plan.top_k, [&](int64_t k) {
            const int64_t route = token * plan.top_k + k;
            const int64_t first_expert = int64_t{sources.rank} * num_experts;
            return rows.row(own.topk_ids[route] - first_expert, 0, own.slot_in_expert[route]);
        });
    } else {  // role: padding and counters
        const ExpertRows rows(sources, num_experts, smem);
        if (!has_room(sources, plan, rows)) return;
        const int first = rows.offsets[expert] + rows.totals[expert];
        const auto is_padding = [&](int64_t row) { return row >= first; };
        clear(to, rows.offsets[expert + 1], is_padding, counters, expert, num_experts);
    }
}

// Copies tokens of the ranks at ring distances [distance, end_distance).
__global__ void __launch_bounds__(kRowWarps * 32)
    dispatch_rows_kernel(const __grid_constant__ Sources sources,
                         const __grid_constant__ RowPlan plan, int distance, int end_distance,
                         int num_token_ctas, OperandRows to, uint4* published, Words counters) {
    begin_kernel();
    const int64_t expert = int64_t{blockIdx.x} - num_token_ctas;
    if (expert >= 0) {  // role: padding and counters
        const int64_t begin = plan.expert_offsets[expert], end = plan.expert_offsets[expert + 1];
        const auto is_padding = [&](int64_t row) {
            return row >= begin && plan.token_of_row[row] < 0;
        };
        clear(to, end, is_padding, counters, expert, plan.num_experts);
        return;
    }
    const int64_t item = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / 32;
    int64_t token = item / to.parts();
    for (; distance < end_distance; ++distance) {
        const int64_t num_tokens = source_at(sources, distance).num_tokens;
        if (token < num_tokens) break;
        token -= num_tokens;
    }
    if (distance == end_distance) return;
    const Source& source = source_at(sources, distance);
    const TokenPart part(to, source.tokens, token, item % to.parts());
    if (published != nullptr) part.store(published, token);
    const int64_t* row_of_route = plan.row_of_route + (source.first_token + token) * plan.top_k;
    part.store_all(plan.top_k, [&](int64_t k) { return row_of_route[k]; });
}

// kLanes lanes of a warp share a route.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kRowWarps * 32)
    sum_row_dots_kernel(const __grid_constant__ Sources sources,
                        const __grid_constant__ RowPlan plan, const float* row_dots,
                        int64_t num_tiles, const T* grad_rows, const void* const* bias,
                        int64_t hidden) {
    begin_kernel();
    const int64_t thread = int64_t{blockIdx.x} * kRowWarps * 32 + threadIdx.x;
    const int64_t route = thread / kLanes;
    const bool is_route = route < plan.num_tokens * plan.top_k;
    const int lane = threadIdx.x % kLanes;
    const int64_t row = is_route ? plan.row_of_route[route] : -1;
    const int64_t id = is_route ? plan.topk_ids[route] : -1;
    float sum = 0.0f;
    if (row >= 0) {
        for (int64_t tile = lane; tile < num_tiles; tile += kLanes) {
            sum += row_dots[tile * plan.num_rows + row];
        }
        if (bias != nullptr) {
            const int64_t expert = id - int64_t{sources.rank} * plan.num_experts;
            const auto* expert_bias = static_cast<const T*>(bias[expert]);
            for (int64_t i = lane; i < hidden; i += kLanes) {
                sum += to_float(grad_rows[row * hidden + i]) * to_float(expert_bias[i]);
            }
        }
    }
#pragma unroll
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (!is_route || lane > 0) return;
    const int rank = source_of(sources, route / plan.top_k);
    if (row < 0 && (rank != sources.rank || id >= 0)) return;  // another rank writes it
    const Source& source = sources.source[rank];
    source.grad_weights[route - source.first_token * plan.top_k] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kSumCols / 2 * kSumSlices)
    sum_expert_rows_kernel(RowPlan plan, const T* rows, bool is_weighted, int64_t cols,
                           T* grad_bias) {
    begin_kernel();
    __shared__ float2 smem_sum[kSumSlices][kSumCols / 2];
    const int64_t expert = blockIdx.x, slice = threadIdx.x / (kSumCols / 2);
    const int lane = threadIdx.x % (kSumCols / 2);
    const int64_t col = int64_t{blockIdx.y} * kSumCols + 2 * lane;
    float2 sum{0.0f, 0.0f};
    if (col < cols) {
        const int end = plan.expert_offsets[expert + 1];
#pragma unroll 4
        for (int row = plan.expert_offsets[expert] + slice; row < end; row += kSumSlices) {
            const auto pair = *reinterpret_cast<const Vector<T, 2>*>(rows + row * cols + col);
            const float weight = is_weighted ? plan.row_weights[row] : 1.0f;
            sum.x += weight * to_float(pair.value[0]);
            sum.y += weight * to_float(pair.value[1]);
        }
    }
    smem_sum[slice][lane] = sum;
    __syncthreads();
    if (slice > 0 || col >= cols) return;
    for (int other = 1; other < kSumSlices; ++other) {
        sum.x += smem_sum[other][lane].x;
        sum.y += smem_sum[other][lane].y;
    }
    *reinterpret_cast<Vector<T, 2>*>(grad_bias + expert * cols + col) =
        Vector<T, 2>{from_float<T>(sum.x), from_float<T>(sum.y)};
}

}  // namespace comet_ds
