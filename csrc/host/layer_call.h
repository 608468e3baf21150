// SPDX-License-Identifier: Apache-2.0
// One layer's forward and backward as launches on a stream. A LayerCall is made once for a layer's
// weights, the ranks' numbers of tokens and the places in their memory; every step of training then
// calls it with that step's tensors.
//
//   forward        tables and tokens to the other ranks, rows, up, down, results back, sums
//   backward_down  gradients to the other ranks, rows; back through down; down's weight gradient
//   backward_up    back through up; the first weight gradient, while results travel
//   sum_grads      sums of the results
//   weight_grad    the other weight gradients
//
// Backward is cut where memory becomes free that the next part can use.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "gemm/expert_gemm.h"
#include "gemm/timeline.h"
#include "peer/exchange.h"
#include "rows/dispatch.h"

namespace comet_ds {

struct LayerSizes {
    int64_t hidden;
    int64_t ffn;
    int64_t num_experts;      // of this rank
    int64_t num_all_experts;  // of all ranks
    int64_t top_k;
    int64_t max_rows;  // most rows this rank's experts can have, a multiple of kRowBlock
    // Whether each forward counts its rows on the host before it allocates memory for them, instead
    // of allocating max_rows.
    bool counts_rows;
    std::vector<int64_t> num_tokens;  // of every rank
    int rank;
    int num_sms;
    bool is_bfloat16;  // else fp16
    bool is_gated;
    Activation activation;

    int num_ranks() const { return num_tokens.size(); }
    int64_t num_own_tokens() const { return num_tokens[rank]; }
    int64_t num_all_tokens() const;
};

// Of a layer's matrices, by Matrix; gate is not there in an expert of two matrices.
enum class MatrixOf : int { kGate = 0, kUp = 1, kDown = 2 };

struct LayerWeights {
    const CUtensorMap* maps[3];   // [num_experts] each
    const void* const* biases[3];  // [num_experts] each, or null
};

// How many CTAs communicate during a GEMM, and how many experts are split for it (RowPlan).
struct CtaSplit {
    int num_comm_ctas;
    int num_split_experts;
};

struct CtaSplits {
    CtaSplit pull;  // 0 CTAs: copy engines send the tokens
    CtaSplit push;
    CtaSplit pull_grad;
    CtaSplit push_grad;
};

// Where this rank and the others find what they exchange.
struct PeerPlaces {
    bool is_used = false;   // not by a rank that has all experts and no group
    Sources sources;        // what this rank reads of the others; its own tables are the call's
    void* published;        // where the others read its tokens
    Mailboxes mailboxes;
    // Where it writes for the others, at [distance in ring order - 1].
    std::vector<void*> topk_ids, topk_weights, slot_in_expert, kept_counts;
    std::vector<void*> tokens;  // empty where tokens are not sent
    uint64_t* epoch;
    LateWait* late;
    uint64_t timeout_ns;
    bool has_copy_engines;  // else a kernel copies what they would
};

// Streams of one call: `side` carries copies that run meanwhile, between `fork` and `join`.
struct Streams {
    cudaStream_t main;
    cudaStream_t side;
};

// A plan and the counters of the communicating CTAs: parts of one block of memory.
struct Workspace {
    struct Part {
        const char* name;
        int64_t offset;
        int64_t item_bytes;
        std::vector<int64_t> shape;
    };
    std::vector<Part> parts;
    int64_t num_bytes;

    int64_t offset(const char* name) const;
};

// Measures a launch: recorded before and behind it; null for none.
struct LaunchEvents {
    cudaEvent_t start = nullptr;
    cudaEvent_t end = nullptr;
};

// This rank's routing, from its gate.
struct RoutingTables {
    const int64_t* topk_ids;    // [num_own_tokens, top_k]
    const float* topk_weights;  // the same shape
    const int32_t* slot_in_expert;
    const int32_t* kept_counts;  // [num_all_experts]
};

// What is there before the number of rows is known.
struct PlanTensors {
    const void* tokens;  // [num_own_tokens, hidden]
    RoutingTables routing;
    void* workspace;
};

struct ForwardTensors {
    PlanTensors plan;
    int64_t num_rows;  // of the buffers, a multiple of kRowBlock
    void* rows;        // [num_rows, hidden]
    void* hidden;      // [num_rows, ffn]
    void* pre[2];  // [num_rows, ffn] each: gate and up, or up; null where backward needs none
    void* results;  // [num_rows, hidden]
    void* output;   // [num_own_tokens, hidden]
};

struct DownGradTensors {
    const void* grad;  // [num_own_tokens, hidden]
    void* workspace;
    int64_t num_rows;
    void* grad_rows;  // [num_rows, hidden]
    const void* pre[2];
    void* grad_pre[2];      // may be pre
    void* weighted_hidden;  // [num_rows, ffn]
    float* row_dots;        // [num_row_dots(), num_rows]
    float* grad_weights;    // [num_own_tokens, top_k]: one rank alone; else in its memory
    void* grad_down;        // [num_experts, hidden, ffn], or null where it is not needed
    void* grad_down_bias;   // [num_experts, hidden], or null
    bool adds_to_down;      // to what grad_down holds, instead of writing it
};

struct UpGradTensors {
    void* workspace;
    int64_t num_rows;
    const void* grad_pre[2];
    const void* rows;
    void* grad_rows;        // [num_rows, hidden], or null where nobody needs the tokens' gradient
    void* grad_first;       // [num_experts, ffn, hidden]: of gate or up, or null
    void* grad_first_bias;  // [num_experts, ffn], or null
    bool adds_to_first;     // to what grad_first holds
};

struct TokenGradTensors {
    void* workspace;
    const void* grad_rows;  // [num_rows, hidden]
    void* grad_tokens;      // [num_own_tokens, hidden]
    float* grad_weights;    // [num_own_tokens, top_k]: of several ranks, what they have summed
};

// grad[e] = a^T b over the rows of expert e, or += ; grad_bias[e] = the sum of a's rows, weighted
// or not.
struct WeightGradTensors {
    void* workspace;
    int64_t num_rows;
    const void* a;  // [num_rows, a_cols]
    const void* b;  // [num_rows, b_cols]
    int64_t a_cols;
    int64_t b_cols;
    void* grad;
    void* grad_bias;  // or null
    bool is_weighted;
    bool adds;
};

class LayerCall {
  public:
    LayerCall(LayerSizes sizes, LayerWeights weights, CtaSplits splits, PeerPlaces places);
    ~LayerCall();
    LayerCall(const LayerCall&) = delete;
    LayerCall& operator=(const LayerCall&) = delete;

