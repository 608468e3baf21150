// SPDX-License-Identifier: Apache-2.0
// LayerCall for Python: every tensor by its name, its dtype and shape checked.
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <memory>
#include <string>

#include "autograd/layer_tensors.h"
#include "autograd/tensor.h"
#include "bindings.h"

namespace comet_ds {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <typename T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
    std::vector<T*> found;
    for (const uintptr_t address : addresses) found.push_back(pointer<T>(address));
    return found;
}

using Split = std::array<int, 2>;  // CTAs that communicate, experts that are split
using EventPair = std::array<uintptr_t, 2>;

LaunchEvents launch_events(const EventPair& events) {
    return {pointer<CUevent_st>(events[0]), pointer<CUevent_st>(events[1])};
}

// What a rank reads of another: addresses by the names of Source.
Sources make_sources(const std::vector<std::array<uintptr_t, 7>>& ranks, const LayerSizes& sizes) {
    Sources sources{.rank = sizes.rank, .num_ranks = sizes.num_ranks()};
    int64_t first_token = 0;
    for (int i = 0; i < sizes.num_ranks(); ++i) {
        Source& source = sources.source[i];
        if (!ranks.empty()) {
            const auto& f = ranks.at(i);
            source = {.topk_ids = pointer<int64_t>(f[0]),
                      .topk_weights = pointer<float>(f[1]),
                      .slot_in_expert = pointer<int32_t>(f[2]),
                      .kept_counts = pointer<int32_t>(f[3]),
                      .tokens = pointer<void>(f[4]),
                      .slots = pointer<void>(f[5]),
                      .grad_weights = pointer<float>(f[6])};
        }
        source.num_tokens = sizes.num_tokens[i];
        source.first_token = first_token;
        first_token += source.num_tokens;
    }
    return sources;
}

std::shared_ptr<LayerCall> make_layer_call(
    int64_t hidden, int64_t ffn, int64_t num_experts, int64_t num_all_experts, int64_t top_k,
    int64_t max_rows, bool counts_rows, std::vector<int64_t> num_tokens, int rank, int num_sms,
    bool is_bfloat16, bool is_gated, int activation, const std::array<uintptr_t, 3>& maps,
    const std::array<uintptr_t, 3>& biases, Split pull, Split push, Split pull_grad,
    Split push_grad, const std::vector<std::array<uintptr_t, 7>>& sources, uintptr_t published,
    const std::vector<uintptr_t>& flags, const std::vector<uintptr_t>& topk_ids,
    const std::vector<uintptr_t>& topk_weights, const std::vector<uintptr_t>& slot_in_expert,
    const std::vector<uintptr_t>& kept_counts, const std::vector<uintptr_t>& tokens,
    uintptr_t epoch, uintptr_t late, uint64_t timeout_ns, bool has_copy_engines) {
    LayerSizes sizes{.hidden = hidden,
                     .ffn = ffn,
                     .num_experts = num_experts,
                     .num_all_experts = num_all_experts,
                     .top_k = top_k,
                     .max_rows = max_rows,
                     .counts_rows = counts_rows,
                     .num_tokens = std::move(num_tokens),
                     .rank = rank,
                     .num_sms = num_sms,
                     .is_bfloat16 = is_bfloat16,
                     .is_gated = is_gated,
                     .activation = Activation{activation}};
    if (sizes.num_ranks() > kMaxRanks || flags.size() > kMaxRanks) {
        throw std::invalid_argument("at most " + std::to_string(kMaxRanks) + " ranks, got " +
                                    std::to_string(sizes.num_ranks()));
    }
    LayerWeights weights{};
    for (int i = 0; i < 3; ++i) {
        weights.maps[i] = pointer<CUtensorMap>(maps[i]);
        weights.biases[i] = pointer<const void*>(biases[i]);
    }
    PeerPlaces places{.is_used = !sources.empty(),
                      .sources = make_sources(sources, sizes),
                      .published = pointer<void>(published),
                      .mailboxes = {.rank = rank, .num_ranks = sizes.num_ranks()},
                      .topk_ids = pointers<void>(topk_ids),
                      .topk_weights = pointers<void>(topk_weights),
                      .slot_in_expert = pointers<void>(slot_in_expert),
                      .kept_counts = pointers<void>(kept_counts),
                      .tokens = pointers<void>(tokens),
                      .epoch = pointer<uint64_t>(epoch),
                      .late = pointer<LateWait>(late),
                      .timeout_ns = timeout_ns,
                      .has_copy_engines = has_copy_engines};
    for (size_t i = 0; i < flags.size(); ++i) {
        places.mailboxes.flags[i] = pointer<uint64_t>(flags[i]);
    }
    const CtaSplits splits{.pull = {pull[0], pull[1]},
                           .push = {push[0], push[1]},
                           .pull_grad = {pull_grad[0], pull_grad[1]},
                           .push_grad = {push_grad[0], push_grad[1]}};
    return std::make_shared<LayerCall>(std::move(sizes), weights, splits, std::move(places));
}

