// SPDX-License-Identifier: Apache-2.0
// Rows of the experts' GEMMs: where they lie, bringing tokens there, and the small sums over them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace comet_ds {

// Rows of an expert start at a multiple of this; rows of padding are zero.
constexpr int kRowBlock = 128;

// Ranks of an expert parallel group; kernels take a table of them by value.
constexpr int kMaxRanks = 32;

// The tokens of one rank and what its gate says of them, where this one reads them; slots and
// grad_weights are in that rank's memory.
struct Source {
    const int64_t* topk_ids;     // [num_tokens, top_k]: expert, of all ranks' ; -1 = dropped
    const float* topk_weights;   // [num_tokens, top_k]
    const int32_t* slot_in_expert;        // [num_tokens, top_k]: position among its routes to the expert
    const int32_t* kept_counts;  // [experts of all ranks]
    const void* tokens;          // [num_tokens, hidden]: activations or gradients
    void* slots;                 // [slots, num_tokens, hidden]: partial sums from other ranks
    float* grad_weights;         // [num_tokens, top_k]
    int64_t num_tokens;
    int64_t first_token;  // among the tokens of all ranks
};

struct Sources {
    Source source[kMaxRanks];
    int rank;  // this one's
    int num_ranks;
};

// Orders in which blocks of rows are computed, to use an expert's weights while they are in L2 and
// yet not wait for rows. An order splits so many experts: first come those blocks of theirs that
// have own tokens only, then the other experts' blocks, then the rest, where all experts are split
// by distance of the farthest rank. Backwards it is the order for results that travel.
constexpr int kMaxOrders = 4;

// Tokens are those of all ranks, by rank; experts are this rank's.
struct RowPlan {
    int64_t* row_of_route;     // [num_tokens, top_k]; -1 = dropped or on another rank
    int32_t* token_of_row;     // [max_rows]; -1 = padding
    float* row_weights;        // [max_rows]; 0 in padding
    int32_t* expert_offsets;   // [num_experts + 1], multiples of kRowBlock
    int32_t* block_order;      // [orders, max_rows / kRowBlock]: an expert's in pairs, if possible
    int32_t* expert_order;     // [orders, max_rows / kRowBlock]: these blocks' experts
    int32_t* remote_begin;     // [orders, ranks]: before this position, an even one, no block has
                               // rows of ranks at this distance or farther
    int32_t* remote_rows;      // [max_rows / kRowBlock]: rows of other ranks' tokens in a block
    int64_t* topk_ids;         // [num_tokens, top_k]: the sources', together
    float* route_weights;      // [num_tokens, top_k]: of routes that have rows
    uint32_t* peers;           // [num_tokens]: ranks but its own that a token goes to, a bit each
    int64_t num_tokens;
    int64_t top_k;
    int64_t num_experts;
    int64_t max_rows;  // room of the plan
    int64_t num_rows;  // room of the buffers that have a row for each of the plan's; at most max_rows
    int num_split[kMaxOrders];  // of each order
    int num_orders;
};

// All throw std::runtime_error when a launch fails.

// Whether a plan has room for so many experts of a rank.
bool can_plan(int64_t num_experts, int num_ranks);

// Writes how many rows this rank's experts have, padding included, and behind it `tag`, to memory of
// the host: two words, the second of which it writes last.
void count_rows(const Sources& sources, int64_t num_experts, int64_t* count, int64_t tag,
                cudaStream_t stream);

// Writes the plan; topk_ids only where they are not the source's own.
void plan_rows(const Sources& sources, const RowPlan& plan, cudaStream_t stream);

// Writes the plan and at the same time does what dispatch_rows does, except for publishing. Where
// the routing has more rows than the buffers have room for, nothing is written to them: the kernel
// prints rank, rows and room, and traps.
void plan_and_dispatch(const Sources& sources, const RowPlan& plan, void* rows, int64_t row_bytes,
                       uint32_t* counters, int64_t num_counters, cudaStream_t stream);

// rows[r] = the token's activation for this rank's own tokens, zero in padding; both of row_bytes,
// a multiple of 16. Rows of other ranks' tokens are left alone. Copies the tokens to where peers
// read them, unless that is null. Sets counters, which kernels behind need (exchange.h), to zero.
void dispatch_rows(const Sources& sources, const RowPlan& plan, void* published, void* rows,
                   int64_t row_bytes, uint32_t* counters, int64_t num_counters,
                   cudaStream_t stream);

// The same for all other ranks' tokens, and nothing else.
void dispatch_other_rows(const Sources& sources, const RowPlan& plan, void* rows,
                         int64_t row_bytes, cudaStream_t stream);

// grad_weights[t, k] in the token's rank = sum over tiles of row_dots[tile, r], plus <grad_rows[r],
// bias of r's expert> where there are biases. Routes to this rank's experts are written, and 0 for
// its own tokens' dropped ones. row_dots: [num_tiles, num_rows], grad_rows: [num_rows, hidden].
void sum_row_dots(const Sources& sources, const RowPlan& plan, const float* row_dots,
                  int64_t num_tiles, const void* grad_rows, const void* const* bias,
                  int64_t hidden, bool is_bfloat16, cudaStream_t stream);

// grad_bias[e] = sum over the expert's rows of rows[r], or of row_weights[r] rows[r]. rows:
// [num_rows, cols], grad_bias: [num_experts, cols].
void sum_expert_rows(const RowPlan& plan, const void* rows, bool is_weighted, int64_t cols,
                     bool is_bfloat16, void* grad_bias, cudaStream_t stream);

}  // namespace comet_ds
