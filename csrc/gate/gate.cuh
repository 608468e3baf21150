// SPDX-License-Identifier: Apache-2.0
// From gate probabilities to kept routes, and the gradient of the gate's logits.
//
// 1. Math, for a token with probabilities p over E experts (comet_ds/gate has the same in PyTorch):
//        choices   the top_k largest p, ties by index. With `scores` the last choice is instead the
//                  best of the scores, among experts not chosen before
//        kept      an expert keeps `capacity` routes. For top_k = 2 in queue order: all first
//                  choices before all second ones. Else those of highest priority, ties by token;
//                  the priority is p, for top_k = 1 the given random number, or the same for all
//        weights   p of the kept choices, for top_k > 1 divided by their sum
//        l_aux     c sum_e mean_t(p) mean_t(chosen) with c = E, for top_k > 2 c = E / top_k; for
//                  top_k = 2 `chosen` counts first choices only
//    Three launches:
//        select    choices; a bitmap of each expert's routes; sums of p over 32 tokens
//        admit     which routes an expert keeps, and how many of them precede each word of 32
//                  tokens
//        finish    ids, slots and weights of the kept routes; l_aux
//    Backward is one launch: the quotient, the loss and the softmax.
// 2. Grid and roles: select one warp per token, admit one CTA per expert, finish one thread per
//    route (several routes per thread where a token has many), backward one warp per token.
// 3. Flags: none; launches on one stream are ordered. Atomics set bits and count integers; sums of
//    floats have a fixed order.
// 4. Shared memory: select 4 bytes per expert and queue, admit 22 KB, finish 512 bytes.
// 5. Sources: deepspeed/moe/sharded_moe.py (top1gating, top2gating, topkgating). torch.topk breaks
//    ties by index and takes NaN for the largest value.
#pragma once

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cuda_bf16.h>

#include "gate/gate.h"
#include "ptx/kernel_order.cuh"

namespace comet_ds {

constexpr int kSelectThreads = kTokensPerWord * 32;
constexpr int kAdmitThreads = 256;
constexpr int kCachedKeys = 4096;  // an expert's even share of 32k tokens, 64 experts, top_k = 8
constexpr int kCachedWords = 512;  // words of 16k tokens
constexpr int kFinishThreads = 128;
constexpr int kGradWarps = 8;

// Smaller sums of probabilities count as this, the smallest relative step of fp32.
constexpr float kEpsilon = 1.1920929e-07f;

__device__ inline int num_queues(int64_t top_k) { return top_k == 2 ? 2 : 1; }
__device__ inline int64_t num_words(int64_t num_tokens) {
    return (num_tokens + kTokensPerWord - 1) / kTokensPerWord;
}

// Maps floats to integers of the same order. NaN is above all others and below ~0.
__device__ inline uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return 0xfffffffeu;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
constexpr uint32_t kOrderedZero = 0x80000000u;  // ordered(0.0f)

// Takes the largest values of a row one after the other, ties by index. All lanes of a warp call
// it. Each lane holds kLaneValues values in registers. With kLaneValues = 0 a row may have any
// number of values, which are read again for each one taken.
template <int kLaneValues>
class Ranking {
public:
    // excluded: an index that is never taken, or -1.
    __device__ Ranking(const float* row, int num_values, int excluded)
        : row_(row), num_values_(num_values), excluded_(excluded) {
#pragma unroll
        for (int j = 0; j < kLaneValues; ++j) keys_[j] = read_key(j);
    }

    // Returns the index of the next value, to all lanes.
    __device__ int take() {
        const int num_lane_values = kLaneValues > 0 ? kLaneValues : (num_values_ + 31) / 32;
        uint32_t best_key = 0, best_index = ~0u;
#pragma unroll
        for (int j = 0; j < num_lane_values; ++j) {
            const uint32_t key = kLaneValues > 0 ? keys_[j] : read_key(j), index = index_of(j);
            const bool is_left = key < taken_key_ || (key == taken_key_ && index > taken_index_);
            if (is_left && key > best_key) best_key = key, best_index = index;
        }
        taken_key_ = __reduce_max_sync(~0u, best_key);
        taken_index_ = __reduce_min_sync(~0u, best_key == taken_key_ ? best_index : ~0u);
        return taken_index_;
    }

private:
    static __device__ int index_of(int j) { return j * 32 + threadIdx.x % 32; }

    // Returns a key below those of all values where the lane has no j-th value.
    __device__ uint32_t read_key(int j) const {
        const int index = index_of(j);
        return index < num_values_ && index != excluded_ ? ordered(row_[index]) : 0;
    }