// Which launch of a direction to make: all, or one by itself.
void forward(const LayerCall& call, const std::string& part, const ForwardTensors& t,
             const std::array<EventPair, 2>& events, uintptr_t exposure, Streams streams) {
    const LaunchEvents found[2] = {launch_events(events[0]), launch_events(events[1])};
    auto* to = pointer<Exposure>(exposure);
    if (part == "all") return call.forward(t, found, to, streams);
    if (part == "plan") return call.plan_and_dispatch(t, streams.main);
    if (part == "dispatch") return call.dispatch(t, to, streams);
    if (part == "up") return call.up(t, found[0], to, streams.main);
    if (part == "down") return call.down(t, found[1], to, streams.main);
    throw std::invalid_argument("no part of a forward is called " + part);
}

py::list workspace_parts(const LayerCall& call) {
    py::list parts;
    for (const auto& part : call.workspace().parts) {
        parts.append(py::make_tuple(part.name, part.offset, part.item_bytes, part.shape));
    }
    return parts;
}

}  // namespace

void bind_layer_call(py::module_& m) {
    using py::arg;
    using Tensor = at::Tensor;
    using MaybeTensor = std::optional<at::Tensor>;
    const EventPair no_events{};
    const std::array<EventPair, 2> no_event_pairs{};
    py::class_<LayerCall, std::shared_ptr<LayerCall>>(m, "LayerCall")
        .def(py::init(&make_layer_call), py::kw_only(), arg("hidden"), arg("ffn"),
             arg("num_experts"), arg("num_all_experts"), arg("top_k"), arg("max_rows"),
             arg("counts_rows"),
             arg("num_tokens"), arg("rank"), arg("num_sms"), arg("is_bfloat16"), arg("is_gated"),
             arg("activation"), arg("maps"), arg("biases"), arg("pull") = Split{},
             arg("push") = Split{}, arg("pull_grad") = Split{}, arg("push_grad") = Split{},
             arg("sources") = py::list(), arg("published") = 0, arg("flags") = py::list(),
             arg("topk_ids") = py::list(), arg("topk_weights") = py::list(),
             arg("slot_in_expert") = py::list(), arg("kept_counts") = py::list(),
             arg("tokens") = py::list(), arg("epoch") = 0, arg("late") = 0,
             arg("timeout_ns") = 0, arg("has_copy_engines") = true)
        .def_property_readonly("has_peers", &LayerCall::has_peers)
        .def_property_readonly("num_row_dots", &LayerCall::num_row_dots)
        .def_property_readonly("workspace_bytes",
                               [](const LayerCall& call) { return call.workspace().num_bytes; })
        .def_property_readonly("workspace_parts", &workspace_parts)
        .def(
            "begin",
            [](const LayerCall& call, const Tensor& tokens, uintptr_t side_stream) {
                const Streams streams{current_stream(tokens), pointer<CUstream_st>(side_stream)};
                call.begin(token_pointer(call, tokens), streams);
            },
            py::kw_only(), arg("tokens"), arg("side_stream"))
        .def(
            "forward",
            [](const LayerCall& call, const Tensor& tokens, const Tensor& topk_ids,
               const Tensor& topk_weights, const Tensor& slot_in_expert, const Tensor& kept_counts,
               const Tensor& workspace, const Tensor& rows, const Tensor& hidden,
               const PerMatrix& pre, const Tensor& results, const Tensor& output,
               const std::array<EventPair, 2>& events, uintptr_t exposure, uintptr_t side_stream,
               const std::string& part) {
                const RoutingTensors routing{topk_ids, topk_weights, slot_in_expert, kept_counts};
                const auto t =
                    forward_tensors(call, plan_tensors(call, tokens, routing, workspace), rows,
                                    hidden, pre, results, output);
                const Streams streams{current_stream(tokens), pointer<CUstream_st>(side_stream)};
                forward(call, part, t, events, exposure, streams);
            },
            py::kw_only(), arg("tokens"), arg("topk_ids"), arg("topk_weights"),
            arg("slot_in_expert"), arg("kept_counts"), arg("workspace"), arg("rows"),
            arg("hidden"), arg("pre"),
            arg("results"), arg("output"), arg("events") = no_event_pairs, arg("exposure") = 0,
            arg("side_stream") = 0, arg("part") = "all")
        .def(
            "backward_down",
            [](const LayerCall& call, const Tensor& grad, const Tensor& workspace,
               const Tensor& grad_rows, const PerMatrix& pre, const PerMatrix& grad_pre,
               const Tensor& weighted_hidden, const Tensor& row_dots, const Tensor& grad_weights,
               const MaybeTensor& grad_down, const MaybeTensor& grad_down_bias, bool adds_to_down,
               const EventPair& events, uintptr_t exposure, bool only_gemm) {
                const MatrixGrad down{or_undefined(grad_down), or_undefined(grad_down_bias),
                                      adds_to_down};
                const auto t = down_grad_tensors(call, grad, workspace, grad_rows, pre, grad_pre,
                                                 weighted_hidden, row_dots, grad_weights, down);
                const auto run = only_gemm ? &LayerCall::down_grad : &LayerCall::backward_down;
                (call.*run)(t, launch_events(events), pointer<Exposure>(exposure),
                            current_stream(grad));
            },
            py::kw_only(), arg("grad"), arg("workspace"), arg("grad_rows"), arg("pre"),
            arg("grad_pre"), arg("weighted_hidden"), arg("row_dots"), arg("grad_weights"),
            arg("grad_down") = py::none(), arg("grad_down_bias") = py::none(),
            arg("adds_to_down") = false, arg("events") = no_events, arg("exposure") = 0,
            arg("only_gemm") = false)
        .def(
            "backward_up",
            [](const LayerCall& call, const Tensor& workspace, const PerMatrix& grad_pre,
               const Tensor& rows, const MaybeTensor& grad_rows, const MaybeTensor& grad_first,
               const MaybeTensor& grad_first_bias, bool adds_to_first, const EventPair& events,
               uintptr_t exposure, bool only_gemm) {
                const MatrixGrad first{or_undefined(grad_first), or_undefined(grad_first_bias),
                                       adds_to_first};
                const auto t = up_grad_tensors(call, workspace, grad_pre, rows,
                                               or_undefined(grad_rows), first);
                if (only_gemm) return call.up_grad(t, current_stream(rows));
                call.backward_up(t, launch_events(events), pointer<Exposure>(exposure),
                                 current_stream(rows));
            },
            py::kw_only(), arg("workspace"), arg("grad_pre"), arg("rows"),
            arg("grad_rows") = py::none(), arg("grad_first") = py::none(),
            arg("grad_first_bias") = py::none(), arg("adds_to_first") = false,
            arg("events") = no_events, arg("exposure") = 0, arg("only_gemm") = false)
        .def(
            "sum_grads",
            [](const LayerCall& call, const Tensor& workspace, const Tensor& grad_rows,
               const Tensor& grad_tokens, const Tensor& grad_weights, uintptr_t exposure) {
                call.sum_grads(
                    token_grad_tensors(call, workspace, grad_rows, grad_tokens, grad_weights),
                    pointer<Exposure>(exposure), current_stream(grad_rows));
            },
            py::kw_only(), arg("workspace"), arg("grad_rows"), arg("grad_tokens"),
            arg("grad_weights"), arg("exposure") = 0)
        .def(
            "weight_grad",
            [](const LayerCall& call, const Tensor& workspace, const Tensor& a, const Tensor& b,
               const Tensor& grad, const MaybeTensor& grad_bias, bool adds, bool is_down) {
                const MatrixGrad found{grad, or_undefined(grad_bias), adds};
                call.weight_grad(weight_grad_tensors(call, workspace, a, b, found, is_down),
                                 current_stream(a));
            },
            py::kw_only(), arg("workspace"), arg("a"), arg("b"), arg("grad"),
            arg("grad_bias") = py::none(), arg("adds") = false, arg("is_down"));
}

}  // namespace comet_ds
