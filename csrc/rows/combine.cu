// SPDX-License-Identifier: Apache-2.0
// Launchers of combine.cuh. The vector width follows from alignment; one instantiation per dtype.
#include "rows/combine.cuh"

#include <initializer_list>

#include "host/launch.h"

namespace comet_ds {
namespace {

template <typename T>
bool can_vectorize(const CombineParams& p) {
    uintptr_t bits = p.hidden * sizeof(T);
    for (const void* pointer : std::initializer_list<const void*>{
             p.rows, p.output, p.grad, p.grad_rows}) {
        bits |= reinterpret_cast<uintptr_t>(pointer);
    }
    return bits % kVectorBytes == 0;
}

template <typename T, int kSize>
void launch_forward(const CombineParams& p, cudaStream_t stream) {
    auto* kernel = p.weights ? combine_forward_kernel<T, kSize, true>
                             : combine_forward_kernel<T, kSize, false>;
    launch("combine", kernel, {unsigned(p.num_tokens), kForwardThreads}, stream, p);
}

template <typename T, int kSize>
void launch_backward(const CombineParams& p, cudaStream_t stream) {
    const unsigned num_ctas = (p.num_tokens * p.top_k + kWarpsPerCta - 1) / kWarpsPerCta;
    launch("combine", combine_backward_kernel<T, kSize>, {num_ctas, kWarpsPerCta * 32}, stream,
           p);
}

template <typename T>
void launch_typed(const CombineParams& p, bool is_forward, cudaStream_t stream) {
    constexpr int kWide = kVectorBytes / sizeof(T);
    const bool is_wide = can_vectorize<T>(p);
    if (is_forward) {
        is_wide ? launch_forward<T, kWide>(p, stream) : launch_forward<T, 1>(p, stream);
    } else {
        is_wide ? launch_backward<T, kWide>(p, stream) : launch_backward<T, 1>(p, stream);
    }
}

void launch_dtype(const CombineParams& p, DType dtype, bool is_forward, cudaStream_t stream) {
    if (p.num_tokens == 0) return;
    switch (dtype) {
        case DType::kFloat32: launch_typed<float>(p, is_forward, stream); break;
        case DType::kFloat16: launch_typed<__half>(p, is_forward, stream); break;
        case DType::kBFloat16: launch_typed<__nv_bfloat16>(p, is_forward, stream); break;
    }
}

}  // namespace

void combine_forward(const CombineParams& params, DType dtype, cudaStream_t stream) {
    launch_dtype(params, dtype, true, stream);
}

void combine_backward(const CombineParams& params, DType dtype, cudaStream_t stream) {
    launch_dtype(params, dtype, false, stream);
}

}  // namespace comet_ds