    const float* row_;
    int num_values_, excluded_;
    uint32_t keys_[kLaneValues > 0 ? kLaneValues : 1];
    uint32_t taken_key_ = ~0u, taken_index_ = 0;  // of the value taken last
};

template <int kLaneValues>
__global__ void __launch_bounds__(kSelectThreads) select_experts_kernel(GateParams p) {
    begin_kernel();
    extern __shared__ uint32_t smem_routed[];  // [queues, num_experts]
    const int queues = num_queues(p.top_k), warp = threadIdx.x / 32;
    const int64_t token = int64_t{blockIdx.x} * kTokensPerWord + warp;
    for (int i = threadIdx.x; i < queues * p.num_experts; i += kSelectThreads) smem_routed[i] = 0;
    __syncthreads();
    if (token < p.num_tokens) {
        const bool is_used = p.used_token == nullptr || p.used_token[token] != 0;
        const int64_t row = token * p.num_experts;
        Ranking<kLaneValues> ranking(p.probs + row, p.num_experts, -1);
        int expert = -1;
        for (int k = 0; k < p.top_k; ++k) {
            if (p.scores != nullptr && k == p.top_k - 1) {
                ranking = Ranking<kLaneValues>(p.scores + row, p.num_experts, expert);
            }
            expert = ranking.take();
            if (threadIdx.x % 32 == 0) {
                p.chosen[token * p.top_k + k] = is_used ? expert : -1;
                const int queue = queues == 2 ? k : 0;
                if (is_used) atomicOr(&smem_routed[queue * p.num_experts + expert], 1u << warp);
            }
        }
    }
    __syncthreads();
    const int64_t words = num_words(p.num_tokens);
    for (int i = threadIdx.x; i < queues * p.num_experts; i += kSelectThreads) {
        p.routed[i * words + blockIdx.x] = smem_routed[i];
    }
    const int64_t first = int64_t{blockIdx.x} * kTokensPerWord;
    const int64_t last = min(first + kTokensPerWord, p.num_tokens);
    for (int expert = threadIdx.x; expert < p.num_experts; expert += kSelectThreads) {
        float sum = 0.0f;
#pragma unroll 8
        for (int64_t t = first; t < last; ++t) sum += p.probs[t * p.num_experts + expert];
        p.prob_sums[blockIdx.x * p.num_experts + expert] = sum;
    }
}

// Admission of one expert's routes. All threads of a CTA call all methods together.
class Admission {
public:
    using Scan = cub::BlockScan<int, kAdmitThreads, cub::BLOCK_SCAN_WARP_SCANS>;
    using Reduce = cub::BlockReduce<float, kAdmitThreads>;
    struct Storage {
        union {
            Scan::TempStorage scan;
            Reduce::TempStorage reduce;
        };
        int histogram[kAdmitThreads];  // one bin per thread
        int digit, num_wanted, count;
        uint32_t keys[kCachedKeys];    // of the expert's first routes, in order
        uint32_t words[kCachedWords];  // the expert's first words
        int before[kCachedWords];      // routes before each of these words
    };

    __device__ Admission(const GateParams& p, int expert, Storage& smem)
        : p_(p), expert_(expert), words_(num_words(p.num_tokens)), smem_(smem) {}

    __device__ uint32_t routed(int queue, int64_t word) const {
        return word < words_ ? p_.routed[(queue * p_.num_experts + expert_) * words_ + word] : 0;
    }

    // Calls count(word) and then keep(word, sum of the counts of earlier words) for every word of
    // the expert, one thread per word. Returns the sum of all counts.
    template <typename Count, typename Keep>
    __device__ int scan(Count count, Keep keep) {
        int total = 0;
        for (int64_t first = 0; first < words_; first += kAdmitThreads) {
            const int64_t word = first + threadIdx.x;
            int before, sum;
            __syncthreads();
            Scan(smem_.scan).ExclusiveSum(word < words_ ? count(word) : 0, before, sum);
            if (word < words_) keep(word, total + before);
            total += sum;
        }
        return total;
    }

