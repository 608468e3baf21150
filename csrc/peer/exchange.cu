// SPDX-License-Identifier: Apache-2.0
// Launchers of exchange.cuh.
#include "peer/exchange.cuh"

#include <algorithm>
#include <type_traits>

#include "host/launch.h"

namespace comet_ds {
namespace {

// Calls run(a value of the element type, whether sums are weighted as a constant).
template <typename F>
void specialise(DType dtype, bool is_weighted, const F& run) {
    const auto with_type = [&](auto element) {
        is_weighted ? run(element, std::true_type{}) : run(element, std::false_type{});
    };
    dtype == DType::kBFloat16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}

}  // namespace

void publish(const CopyParams& p, cudaStream_t stream) {
    constexpr int kThreads = 256, kMaxCtas = 1056;  // 8 CTAs on each of an H200's 132 SMs
    int64_t num_vectors = 1;
    for (int i = 0; i < p.num_copies; ++i) num_vectors += p.num_bytes[i] / sizeof(uint4);
    const unsigned num_ctas =
        std::min<int64_t>((num_vectors + kThreads - 1) / kThreads, kMaxCtas);
    launch("publish", publish_kernel, {num_ctas, kThreads}, stream, p);
}

void push_by_copy_engine(const void* from, void* to, int64_t num_bytes, cudaStream_t stream) {
    check(cudaMemcpyAsync(to, from, num_bytes, cudaMemcpyDefault, stream), "push_by_copy_engine");
}

void sync_ranks(const RankBarrierParams& params, cudaStream_t stream) {
    launch("sync_ranks", rank_barrier_kernel, {1, kMaxRanks}, stream, params);
}

void push_sums(const Communication& c, bool is_weighted, int num_sms, cudaStream_t stream) {
    specialise(c.exchange.dtype, is_weighted, [&](auto element, auto weighted) {
        using T = decltype(element);
        constexpr size_t kSmemBytes = kPushWarps * sizeof(PushRing<T>);
        launch("push_sums", push_sums_kernel<T, weighted.value>,
               {unsigned(num_sms), kPushWarps * 32, kSmemBytes}, stream, c);
    });
}

void sum_partials(const ExchangeParams& p, const void* rows, bool is_weighted, void* output,
                  cudaStream_t stream) {
    const unsigned num_tokens = p.sources.source[p.sources.rank].num_tokens;
    if (num_tokens == 0) return;
    specialise(p.dtype, is_weighted, [&](auto element, auto weighted) {
        using T = decltype(element);
        launch("sum_partials", sum_partials_kernel<T, weighted.value>, {num_tokens, kSumThreads},
               stream, p, static_cast<const T*>(rows), static_cast<T*>(output));
    });
}

}  // namespace comet_ds