    const LayerSizes& sizes() const { return sizes_; }
    const Workspace& workspace() const { return workspace_; }
    bool has_peers() const { return places_.is_used; }
    bool is_pushed() const { return has_peers() && splits_.pull.num_comm_ctas == 0; }
    int64_t num_row_dots() const;

    // Begins to bring the tokens to the other ranks on the side stream, before the gate runs.
    void begin(const void* tokens, Streams streams) const;

    // Returns how many rows to allocate for a forward. Where the sizes say that rows are counted,
    // brings the ranks' tables together, plans the rows, and waits on the host for their number,
    // while the GPU plans: never while a CUDA graph is captured. Throws std::runtime_error if a
    // kernel fails meanwhile.
    int64_t plan(const PlanTensors& t, Exposure* exposure, Streams streams) const;

    void forward(const ForwardTensors& t, const LaunchEvents (&events)[2], Exposure* exposure,
                 Streams streams) const;
    void backward_down(const DownGradTensors& t, const LaunchEvents& events, Exposure* exposure,
                       cudaStream_t stream) const;
    void backward_up(const UpGradTensors& t, const LaunchEvents& events, Exposure* exposure,
                     cudaStream_t stream) const;
    void sum_grads(const TokenGradTensors& t, Exposure* exposure, cudaStream_t stream) const;
    void weight_grad(const WeightGradTensors& t, cudaStream_t stream) const;

    // The parts of a direction, for those who test or time them alone.
    void plan_and_dispatch(const ForwardTensors& t, cudaStream_t stream) const;
    void dispatch(const ForwardTensors& t, Exposure* exposure, Streams streams) const;
    void up(const ForwardTensors& t, const LaunchEvents& events, Exposure* exposure,
            cudaStream_t stream) const;
    void down(const ForwardTensors& t, const LaunchEvents& events, Exposure* exposure,
              cudaStream_t stream) const;
    void down_grad(const DownGradTensors& t, const LaunchEvents& events, Exposure* exposure,
                   cudaStream_t stream) const;
    void up_grad(const UpGradTensors& t, cudaStream_t stream) const;

  private:
    RowPlan row_plan(void* workspace, int64_t num_rows) const;
    void exchange_tables(const PlanTensors& t, Exposure* exposure, Streams streams) const;
    int64_t wait_for_count(cudaStream_t stream) const;
    Sources sources(const void* tokens, const RoutingTables& routing, float* grad_weights) const;
    Communication communication(const Sources& sources, void* workspace, void* rows, int counters,
                                int num_comm_ctas, int64_t num_rows, Exposure* exposure) const;
    uint32_t* counters(void* workspace, int which) const;
    GemmShape gemm_shape(const RowPlan& plan, int64_t n) const;
    RowTiles row_tiles(const RowPlan& plan, int tile_order, int64_t k) const;
    template <typename Params>  // of a pass
    void launch(const Params& params, const Communication& communication,
                const LaunchEvents& events, cudaStream_t stream) const;
    void weight_grad(const WeightGradTensors& t, const Communication& communication,
                     const LaunchEvents& events, cudaStream_t stream) const;
    void combine(const void* rows, void* workspace, const float* weights, const Sources& sources,
                 void* output, Exposure* exposure, cudaStream_t stream) const;
    void send_tables(const RoutingTables& routing, cudaStream_t stream) const;
    void send_half(int half, const void* tokens, Streams streams) const;
    void sync_ranks(RankBarrier barrier, Exposure* exposure, cudaStream_t stream) const;
    void fork(Streams streams) const;
    void join(Streams streams) const;

    LayerSizes sizes_;
    LayerWeights weights_;
    CtaSplits splits_;
    PeerPlaces places_;
    Workspace workspace_;
    cudaEvent_t forked_ = nullptr;
    cudaEvent_t joined_ = nullptr;
    volatile int64_t* row_count_ = nullptr;  // the host's: number of rows, tag of the forward
    mutable int64_t num_counted_ = 0;        // forwards so far, the tag of the last one
};

// Where launches of GEMMs to come write what their CTAs do (timeline.h), one after the other, as
// long as there is room; returns how many bytes were left of the room before.
size_t set_timeline_room(uintptr_t records, size_t num_bytes);

}  // namespace comet_ds
