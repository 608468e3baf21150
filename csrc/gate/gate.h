// SPDX-License-Identifier: Apache-2.0
// From gate probabilities to kept routes, and back: parameters and host launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace comet_ds {

// Tokens a block of the first kernel routes: one a warp, one bit each in a bitmap word.
constexpr int kTokensPerWord = 32;

struct GateParams {
    const float* probs;         // [num_tokens, num_experts]: softmax of the logits
    const float* scores;        // the same shape: what the last choice maximises; null: probs
    const float* priority;      // top_k = 1: [num_tokens, num_experts] random numbers, or null
    const uint8_t* used_token;  // top_k = 1: [num_tokens], or null for all
    int64_t capacity;           // routes an expert keeps; negative: all
    int64_t num_tokens;
    int64_t num_experts;
    int64_t top_k;

    // Scratch, laid out by route_tokens. Words have one bit a token; an expert's queue is its first
    // choices, then (top_k = 2) its second ones.
    int32_t* chosen;     // [num_tokens, top_k]; -1 = token not used
    uint32_t* routed;    // [queues, num_experts, words]
    uint32_t* kept;      // [num_experts, words]
    int32_t* before;     // [num_experts, words]: kept routes of earlier words; routes of earlier
                         // words while admission looks at priorities
    float* prob_sums;    // [words, num_experts]
    float* mean_probs;   // [num_experts]

    // Results.
    int64_t* topk_ids;      // [num_tokens, top_k]; -1 = dropped or unused
    float* topk_weights;    // [num_tokens, top_k]; 0 where dropped
    int32_t* slot_in_expert;         // [num_tokens, top_k]: position among its expert's kept routes
    int32_t* kept_counts;   // [num_experts]
    int64_t* exp_counts;    // [num_experts], before dropping
    float* loss_share;      // [num_experts]: d l_aux / d probs, the same for every token
    float* l_aux;           // [1]
};

struct GateGradParams {
    const float* probs;         // [num_tokens, num_experts]
    const int64_t* topk_ids;    // [num_tokens, top_k]
    const float* grad_weights;  // [num_tokens, top_k]
    const float* grad_l_aux;    // [1]
    const float* loss_share;    // [num_experts]
    float* grad_logits;         // [num_tokens, num_experts]
    int64_t num_tokens;
    int64_t num_experts;
    int64_t top_k;
};

// Bytes of scratch memory route_tokens wants.
int64_t gate_scratch_bytes(int64_t num_tokens, int64_t num_experts, int64_t top_k);

// All throw std::runtime_error when a launch fails. num_tokens is at least 1.
void route_tokens(GateParams params, void* scratch, cudaStream_t stream);
void route_tokens_backward(const GateGradParams& params, cudaStream_t stream);

// What the products that make the gradients of the gate's input and weight read, all bf16.
struct SplitGradParams {
    const float* in;       // [num_rows, num_cols]: the logits' gradient
    const void* weight;    // [num_cols, hidden]
    void* terms;           // [num_rows, 2 num_cols]: [high, low], high + low = in to 16 bits
    void* doubled_weight;  // [2 num_cols, hidden]: weight behind weight
    int64_t num_rows;      // at least 1
    int64_t num_cols;
    int64_t hidden;        // a multiple of 8
};

void split_grad(const SplitGradParams& params, cudaStream_t stream);

// sum [size] bf16 = the first size terms + the other size terms, fp32.
void add_terms(const float* terms, void* sum, int64_t size, cudaStream_t stream);

}  // namespace comet_ds
