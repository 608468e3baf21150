// SPDX-License-Identifier: Apache-2.0
// Launchers of gate.cuh.
#include "gate/gate.cuh"

#include <algorithm>
#include <type_traits>

#include "host/launch.h"

namespace comet_ds {

namespace {

// Assigns the scratch fields one after the other. Returns the bytes they take.
int64_t lay_out(GateParams& p, void* scratch) {
    const int64_t words = (p.num_tokens + kTokensPerWord - 1) / kTokensPerWord;
    const int64_t queues = p.top_k == 2 ? 2 : 1;
    auto* next = static_cast<uint32_t*>(scratch);
    const auto take = [&](auto*& field, int64_t size) {
        field = reinterpret_cast<std::remove_reference_t<decltype(field)>>(next);
        next += size;
    };
    take(p.chosen, p.num_tokens * p.top_k);
    take(p.routed, queues * p.num_experts * words);
    take(p.kept, p.num_experts * words);
    take(p.before, p.num_experts * words);
    take(p.prob_sums, words * p.num_experts);
    take(p.mean_probs, p.num_experts);
    return (next - static_cast<uint32_t*>(scratch)) * sizeof(uint32_t);
}

// One thread per element.
LaunchShape elementwise(int64_t size) {
    constexpr int kThreads = 256;
    return {unsigned((size + kThreads - 1) / kThreads), kThreads};
}

}  // namespace

int64_t gate_scratch_bytes(int64_t num_tokens, int64_t num_experts, int64_t top_k) {
    GateParams params{.num_tokens = num_tokens, .num_experts = num_experts, .top_k = top_k};
    return lay_out(params, nullptr);
}

void route_tokens(GateParams p, void* scratch, cudaStream_t stream) {
    lay_out(p, scratch);
    const int queues = p.top_k == 2 ? 2 : 1;
    const unsigned num_ctas = (p.num_tokens + kTokensPerWord - 1) / kTokensPerWord;
    const int tokens_per_cta = std::max<int64_t>(kFinishThreads / p.top_k, 1);
    const unsigned finish_ctas = (p.num_tokens + tokens_per_cta - 1) / tokens_per_cta;
    const size_t bitmap_bytes = queues * p.num_experts * sizeof(uint32_t);
    const auto run = [&](auto kernel, const LaunchShape& shape, auto... arguments) {
        launch("route_tokens", kernel, shape, stream, p, arguments...);
    };
    const auto select = p.num_experts <= 64    ? select_experts_kernel<2>
                        : p.num_experts <= 128 ? select_experts_kernel<4>
                        : p.num_experts <= 256 ? select_experts_kernel<8>
                                               : select_experts_kernel<0>;
    run(select, {num_ctas, kSelectThreads, bitmap_bytes});
    run(admit_routes_kernel, {unsigned(p.num_experts), kAdmitThreads});
    run(finish_routes_kernel, {finish_ctas, kFinishThreads}, tokens_per_cta);
}

void route_tokens_backward(const GateGradParams& p, cudaStream_t stream) {
    const unsigned num_ctas = (p.num_tokens + kGradWarps - 1) / kGradWarps;
    launch("route_tokens_backward", route_backward_kernel, {num_ctas, kGradWarps * 32}, stream,
           p);
}

void split_grad(const SplitGradParams& p, cudaStream_t stream) {
    launch("split_grad", split_grad_kernel, elementwise(p.num_rows * p.num_cols), stream, p);
}

void add_terms(const float* terms, void* sum, int64_t size, cudaStream_t stream) {
    launch("add_terms", add_terms_kernel, elementwise(size), stream, terms,
           static_cast<__nv_bfloat16*>(sum), size);
}

}  // namespace comet_ds
