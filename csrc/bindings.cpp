// SPDX-License-Identifier: Apache-2.0
// The Python module. Nothing here needs torch's headers, which take a hundred times longer to
// compile than this file; bindings that need them have files of their own (bindings.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "host/layer_call.h"
#include "host/tensor_map.h"
#include "rows/combine.h"
#include "rows/route_plan.h"

namespace py = pybind11;

namespace {

using comet_ds::CombineParams;
using comet_ds::DType;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

constexpr int kOperandRows = 64;  // of a GEMM operand's TMA box

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

void plan_routes(uintptr_t topk_ids, uintptr_t segment_of_expert, uintptr_t row_of_route,
                 uintptr_t token_of_row, uintptr_t segment_counts, uintptr_t scratch,
                 int64_t num_tokens, int64_t top_k, int64_t num_parts, int64_t num_experts,
                 uintptr_t stream) {
    comet_ds::RoutePlanParams params{.topk_ids = pointer<int64_t>(topk_ids),
                                     .segment_of_expert = pointer<int64_t>(segment_of_expert),
                                     .row_of_route = pointer<int64_t>(row_of_route),
                                     .token_of_row = pointer<int64_t>(token_of_row),
                                     .segment_counts = pointer<int64_t>(segment_counts),
                                     .scratch = pointer<int32_t>(scratch),
                                     .num_tokens = num_tokens,
                                     .top_k = top_k,
                                     .num_parts = num_parts,
                                     .num_experts = num_experts};
    plan_routes(params, pointer<CUstream_st>(stream));
}

void order_arrival(uintptr_t counts, int64_t counts_stride, uintptr_t order, uintptr_t inverse,
                   uintptr_t offsets, int64_t num_rows, int64_t num_ranks, int64_t num_experts,
                   uintptr_t stream) {
    comet_ds::ArrivalParams params{.counts = pointer<int64_t>(counts),
                                   .counts_stride = counts_stride,
                                   .order = pointer<int64_t>(order),
                                   .inverse = pointer<int64_t>(inverse),
                                   .offsets = pointer<int32_t>(offsets),
                                   .num_rows = num_rows,
                                   .num_ranks = num_ranks,
                                   .num_experts = num_experts};
    order_arrival(params, pointer<CUstream_st>(stream));
}

// Returns the tensor maps of matrices of one shape, as bytes to copy to the device.
py::bytes tensor_maps(const std::vector<uintptr_t>& addresses, int64_t rows, int64_t cols,
                      bool is_bfloat16) {
    std::vector<CUtensorMap> maps;
    for (const uintptr_t address : addresses) {
        maps.push_back(comet_ds::encode_tensor_map({address, 1, rows, cols}, is_bfloat16,
                                                   kOperandRows));
    }
    return {reinterpret_cast<const char*>(maps.data()), maps.size() * sizeof(CUtensorMap)};
}

}  // namespace

#ifndef COMET_FINGERPRINT
#define COMET_FINGERPRINT ""
#endif

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.attr("fingerprint") = COMET_FINGERPRINT;
    m.def("combine_forward", &combine_forward);
    m.def("combine_backward", &combine_backward);
    m.def("plan_routes", &plan_routes);
    m.def("order_arrival", &order_arrival);
    m.def("can_plan", &comet_ds::can_plan);
    m.def("tensor_maps", &tensor_maps);
    m.def("set_timeline_room", &comet_ds::set_timeline_room);
    comet_ds::bind_gate(m);
    comet_ds::bind_layer_call(m);
    comet_ds::bind_experts(m);
    comet_ds::bind_module_watch(m);
    m.attr("has_timeline") = comet_ds::kTimeline;
    m.attr("record_lists") = comet_ds::kRecordLists;
    m.attr("max_records") = comet_ds::kMaxRecords;
    m.attr("routes_per_block") = comet_ds::kRoutesPerBlock;
    m.attr("max_segments") = comet_ds::kMaxSegments;
    m.attr("row_block") = comet_ds::kRowBlock;
    m.attr("max_ranks") = comet_ds::kMaxRanks;
    m.attr("max_top_k") = comet_ds::kMaxTopK;
}
