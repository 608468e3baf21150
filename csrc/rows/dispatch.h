// SPDX-License-Identifier: Apache-2.0
// Rows of the experts' GEMMs: where each token's rows lie, dispatch into them, and small sums over
// them. Parameters and host
// launchers.
//
// "Own" means of this rank. The ring distance of rank r is (r - own rank) mod num_ranks.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace comet_ds {

// Rows of a row block. An expert's rows start at a multiple of it and end with zero rows as
// padding.
constexpr int kRowBlock = 128;

// Most ranks of an expert parallel group; kernels take a table of them by value.
constexpr int kMaxRanks = 32;

// One rank's tokens and routing tables, at addresses this rank can read. slots and grad_weights lie
// in that rank's memory and are written by this one.
struct Source {
    const int64_t* topk_ids;        // [num_tokens, top_k]: expert among all ranks'; -1 = dropped
    const float* topk_weights;      // [num_tokens, top_k]
    const int32_t* slot_in_expert;  // [num_tokens, top_k]: position among its routes to the expert
    const int32_t* kept_counts;     // [experts of all ranks]
    const void* tokens;             // [num_tokens, hidden]: activations, or gradients in backward
    void* slots;                    // [slots, num_tokens, hidden]: partial sums from other ranks
    float* grad_weights;            // [num_tokens, top_k]
    int64_t num_tokens;
    int64_t first_token;  // index of its first token among the tokens of all ranks
};

struct Sources {
    Source source[kMaxRanks];
    int rank;  // this one
    int num_ranks;
};

// A tile order lists row blocks in the order in which a GEMM computes their tiles. It keeps an
// expert's blocks together, so that its weights are read while they are in L2, and computes late
// the blocks that wait for other ranks' tokens. It splits the experts below num_split_experts:
// first come the blocks of split experts that hold own tokens only, then all blocks of the other
// experts, then the remaining blocks of split experts. An order that splits every expert sorts all
// blocks by the ring distance of the farthest rank whose tokens they hold. A pass that pushes its
// results walks its order backwards, so that the farthest rank's results are complete first.
constexpr int kMaxTileOrders = 4;

// Tokens are those of all ranks, sorted by rank. Experts are this rank's.
struct RowPlan {
    int64_t* row_of_route;    // [num_tokens, top_k]; -1 = dropped or on another rank
    int32_t* token_of_row;    // [max_rows]; -1 = padding
    float* row_weights;       // [max_rows]; 0 in padding
    int32_t* expert_offsets;  // [num_experts + 1], multiples of kRowBlock
    int32_t* block_order;     // [tile orders, row blocks]: an expert's in pairs where possible
    int32_t* expert_order;    // [tile orders, row blocks]: the expert of each block of block_order
    int32_t* remote_begin;    // [tile orders, ranks]: first position in block_order, an even one,
                              // whose blocks may hold tokens from ring distance >= d
    int32_t* remote_rows;     // [row blocks]: how many rows of a block hold other ranks' tokens
    int64_t* topk_ids;        // [num_tokens, top_k]: the topk_ids of all sources
    float* route_weights;     // [num_tokens, top_k]; written only for routes with a row here
    uint32_t* peers;          // [num_tokens]: one bit per rank, other than its own, it is routed to
    int64_t num_tokens;
    int64_t top_k;
    int64_t num_experts;
    int64_t max_rows;  // rows that the plan has room for
    int64_t num_rows;  // rows that buffers of rows have room for; at most max_rows
    int num_split_experts[kMaxTileOrders];
    int num_tile_orders;
};

// All throw std::runtime_error when a launch fails.

// Returns whether the planning kernel has enough shared memory for a rank's experts.
bool can_plan(int64_t num_experts, int num_ranks);

// Writes two words to host memory: the number of rows of this rank's experts, with padding, and
// then `tag`, which tells the host that the number is there.
void count_rows(const Sources& sources, int64_t num_experts, int64_t* count, int64_t tag,
                cudaStream_t stream);

// Writes the plan; plan.topk_ids only where it is not the source's own table.
void plan_rows(const Sources& sources, const RowPlan& plan, cudaStream_t stream);

// Does the work of plan_rows and, in the same launch, of dispatch_rows without publishing. Where
// the routing has more rows than the buffers have room for, writes nothing to them: the kernel
// prints rank, rows and room, and traps.
void plan_and_dispatch(const Sources& sources, const RowPlan& plan, void* rows, int64_t row_bytes,
                       uint32_t* counters, int64_t num_counters, cudaStream_t stream);

// Copies this rank's own tokens to rows[r] and zeroes padding rows. A token and a row have
// row_bytes bytes, a multiple of 16. Rows of other ranks' tokens are left alone. Also copies the
// tokens to `published`, where peers read them, unless that is null, and zeroes the counters that
// later GEMM launches use (peer/exchange.h).
void dispatch_rows(const Sources& sources, const RowPlan& plan, void* published, void* rows,
                   int64_t row_bytes, uint32_t* counters, int64_t num_counters,
                   cudaStream_t stream);

// Copies all other ranks' tokens to their rows. Padding and counters are left alone.
void dispatch_other_rows(const Sources& sources, const RowPlan& plan, void* rows,
                         int64_t row_bytes, cudaStream_t stream);

// grad_weights[t, k], in the memory of the token's rank, = sum over tiles of row_dots[tile, r],
// plus <grad_rows[r], bias of r's expert> where `bias` is not null. Writes routes to this rank's
// experts, and 0 for dropped routes of its own tokens. row_dots: [num_tiles, num_rows], grad_rows:
// [num_rows, hidden].
void sum_row_dots(const Sources& sources, const RowPlan& plan, const float* row_dots,
                  int64_t num_tiles, const void* grad_rows, const void* const* bias,
                  int64_t hidden, bool is_bfloat16, cudaStream_t stream);

// grad_bias[e] = sum over the expert's rows of rows[r], or, weighted, of row_weights[r] rows[r].
// rows: [num_rows, cols], grad_bias: [num_experts, cols].
void sum_expert_rows(const RowPlan& plan, const void* rows, bool is_weighted, int64_t cols,
                     bool is_bfloat16, void* grad_bias, cudaStream_t stream);

}  // namespace comet_ds
