// SPDX-License-Identifier: Apache-2.0
// What Python calls. Tensors come as addresses, so that nothing here needs torch's headers, which
// take a hundred times longer to compile than this file; shapes and dtypes are checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

#include "device/tensor_map.h"
#include "moe/combine.h"
#include "moe/dispatch.h"
#include "moe/exchange.h"
#include "moe/expert_gemm.h"
#include "moe/gate.h"
#include "moe/gate_logits.h"
#include "moe/route_plan.h"

namespace py = pybind11;

namespace {

using comet_ds::CombineParams;
using comet_ds::DType;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Rows of the boxes of operands, and of what epilogues read and write.
constexpr int kOperandRows = 64, kResultRows = 16;

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

void gate_logits(uintptr_t x, uintptr_t weight, uintptr_t logits, int64_t num_tokens,
                 int64_t num_experts, int64_t hidden, uintptr_t stream) {
    comet_ds::GateLogitsParams params{
        .x = comet_ds::encode_tensor_map({x, 1, num_tokens, hidden}, true, kOperandRows),
        .weight = comet_ds::encode_tensor_map({weight, 1, num_experts, hidden}, true, kOperandRows),
        .logits = pointer<float>(logits),
        .num_tokens = int(num_tokens),
        .num_experts = int(num_experts),
        .hidden = int(hidden)};
    gate_logits(params, pointer<CUstream_st>(stream));
}

void route_tokens(uintptr_t probs, uintptr_t scores, uintptr_t priority, uintptr_t used_token,
                  int64_t capacity, int64_t num_tokens, int64_t num_experts, int64_t top_k,
                  uintptr_t topk_ids, uintptr_t topk_weights, uintptr_t ranks,
                  uintptr_t kept_counts, uintptr_t exp_counts, uintptr_t loss_share,
                  uintptr_t l_aux, uintptr_t scratch, uintptr_t stream) {
    comet_ds::GateParams params{.probs = pointer<float>(probs),
                                .scores = pointer<float>(scores),
                                .priority = pointer<float>(priority),
                                .used_token = pointer<uint8_t>(used_token),
                                .capacity = capacity,
                                .num_tokens = num_tokens,
                                .num_experts = num_experts,
                                .top_k = top_k,
                                .topk_ids = pointer<int64_t>(topk_ids),
                                .topk_weights = pointer<float>(topk_weights),
                                .ranks = pointer<int32_t>(ranks),
                                .kept_counts = pointer<int32_t>(kept_counts),
                                .exp_counts = pointer<int64_t>(exp_counts),
                                .loss_share = pointer<float>(loss_share),
                                .l_aux = pointer<float>(l_aux)};
    route_tokens(params, pointer<void>(scratch), pointer<CUstream_st>(stream));
}

void route_tokens_backward(uintptr_t probs, uintptr_t topk_ids, uintptr_t grad_weights,
                           uintptr_t grad_l_aux, uintptr_t loss_share, uintptr_t grad_logits,
                           int64_t num_tokens, int64_t num_experts, int64_t top_k,
                           uintptr_t stream) {
    const comet_ds::GateGradParams params{.probs = pointer<float>(probs),
                                          .topk_ids = pointer<int64_t>(topk_ids),
                                          .grad_weights = pointer<float>(grad_weights),
                                          .grad_l_aux = pointer<float>(grad_l_aux),
                                          .loss_share = pointer<float>(loss_share),
                                          .grad_logits = pointer<float>(grad_logits),
                                          .num_tokens = num_tokens,
                                          .num_experts = num_experts,
                                          .top_k = top_k};
    route_tokens_backward(params, pointer<CUstream_st>(stream));
}

void split_bfloat16(uintptr_t in, uintptr_t out, int64_t num_rows, int64_t num_cols,
                    uintptr_t stream) {
    comet_ds::split_bfloat16(pointer<float>(in), pointer<void>(out), num_rows, num_cols,
                             pointer<CUstream_st>(stream));
}

// Of every rank the addresses of topk_ids, topk_weights, ranks, kept_counts, tokens, slots and
// grad_weights; then num_tokens.
comet_ds::Sources make_sources(const std::vector<std::array<int64_t, 8>>& ranks, int rank) {
    if (ranks.size() > comet_ds::kMaxRanks) throw std::invalid_argument("too many ranks");
    comet_ds::Sources sources{.rank = rank, .num_ranks = int(ranks.size())};
    int64_t first_token = 0;
    for (size_t i = 0; i < ranks.size(); ++i) {
        const auto& f = ranks[i];
        sources.source[i] = {.topk_ids = pointer<int64_t>(f[0]),
                             .topk_weights = pointer<float>(f[1]),
                             .ranks = pointer<int32_t>(f[2]),
                             .kept_counts = pointer<int32_t>(f[3]),
                             .tokens = pointer<void>(f[4]),
                             .slots = pointer<void>(f[5]),
                             .grad_weights = pointer<float>(f[6]),
                             .num_tokens = f[7],
                             .first_token = first_token};
        first_token += f[7];
    }
    return sources;
}

// Addresses of row_of_route, token_of_row, row_weights, expert_offsets, block_order,
// expert_order, remote_begin, remote_rows, topk_ids, route_weights, peers; then num_tokens, top_k,
// num_experts, max_rows, and num_split of every order.
using PlanFields = std::vector<int64_t>;

comet_ds::RowPlan row_plan(const PlanFields& f) {
    constexpr size_t kNumFixed = 15;
    const size_t num_orders = f.size() - kNumFixed;
    if (f.size() < kNumFixed || num_orders > comet_ds::kMaxOrders) {
        throw std::invalid_argument("not the fields of a plan");
    }
    comet_ds::RowPlan plan{.row_of_route = pointer<int64_t>(f[0]),
            .token_of_row = pointer<int32_t>(f[1]),
            .row_weights = pointer<float>(f[2]),
            .expert_offsets = pointer<int32_t>(f[3]),
            .block_order = pointer<int32_t>(f[4]),
            .expert_order = pointer<int32_t>(f[5]),
            .remote_begin = pointer<int32_t>(f[6]),
            .remote_rows = pointer<int32_t>(f[7]),
            .topk_ids = pointer<int64_t>(f[8]),
            .route_weights = pointer<float>(f[9]),
            .peers = pointer<uint32_t>(f[10]),
            .num_tokens = f[11],
            .top_k = f[12],
            .num_experts = f[13],
            .max_rows = f[14],
            .num_orders = int(num_orders)};
    std::copy(f.begin() + kNumFixed, f.end(), plan.num_split);
    return plan;
}

void plan_and_dispatch(const comet_ds::Sources& sources, const PlanFields& plan, uintptr_t rows,
                       int64_t row_bytes, uintptr_t counters, int64_t num_counters,
                       uintptr_t stream) {
    comet_ds::plan_and_dispatch(sources, row_plan(plan), pointer<void>(rows), row_bytes,
                                pointer<uint32_t>(counters), num_counters,
                                pointer<CUstream_st>(stream));
}

void dispatch_rows(const comet_ds::Sources& sources, const PlanFields& plan, uintptr_t published,
                   uintptr_t rows, int64_t row_bytes, uintptr_t counters, int64_t num_counters,
                   uintptr_t stream) {
    comet_ds::dispatch_rows(sources, row_plan(plan), pointer<void>(published), pointer<void>(rows),
                            row_bytes, pointer<uint32_t>(counters), num_counters,
                            pointer<CUstream_st>(stream));
}

void dispatch_other_rows(const comet_ds::Sources& sources, const PlanFields& plan,
                         uintptr_t rows, int64_t row_bytes, uintptr_t stream) {
    comet_ds::dispatch_other_rows(sources, row_plan(plan), pointer<void>(rows), row_bytes,
                                  pointer<CUstream_st>(stream));
}

void sum_row_dots(const comet_ds::Sources& sources, const PlanFields& plan, uintptr_t row_dots,
                  int64_t num_tiles, uintptr_t grad_rows, uintptr_t bias, int64_t hidden,
                  bool is_bfloat16, uintptr_t stream) {
    comet_ds::sum_row_dots(sources, row_plan(plan), pointer<float>(row_dots), num_tiles,
                           pointer<void>(grad_rows), pointer<const void*>(bias), hidden,
                           is_bfloat16, pointer<CUstream_st>(stream));
}

// Address to copy from, address to copy to, bytes.
void publish(const std::vector<std::array<int64_t, 3>>& copies, uintptr_t stream) {
    if (copies.size() > comet_ds::kMaxCopies) throw std::invalid_argument("too many copies");
    comet_ds::CopyParams params{.num_copies = int(copies.size())};
    for (size_t i = 0; i < copies.size(); ++i) {
        params.from[i] = pointer<void>(copies[i][0]);
        params.to[i] = pointer<void>(copies[i][1]);
        params.num_bytes[i] = copies[i][2];
    }
    comet_ds::publish(params, pointer<CUstream_st>(stream));
}

void send(uintptr_t from, uintptr_t to, int64_t num_bytes, uintptr_t stream) {
    comet_ds::send(pointer<void>(from), pointer<void>(to), num_bytes,
                   pointer<CUstream_st>(stream));
}

void meet(const std::vector<uintptr_t>& flags, int rank, uintptr_t epoch, uintptr_t late,
          uint64_t timeout_ns, int what, uintptr_t exposure, uintptr_t stream) {
    if (flags.size() > comet_ds::kMaxRanks) throw std::invalid_argument("too many ranks");
    comet_ds::MeetParams params{.epoch = pointer<uint64_t>(epoch),
                                .late = pointer<comet_ds::LateWait>(late),
                                .timeout_ns = timeout_ns,
                                .what = comet_ds::Meeting{what},
                                .exposure = pointer<comet_ds::Exposure>(exposure)};
    params.mailboxes.rank = rank;
    params.mailboxes.num_ranks = flags.size();
    for (size_t i = 0; i < flags.size(); ++i) {
        params.mailboxes.flags[i] = pointer<uint64_t>(flags[i]);
    }
    comet_ds::meet(params, pointer<CUstream_st>(stream));
}

comet_ds::ExchangeParams exchange_params(const comet_ds::Sources& sources, const PlanFields& plan,
                                         int64_t hidden, int dtype) {
    return {.sources = sources, .plan = row_plan(plan), .hidden = hidden, .dtype = DType{dtype}};
}

comet_ds::Communication make_communication(const comet_ds::Sources& sources,
                                           const PlanFields& plan, int64_t hidden, int dtype,
                                           uintptr_t rows, int num_ctas, uintptr_t remote_begin,
                                           uintptr_t counters, uint64_t timeout_ns,
                                           uintptr_t late, uintptr_t exposure) {
    const auto exchange = exchange_params(sources, plan, hidden, dtype);
    if (exchange.plan.top_k > comet_ds::kMaxTopK) {
        throw std::invalid_argument("too many routes per token");
    }
    return {.exchange = exchange,
            .rows = pointer<void>(rows),
            .num_ctas = num_ctas,
            .remote_begin = pointer<int32_t>(remote_begin),
            .counters = pointer<comet_ds::Counters>(counters),
            .timeout_ns = timeout_ns,
            .late = pointer<comet_ds::LateWait>(late),
            .exposure = pointer<comet_ds::Exposure>(exposure)};
}

void push_sums(const comet_ds::Communication& communication, bool is_weighted, int num_sms,
               uintptr_t stream) {
    comet_ds::push_sums(communication, is_weighted, num_sms, pointer<CUstream_st>(stream));
}

void sum_partials(const comet_ds::Sources& sources, const PlanFields& plan, int64_t hidden,
                  int dtype, uintptr_t rows, bool is_weighted, uintptr_t output,
                  uintptr_t stream) {
    comet_ds::sum_partials(exchange_params(sources, plan, hidden, dtype), pointer<void>(rows),
                           is_weighted, pointer<void>(output), pointer<CUstream_st>(stream));
}

void sum_expert_rows(const PlanFields& plan, uintptr_t rows, bool is_weighted, int64_t cols,
                     bool is_bfloat16, uintptr_t grad_bias, uintptr_t stream) {
    comet_ds::sum_expert_rows(row_plan(plan), pointer<void>(rows), is_weighted, cols, is_bfloat16,
                              pointer<void>(grad_bias), pointer<CUstream_st>(stream));
}

using Matrices = std::vector<std::array<int64_t, 4>>;  // address, batch, rows, cols

void encode(CUtensorMap* maps, const Matrices& matrices, bool is_bfloat16, int box_rows) {
    for (const auto& [address, batch, rows, cols] : matrices) {
        *maps++ = comet_ds::encode_tensor_map({uintptr_t(address), batch, rows, cols}, is_bfloat16,
                                              box_rows);
    }
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

// Where launches to come write their records, one after the other, as long as there is room.
struct Timeline {
    uintptr_t next = 0, end = 0;

    comet_ds::Record* take(int num_ctas) {
        const size_t num_bytes = size_t(num_ctas) * kRecordBytesCta;
        if (!comet_ds::kTimeline || end - next < num_bytes) return nullptr;
        next += num_bytes;
        return pointer<comet_ds::Record>(next - num_bytes);
    }

    static constexpr size_t kRecordBytesCta =
        comet_ds::kRecordLists * comet_ds::kMaxRecords * sizeof(comet_ds::Record);
} timeline;

// Returns how many bytes were left of the room before.
size_t record(uintptr_t records, size_t num_bytes) {
    const size_t left = timeline.end - timeline.next;
    timeline = {records, records + num_bytes};
    return left;
}

void expert_gemm(int pass, bool is_bfloat16, bool is_gated, int activation, const Matrices& a,
                 const Matrices& b, const Matrices& out, std::array<uintptr_t, 2> weights,
                 std::array<uintptr_t, 2> bias, uintptr_t expert_offsets,
                 uintptr_t block_order, uintptr_t expert_order, uintptr_t row_weights,
                 uintptr_t row_dots, int num_experts, int max_rows, int m, int n, int k,
                 bool save_pre, int num_sms, const comet_ds::Communication& communication,
                 uintptr_t stream) {
    const comet_ds::ExpertGemmVariant variant{comet_ds::Pass{pass}, is_bfloat16, is_gated,
                                              comet_ds::Activation{activation}};
    comet_ds::ExpertGemmParams params{};
    encode(params.a, a, is_bfloat16, kOperandRows);
    if (variant.pass == comet_ds::Pass::kDownGrad) {
        for (size_t i = 0; i < b.size(); ++i) params.pre[i] = pointer<void>(b[i][0]);
        for (size_t i = 0; i < out.size(); ++i) params.results[i] = pointer<void>(out[i][0]);
    } else {
        encode(&params.b, b, is_bfloat16, kOperandRows);
        encode(params.out, out, is_bfloat16, kResultRows);
    }
    for (int i = 0; i < 2; ++i) {
        params.weights[i] = pointer<CUtensorMap>(weights[i]);
        params.bias[i] = pointer<const void*>(bias[i]);
    }
    params.expert_offsets = pointer<int>(expert_offsets);
    params.block_order = pointer<int>(block_order);
    params.expert_order = pointer<int>(expert_order);
    params.row_weights = pointer<float>(row_weights);
    params.row_dots = pointer<float>(row_dots);
    params.num_experts = num_experts;
    params.max_rows = max_rows;
    params.m = m;
    params.n = n;
    params.k = k;
    params.save_pre = save_pre;
    params.records = timeline.take(num_sms);
    expert_gemm(params, variant, communication, num_sms, pointer<CUstream_st>(stream));
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
    m.def("plan_and_dispatch", &plan_and_dispatch);
    m.def("dispatch_rows", &dispatch_rows);
    m.def("dispatch_other_rows", &dispatch_other_rows);
    m.def("sum_row_dots", &sum_row_dots);
    m.def("sum_expert_rows", &sum_expert_rows);
    py::class_<comet_ds::Sources>(m, "Sources").def(py::init(&make_sources));
    m.def("publish", &publish);
    m.def("send", &send);
    m.def("meet", &meet);
    py::class_<comet_ds::Communication>(m, "Communication")
        .def(py::init<>())
        .def(py::init(&make_communication));
    m.def("push_sums", &push_sums);
    m.def("sum_partials", &sum_partials);
    m.def("tensor_maps", &tensor_maps);
    m.def("expert_gemm", &expert_gemm);
    m.def("record", &record);
    m.attr("has_timeline") = comet_ds::kTimeline;
    m.attr("record_lists") = comet_ds::kRecordLists;
    m.attr("max_records") = comet_ds::kMaxRecords;
    m.attr("routes_per_block") = comet_ds::kRoutesPerBlock;
    m.attr("max_segments") = comet_ds::kMaxSegments;
    m.attr("row_block") = comet_ds::kRowBlock;
    m.attr("max_ranks") = comet_ds::kMaxRanks;
    m.attr("max_top_k") = comet_ds::kMaxTopK;
    m.attr("counter_bytes") = sizeof(comet_ds::Counters);
    m.attr("down_grad_tile_cols") = comet_ds::kDownGradTileCols;
}