    // Returns the number of the expert's routes. Keeps the first words and the keys (priorities) of
    // the first routes in shared memory, and in `before` how many routes precede each word.
    __device__ int read_keys() {
        return scan([&](int64_t word) { return __popc(routed(0, word)); },
                    [&](int64_t word, int before) {
                        uint32_t bits = routed(0, word);
                        if (word < kCachedWords) {
                            smem_.words[word] = bits;
                            smem_.before[word] = before;
                        } else {
                            p_.before[expert_ * words_ + word] = before;
                        }
                        constexpr int kTogether = 4;  // loads in flight
                        while (bits != 0 && before < kCachedKeys) {
                            uint32_t keys[kTogether];
                            const int count = min(__popc(bits), kTogether);
#pragma unroll
                            for (int i = 0; i < kTogether; ++i) {
                                const int64_t token = word * kTokensPerWord + __ffs(bits) - 1;
                                if (i < count) keys[i] = read_key(token);
                                bits &= bits - 1;
                            }
#pragma unroll
                            for (int i = 0; i < kTogether; ++i) {
                                if (i < count && before + i < kCachedKeys) {
                                    smem_.keys[before + i] = keys[i];
                                }
                            }
                            before += count;
                        }
                    });
    }

    // Calls visit(token, key) for the routes of a word, once read_keys has run.
    template <typename Visit>
    __device__ void for_each(int64_t word, Visit visit) const {
        const bool is_cached = word < kCachedWords;
        int i = is_cached ? smem_.before[word] : p_.before[expert_ * words_ + word];
        uint32_t bits = is_cached ? smem_.words[word] : routed(0, word);
        for (; bits != 0; bits &= bits - 1, ++i) {
            const int64_t token = word * kTokensPerWord + __ffs(bits) - 1;
            visit(token, i < kCachedKeys ? smem_.keys[i] : read_key(token));
        }
    }

    // Finds the num_wanted routes of largest key. These are all routes above the key it returns,
    // and as many routes with this key as num_wanted then says. Radix selection, one byte at a
    // time, until all routes with a prefix are wanted.
    __device__ uint32_t select_key(int& num_wanted) {
        uint32_t prefix = 0, mask = 0;
        for (int shift = 24; shift >= 0; shift -= 8) {
            smem_.histogram[threadIdx.x] = 0;
            __syncthreads();
            for (int64_t word = threadIdx.x; word < words_; word += kAdmitThreads) {
                for_each(word, [&](int64_t, uint32_t key) {
                    if ((key & mask) == prefix) {
                        atomicAdd(&smem_.histogram[key >> shift & 0xff], 1);
                    }
                });
            }
            __syncthreads();
            const int digit = kAdmitThreads - 1 - threadIdx.x;
            const int count = smem_.histogram[digit];
            int above;
            Scan(smem_.scan).ExclusiveSum(count, above);
            if (above < num_wanted && num_wanted <= above + count) {
                smem_.digit = digit;
                smem_.num_wanted = num_wanted - above;
                smem_.count = count;
            }
            __syncthreads();
            num_wanted = smem_.num_wanted;
            prefix |= uint32_t(smem_.digit) << shift;
            mask |= 0xffu << shift;
            if (num_wanted == smem_.count) break;
        }
        return prefix;
    }

    __device__ void store(int64_t word, uint32_t bits) const {
        p_.kept[expert_ * words_ + word] = bits;
    }
    __device__ uint32_t kept(int64_t word) const { return p_.kept[expert_ * words_ + word]; }

    // Keeps the first `capacity` routes of the queues.
    __device__ void admit_in_order(int capacity) {
        int admitted = 0;
        for (int queue = 0; queue < num_queues(p_.top_k); ++queue) {
            admitted += scan([&](int64_t word) { return __popc(routed(queue, word)); },
                             [&](int64_t word, int before) {
                                 uint32_t bits = routed(queue, word);
                                 const int room = max(capacity - admitted - before, 0);
                                 while (__popc(bits) > room) bits ^= 1u << (31 - __clz(bits));
                                 store(word, bits | (queue == 0 ? 0 : kept(word)));
                             });
        }
    }

    // Keeps the `capacity` routes of highest priority. NOTE: DeepSpeed takes the largest values of
    // a whole column, in which tokens that are not routed to the expert have priority 0. Routes of
    // priority 0 compete with these tokens, and the lower index wins.
    __device__ void admit_by_priority(int capacity) {
        if (capacity == 0) {
            admit_in_order(0);
            return;
        }
        const auto is_positive = [](uint32_t key) { return key > kOrderedZero; };
        const int positive = scan([&](int64_t word) { return count(word, is_positive); },
                                  [](int64_t, int) {});
        if (positive < capacity) {
            const int room = capacity - positive;
            admit_if(is_positive, [&](int64_t token, uint32_t key, int positive_before) {
                return is_positive(key) || token - positive_before < room;
            });
        } else {
            int num_ties = capacity;
            const uint32_t threshold = select_key(num_ties);
            admit_if([&](uint32_t key) { return key == threshold; },
                     [&](int64_t, uint32_t key, int ties_before) {
                         return key > threshold || (key == threshold && ties_before < num_ties);
                     });
        }
    }

private:
    // Returns the priority of a token that chose the expert.
    __device__ uint32_t read_key(int64_t token) const {
        const int64_t entry = token * p_.num_experts + expert_;
        if (p_.top_k > 1) return ordered(p_.probs[entry]);
        return p_.priority == nullptr ? kOrderedZero + 1 : ordered(p_.priority[entry]);
    }

