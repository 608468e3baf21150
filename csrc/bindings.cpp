// SPDX-License-Identifier: Apache-2.0
// What Python calls, but for layer_bindings.cpp's. Nothing here needs torch's headers, which take a
// hundred times longer to compile than this file (tensor.h).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "device/tensor_map.h"
#include "moe/combine.h"
#include "moe/gate.h"
#include "moe/gate_logits.h"
#include "moe/layer_call.h"
#include "moe/route_plan.h"
#include "tensor.h"

namespace py = pybind11;

namespace {

using comet_ds::checked_address;
using comet_ds::checked_address_or_null;
using comet_ds::CombineParams;
using comet_ds::DType;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

constexpr int kOperandRows = 64;  // of the boxes of operands

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

// x [T, H] and weight [E, H] bf16, logits [T, E] fp32, written.
void gate_logits(const py::handle& x, const py::handle& weight, const py::handle& logits,
                 int64_t num_tokens, int64_t num_experts, int64_t hidden, uintptr_t stream) {
    const auto& bf16 = comet_ds::bfloat16_dtype();
    const uintptr_t x_at = checked_address("x", x, bf16, {num_tokens, hidden});
    const uintptr_t weight_at = checked_address("weight", weight, bf16, {num_experts, hidden});
    comet_ds::GateLogitsParams params{
        .x = comet_ds::encode_tensor_map({x_at, 1, num_tokens, hidden}, true, kOperandRows),
        .weight =
            comet_ds::encode_tensor_map({weight_at, 1, num_experts, hidden}, true, kOperandRows),
        .logits = pointer<float>(checked_address("logits", logits, comet_ds::float32_dtype(),
                                                 {num_tokens, num_experts})),
        .num_tokens = int(num_tokens),
        .num_experts = int(num_experts),
        .hidden = int(hidden)};
    gate_logits(params, pointer<CUstream_st>(stream));
}

// With [T, E] fp32 in: probs, scores or None, priority or None; used_token [T] uint8 or None.
// Written: topk_ids [T, K] int64, topk_weights [T, K] fp32, ranks [T, K] int32, kept_counts [E]
// int32, exp_counts [E] int64, loss_share [E] fp32, l_aux [] fp32. capacity < 0 keeps all routes.
void route_tokens(const py::handle& probs, const py::handle& scores, const py::handle& priority,
                  const py::handle& used_token, int64_t capacity, int64_t num_tokens,
                  int64_t num_experts, int64_t top_k, const py::handle& topk_ids,
                  const py::handle& topk_weights, const py::handle& ranks,
                  const py::handle& kept_counts, const py::handle& exp_counts,
                  const py::handle& loss_share, const py::handle& l_aux,
                  const py::handle& scratch, uintptr_t stream) {
    using namespace comet_ds;
    const std::vector<int64_t> by_expert{num_tokens, num_experts}, by_route{num_tokens, top_k};
    const auto& fp32 = float32_dtype();
    GateParams params{
        .probs = pointer<float>(checked_address("probs", probs, fp32, by_expert)),
        .scores = pointer<float>(checked_address_or_null("scores", scores, fp32, by_expert)),
        .priority = pointer<float>(checked_address_or_null("priority", priority, fp32, by_expert)),
        .used_token = pointer<uint8_t>(
            checked_address_or_null("used_token", used_token, uint8_dtype(), {num_tokens})),
        .capacity = capacity,
        .num_tokens = num_tokens,
        .num_experts = num_experts,
        .top_k = top_k,
        .topk_ids = pointer<int64_t>(checked_address("topk_ids", topk_ids, int64_dtype(), by_route)),
        .topk_weights =
            pointer<float>(checked_address("topk_weights", topk_weights, fp32, by_route)),
        .ranks = pointer<int32_t>(checked_address("ranks", ranks, int32_dtype(), by_route)),
        .kept_counts = pointer<int32_t>(
            checked_address("kept_counts", kept_counts, int32_dtype(), {num_experts})),
        .exp_counts = pointer<int64_t>(
            checked_address("exp_counts", exp_counts, int64_dtype(), {num_experts})),
        .loss_share =
            pointer<float>(checked_address("loss_share", loss_share, fp32, {num_experts})),
        .l_aux = pointer<float>(checked_address("l_aux", l_aux, fp32, {}))};
    const int64_t num_bytes = gate_scratch_bytes(num_tokens, num_experts, top_k);
    const uintptr_t room = checked_address("scratch", scratch, uint8_dtype(), {num_bytes});
    route_tokens(params, pointer<void>(room), pointer<CUstream_st>(stream));
}

// probs, grad_logits [T, E], grad_weights [T, K], grad_l_aux [], loss_share [E], all fp32;
// topk_ids [T, K] int64.
void route_tokens_backward(const py::handle& probs, const py::handle& topk_ids,
                           const py::handle& grad_weights, const py::handle& grad_l_aux,
                           const py::handle& loss_share, const py::handle& grad_logits,
                           int64_t num_tokens, int64_t num_experts, int64_t top_k,
                           uintptr_t stream) {
    using namespace comet_ds;
    const std::vector<int64_t> by_expert{num_tokens, num_experts}, by_route{num_tokens, top_k};
    const auto& fp32 = float32_dtype();
    const GateGradParams params{
        .probs = pointer<float>(checked_address("probs", probs, fp32, by_expert)),
        .topk_ids = pointer<int64_t>(checked_address("topk_ids", topk_ids, int64_dtype(), by_route)),
        .grad_weights =
            pointer<float>(checked_address("grad_weights", grad_weights, fp32, by_route)),
        .grad_l_aux = pointer<float>(checked_address("grad_l_aux", grad_l_aux, fp32, {})),
        .loss_share =
            pointer<float>(checked_address("loss_share", loss_share, fp32, {num_experts})),
        .grad_logits =
            pointer<float>(checked_address("grad_logits", grad_logits, fp32, by_expert)),
        .num_tokens = num_tokens,
        .num_experts = num_experts,
        .top_k = top_k};
    route_tokens_backward(params, pointer<CUstream_st>(stream));
}

// in [R, C] fp32, out [R, 2 C] bf16.
void split_bfloat16(const py::handle& in, const py::handle& out, int64_t num_rows,
                    int64_t num_cols, uintptr_t stream) {
    using namespace comet_ds;
    const uintptr_t from = checked_address("in", in, float32_dtype(), {num_rows, num_cols});
    const uintptr_t to = checked_address("out", out, bfloat16_dtype(), {num_rows, 2 * num_cols});
    comet_ds::split_bfloat16(pointer<float>(from), pointer<void>(to), num_rows, num_cols,
                             pointer<CUstream_st>(stream));
}

// Tensor maps of equally shaped matrices, as bytes to copy to the device.
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
    m.def("gate_logits", &gate_logits);
    m.def("gate_scratch_bytes", &comet_ds::gate_scratch_bytes);
    m.def("route_tokens", &route_tokens);
    m.def("route_tokens_backward", &route_tokens_backward);
    m.def("split_bfloat16", &split_bfloat16);
    m.def("can_plan", &comet_ds::can_plan);
    m.def("tensor_maps", &tensor_maps);
    m.def("set_timeline_room", &comet_ds::set_timeline_room);
    comet_ds::bind_layer_call(m);
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
