// SPDX-License-Identifier: Apache-2.0
// Launchers of exchange.cuh.
#include "exchange.cuh"

#include <algorithm>
#include <type_traits>

#include "device/launch.h"

namespace comet_ds {
namespace {

// Calls `launch` with a value of the element type and whether sums are weighted.
template <typename F>
void specialise(DType dtype, bool is_weighted, const F& launch) {
    const auto with_type = [&](auto element) {
        is_weighted ? launch(element, std::true_type{}) : launch(element, std::false_type{});
    };
    dtype == DType::kBFloat16 ? with_type(__nv_bfloat16{}) : with_type(__half{});
}

}  // namespace

void publish(const CopyParams& p, cudaStream_t stream) {
    constexpr int kThreads = 256, kMaxBlocks = 1056;
    int64_t num_vectors = 1;
    for (int i = 0; i < p.num_copies; ++i) num_vectors += p.num_bytes[i] / sizeof(uint4);
    const int num_blocks = std::min<int64_t>((num_vectors + kThreads - 1) / kThreads, kMaxBlocks);
    publish_kernel<<<num_blocks, kThreads, 0, stream>>>(p);
    check_launch("publish");
}

void meet(const MeetParams& params, cudaStream_t stream) {
    meet_kernel<<<1, kMaxRanks, 0, stream>>>(params);
    check_launch("meet");
}

void push_sums(const Communication& c, bool is_weighted, int num_sms, cudaStream_t stream) {
    specialise(c.exchange.dtype, is_weighted, [&](auto element, auto weighted) {
        using T = decltype(element);
        constexpr int kSmemBytes = kPushWarps * sizeof(WidePushRing<T>);
        const auto kernel = push_sums_kernel<T, weighted.value>;
        const auto kSmem = cudaFuncAttributeMaxDynamicSharedMemorySize;
        check(cudaFuncSetAttribute(kernel, kSmem, kSmemBytes), "push_sums");
        kernel<<<num_sms, kPushWarps * 32, kSmemBytes, stream>>>(c);
    });
    check_launch("push_sums");
}

void sum_partials(const ExchangeParams& p, const void* rows, bool is_weighted, void* output,
                  cudaStream_t stream) {
    const int num_tokens = p.sources.source[p.sources.rank].num_tokens;
    if (num_tokens == 0) return;
    specialise(p.dtype, is_weighted, [&](auto element, auto weighted) {
        using T = decltype(element);
        sum_partials_kernel<T, weighted.value><<<num_tokens, kSumThreads, 0, stream>>>(
            p, static_cast<const T*>(rows), static_cast<T*>(output));
    });
    check_launch("sum_partials");
}

}  // namespace comet_ds