    template <typename Counted>
    __device__ int count(int64_t word, Counted is_counted) const {
        int sum = 0;
        for_each(word, [&](int64_t, uint32_t key) { sum += is_counted(key); });
        return sum;
    }

    // Keeps the routes for which is_kept(token, key, number of earlier routes that
    // is_counted(key)).
    template <typename Counted, typename Kept>
    __device__ void admit_if(Counted is_counted, Kept is_kept) {
        scan([&](int64_t word) { return count(word, is_counted); },
             [&](int64_t word, int before) {
                 uint32_t result = 0;
                 for_each(word, [&](int64_t token, uint32_t key) {
                     if (is_kept(token, key, before)) result |= 1u << token % kTokensPerWord;
                     before += is_counted(key);
                 });
                 store(word, result);
             });
    }

    const GateParams& p_;
    int expert_;
    int64_t words_;
    Storage& smem_;
};

__global__ void __launch_bounds__(kAdmitThreads, 2) admit_routes_kernel(GateParams p) {
    begin_kernel();
    __shared__ Admission::Storage smem;
    const int expert = blockIdx.x;
    const int64_t words = num_words(p.num_tokens);
    Admission admission(p, expert, smem);

    const bool has_limit = p.capacity >= 0, in_order = !has_limit || p.top_k == 2;
    int counts[2] = {0, 0};
    if (in_order) {
        for (int queue = 0; queue < num_queues(p.top_k); ++queue) {
            counts[queue] = admission.scan(
                [&](int64_t word) { return __popc(admission.routed(queue, word)); },
                [](int64_t, int) {});
        }
    } else {
        counts[0] = admission.read_keys();
    }
    const int count = counts[0] + counts[1];
    float sum = 0.0f;
    for (int64_t word = threadIdx.x; word < words; word += kAdmitThreads) {
        sum += p.prob_sums[word * p.num_experts + expert];
    }
    __syncthreads();
    sum = Admission::Reduce(smem.reduce).Sum(sum);

    if (in_order) {
        admission.admit_in_order(has_limit ? min(p.capacity, int64_t{count}) : count);
    } else {
        admission.admit_by_priority(min(p.capacity, p.num_tokens));
    }
    const int num_kept = admission.scan(
        [&](int64_t word) { return __popc(admission.kept(word)); },
        [&](int64_t word, int before) { p.before[expert * words + word] = before; });
    if (threadIdx.x == 0) {
        const float num_tokens = p.num_tokens;
        const float scale = p.top_k > 2 ? float(p.num_experts) / p.top_k : float(p.num_experts);
        p.mean_probs[expert] = sum / num_tokens;
        p.loss_share[expert] = scale * (counts[0] / num_tokens) / num_tokens;
        p.exp_counts[expert] = count;
        p.kept_counts[expert] = num_kept;
    }
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_routes_kernel(GateParams p, int tokens_per_cta) {
    begin_kernel();
    __shared__ float smem_sum[kFinishThreads];
    const int64_t first_token = int64_t{blockIdx.x} * tokens_per_cta;
    const int num_tokens = min(int64_t{tokens_per_cta}, p.num_tokens - first_token);
    const int64_t first_route = first_token * p.top_k, num_routes = num_tokens * p.top_k;
    const int64_t words = num_words(p.num_tokens);
    for (int64_t i = threadIdx.x; i < num_routes; i += kFinishThreads) {
        const int64_t route = first_route + i, token = first_token + i / p.top_k;
        const int expert = p.chosen[route];
        int slot = -1;  // among the expert's kept routes; -1 = dropped
        float weight = 0.0f;
        if (expert >= 0) {
            const int64_t word = expert * words + token / kTokensPerWord;
            const uint32_t bits = p.kept[word], bit = 1u << token % kTokensPerWord;
            const int before = p.before[word];
            // NOTE: multiplied, so that a dropped NaN stays a NaN, as in DeepSpeed.
            weight = p.probs[token * p.num_experts + expert] * (bits & bit ? 1.0f : 0.0f);
            if (bits & bit) slot = before + __popc(bits & (bit - 1));
        }
        p.topk_ids[route] = slot < 0 ? -1 : expert;
        p.slot_in_expert[route] = slot;
        p.topk_weights[route] = weight;
    }
    if (p.top_k > 1) {
        __syncthreads();
        if (threadIdx.x < num_tokens) {
            const float* weights = p.topk_weights + first_route + threadIdx.x * p.top_k;
            float sum = 0.0f;
#pragma unroll 8
            for (int k = 0; k < p.top_k; ++k) sum += weights[k];
            smem_sum[threadIdx.x] = sum < kEpsilon ? kEpsilon : sum;
        }
        __syncthreads();
        for (int64_t i = threadIdx.x; i < num_routes; i += kFinishThreads) {
            p.topk_weights[first_route + i] /= smem_sum[i / p.top_k];
        }
    }
    if (blockIdx.x == 0 && threadIdx.x < 32) {
        float loss = 0.0f;
        for (int expert = threadIdx.x; expert < p.num_experts; expert += 32) {
            loss += p.mean_probs[expert] * p.loss_share[expert] * p.num_tokens;
        }
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) loss += __shfl_xor_sync(~0u, loss, lanes);
        if (threadIdx.x == 0) *p.l_aux = loss;
    }
}

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

__global__ void __launch_bounds__(kGradWarps * 32) route_backward_kernel(GateGradParams p) {
    begin_kernel();
    const int64_t token = int64_t{blockIdx.x} * kGradWarps + threadIdx.x / 32;
    if (token >= p.num_tokens) return;
    const int lane = threadIdx.x % 32;
    const float* probs = p.probs + token * p.num_experts;
    const int64_t* ids = p.topk_ids + token * p.top_k;
    const float* grad_weights = p.grad_weights + token * p.top_k;

    float kept_sum = 0.0f, dot = 0.0f;
    for (int k = lane; k < p.top_k; k += 32) {
        if (ids[k] < 0) continue;
        kept_sum += probs[ids[k]];
        dot += grad_weights[k] * probs[ids[k]];
    }
    kept_sum = warp_sum(kept_sum), dot = warp_sum(dot);
    const bool is_clamped = kept_sum < kEpsilon;
    const float divisor = p.top_k == 1 ? 1.0f : is_clamped ? kEpsilon : kept_sum;
    const float mean = p.top_k == 1 || is_clamped ? 0.0f : dot / divisor;
    // Terms of p times the gradient of p: one per expert from the loss, one per kept route from its
    // weight.
    const auto from_loss = [&](int expert) {
        return probs[expert] * *p.grad_l_aux * p.loss_share[expert];
    };
    const auto from_weight = [&](int k) {
        return ids[k] < 0 ? 0.0f : probs[ids[k]] * (grad_weights[k] - mean) / divisor;
    };
    float sum = 0.0f;
    for (int expert = lane; expert < p.num_experts; expert += 32) sum += from_loss(expert);
    for (int k = lane; k < p.top_k; k += 32) sum += from_weight(k);
    sum = warp_sum(sum);
    float* grad_logits = p.grad_logits + token * p.num_experts;
    for (int expert = lane; expert < p.num_experts; expert += 32) {
        grad_logits[expert] = from_loss(expert) - probs[expert] * sum;
    }
    __syncwarp();
    for (int k = lane; k < p.top_k; k += 32) {
        if (ids[k] >= 0) grad_logits[ids[k]] += from_weight(k);
    }
}

constexpr int64_t kWeightsPerWord = sizeof(uint4) / sizeof(__nv_bfloat16);

__global__ void split_grad_kernel(SplitGradParams p) {
    begin_kernel();
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    const auto* weight = static_cast<const uint4*>(p.weight);
    const int64_t num_words = p.num_cols * p.hidden / kWeightsPerWord;
    for (int64_t word = i; word < num_words; word += int64_t{gridDim.x} * blockDim.x) {
        auto* doubled = static_cast<uint4*>(p.doubled_weight);
        doubled[word] = doubled[word + num_words] = weight[word];
    }
    if (i >= p.num_rows * p.num_cols) return;
    const float value = p.in[i];
    const __nv_bfloat16 high = __float2bfloat16_rn(value);
    auto* row = static_cast<__nv_bfloat16*>(p.terms) + i / p.num_cols * 2 * p.num_cols +
                i % p.num_cols;
    row[0] = high;
    row[p.num_cols] = __float2bfloat16_rn(value - __bfloat162float(high));
}

__global__ void add_terms_kernel(const float* terms, __nv_bfloat16* sum, int64_t size) {
    begin_kernel();
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i < size) sum[i] = __float2bfloat16_rn(terms[i] + terms[size + i]);
}

}  // namespace comet_ds
