// SPDX-License-Identifier: Apache-2.0
// From gate probabilities to kept routes, and the gradient of the gate's logits: parameters and
// host launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace comet_ds {

// Tokens that a CTA of the first kernel routes: one per warp, and one bit each in a word of a
// bitmap.
constexpr int kTokensPerWord = 32;

struct GateParams {
    const float* probs;         // [num_tokens, num_experts]: softmax of the logits
    const float* scores;        // the same shape: the last choice maximises it; null: probs
    const float* priority;      // top_k = 1: [num_tokens, num_experts] random numbers, or null
    const uint8_t* used_token;  // top_k = 1: [num_tokens], 0 = not routed; null: all routed
    int64_t capacity;           // most routes that an expert keeps; negative: all
    int64_t num_tokens;
    int64_t num_experts;
    int64_t top_k;

    // Scratch, laid out by route_tokens. A word has one bit per token. For top_k = 2 an expert has
    // two queues, first and second choices, else one.
    int32_t* chosen;     // [num_tokens, top_k]; -1 = token not used
    uint32_t* routed;    // [queues, num_experts, words]
    uint32_t* kept;      // [num_experts, words]
    int32_t* before;     // [num_experts, words]: routes before the word during admission by
                         // priority; afterwards kept routes before it
    float* prob_sums;    // [words, num_experts]
    float* mean_probs;   // [num_experts]

    // Results.
    int64_t* topk_ids;      // [num_tokens, top_k]; -1 = dropped or unused
    float* topk_weights;    // [num_tokens, top_k]; 0 where dropped
    int32_t* slot_in_expert;  // [num_tokens, top_k]: position among its expert's kept routes
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

// Returns the bytes of scratch memory that route_tokens needs.
int64_t gate_scratch_bytes(int64_t num_tokens, int64_t num_experts, int64_t top_k);

// All throw std::runtime_error when a launch fails. num_tokens is at least 1.
void route_tokens(GateParams params, void* scratch, cudaStream_t stream);
void route_tokens_backward(const GateGradParams& params, cudaStream_t stream);

// Operands, in bf16, of the products that compute the gradients of the gate's input and weight.
struct SplitGradParams {
    const float* in;       // [num_rows, num_cols]: the logits' gradient
    const void* weight;    // [num_cols, hidden]
    void* terms;           // [num_rows, 2 num_cols]: [high, low], high + low = in to 16 bits
    void* doubled_weight;  // [2 num_cols, hidden]: weight twice
    int64_t num_rows;      // at least 1
    int64_t num_cols;
    int64_t hidden;        // a multiple of 8
};

void split_grad(const SplitGradParams& params, cudaStream_t stream);

// sum[i] = terms[i] + terms[size + i], terms in fp32, sum [size] in bf16.
void add_terms(const float* terms, void* sum, int64_t size, cudaStream_t stream);

}  // namespace comet_ds
