// SPDX-License-Identifier: Apache-2.0
// What Python calls. Tensors come as addresses, so that nothing here needs torch's headers, which
// take a hundred times longer to compile than this file; shapes and dtypes are checked in Python.
#include <pybind11/pybind11.h>

#include "moe/combine.h"

namespace {

using comet_ds::CombineParams;
using comet_ds::DType;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void combine_forward(uintptr_t rows, uintptr_t row_of_route, uintptr_t weights, uintptr_t output,
                     int64_t num_tokens, int64_t top_k, int64_t hidden, int dtype,
                     uintptr_t stream) {
    CombineParams params{.rows = pointer<void>(rows),
                         .row_of_route = pointer<int64_t>(row_of_route),
                         .weights = pointer<float>(weights),
                         .output = pointer<void>(output),
                         .num_tokens = num_tokens,
                         .top_k = top_k,
                         .hidden = hidden};
    combine_forward(params, DType{dtype}, pointer<CUstream_st>(stream));
}

void combine_backward(uintptr_t rows, uintptr_t row_of_route, uintptr_t weights, uintptr_t grad,
                      uintptr_t grad_rows, uintptr_t grad_weights, int64_t num_tokens,
                      int64_t top_k, int64_t hidden, int dtype, uintptr_t stream) {
    CombineParams params{.rows = pointer<void>(rows),
                         .row_of_route = pointer<int64_t>(row_of_route),
                         .weights = pointer<float>(weights),
                         .grad = pointer<void>(grad),
                         .grad_rows = pointer<void>(grad_rows),
                         .grad_weights = pointer<float>(grad_weights),
                         .num_tokens = num_tokens,
                         .top_k = top_k,
                         .hidden = hidden};
    combine_backward(params, DType{dtype}, pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("combine_forward", &combine_forward);
    m.def("combine_backward", &combine_backward);
}
