// SPDX-License-Identifier: Apache-2.0
// LayerCall for Python: every tensor by its name, its dtype and shape checked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>

#include "bindings.h"
#include "moe/layer_call.h"
#include "tensor.h"

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
                      .ranks = pointer<int32_t>(f[2]),
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

std::unique_ptr<LayerCall> make_layer_call(
    int64_t hidden, int64_t ffn, int64_t num_experts, int64_t num_all_experts, int64_t top_k,
    int64_t max_rows, std::vector<int64_t> num_tokens, int rank, int num_sms, bool is_bfloat16,
    bool is_gated, int activation, const std::array<uintptr_t, 3>& maps,
    const std::array<uintptr_t, 3>& biases, Split pull, Split push, Split pull_grad,
    Split push_grad, const std::vector<std::array<uintptr_t, 7>>& sources, uintptr_t published,
    const std::vector<uintptr_t>& flags, const std::vector<uintptr_t>& topk_ids,
    const std::vector<uintptr_t>& topk_weights, const std::vector<uintptr_t>& ranks,
    const std::vector<uintptr_t>& kept_counts, const std::vector<uintptr_t>& tokens,
    uintptr_t epoch, uintptr_t late, uint64_t timeout_ns, bool has_copy_engines) {
    LayerSizes sizes{.hidden = hidden,
                     .ffn = ffn,
                     .num_experts = num_experts,
                     .num_all_experts = num_all_experts,
                     .top_k = top_k,
                     .max_rows = max_rows,
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
                      .ranks = pointers<void>(ranks),
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
    return std::make_unique<LayerCall>(std::move(sizes), weights, splits, std::move(places));
}

// Reads the tensors of one call, whose shapes the layer's sizes give.
struct TensorReader {
    const LayerCall& call;
    const LayerSizes& s = call.sizes();
    const TorchDtype& element = s.is_bfloat16 ? bfloat16_dtype() : float16_dtype();

    void* tokens(const char* name, const py::handle& tensor) const {
        return pointer<void>(checked_address(name, tensor, element, {s.num_own_tokens(), s.hidden}));
    }
    void* rows(const char* name, const py::handle& tensor, int64_t cols) const {
        return pointer<void>(checked_address(name, tensor, element, {s.max_rows, cols}));
    }
    void* workspace(const py::handle& tensor) const {
        const std::vector<int64_t> shape{call.workspace().num_bytes};
        return pointer<void>(checked_address("workspace", tensor, uint8_dtype(), shape));
    }
    template <typename T>
    T* routes(const char* name, const py::handle& tensor, const TorchDtype& dtype) const {
        const std::vector<int64_t> shape{s.num_own_tokens(), s.top_k};
        return pointer<T>(checked_address(name, tensor, dtype, shape));
    }
    // [gate, up] or [up]: one tensor [rows, ffn] for each.
    template <typename Pointer>
    void pre_activations(const char* name, const py::sequence& tensors, Pointer (&to)[2]) const {
        if (int(tensors.size()) != 1 + s.is_gated) {
            throw std::invalid_argument(std::string(name) + " must have " +
                                        std::to_string(1 + s.is_gated) + " tensors, got " +
                                        std::to_string(tensors.size()));
        }
        for (size_t i = 0; i < tensors.size(); ++i) to[i] = rows(name, tensors[i], s.ffn);
    }
    void* expert_matrices(const char* name, const py::handle& tensor, int64_t m, int64_t n) const {
        const std::vector<int64_t> shape{s.num_experts, m, n};
        return pointer<void>(checked_address_or_null(name, tensor, element, shape));
    }
    void* expert_vectors(const char* name, const py::handle& tensor, int64_t n) const {
        const std::vector<int64_t> shape{s.num_experts, n};
        return pointer<void>(checked_address_or_null(name, tensor, element, shape));
    }
};

ForwardTensors forward_tensors(const LayerCall& call, const py::handle& tokens,
                               const py::handle& topk_ids, const py::handle& topk_weights,
                               const py::handle& ranks, const py::handle& kept_counts,
                               const py::handle& workspace, const py::handle& rows,
                               const py::handle& hidden, const py::sequence& pre,
                               const py::handle& results, const py::handle& output) {
    const TensorReader read{call};
    const auto& s = read.s;
    ForwardTensors t{
        .tokens = read.tokens("tokens", tokens),
        .routing = {.topk_ids = read.routes<int64_t>("topk_ids", topk_ids, int64_dtype()),
                    .topk_weights =
                        read.routes<float>("topk_weights", topk_weights, float32_dtype()),
                    .ranks = read.routes<int32_t>("ranks", ranks, int32_dtype()),
                    .kept_counts = pointer<int32_t>(checked_address(
                        "kept_counts", kept_counts, int32_dtype(), {s.num_all_experts}))},
        .workspace = read.workspace(workspace),
        .rows = read.rows("rows", rows, s.hidden),
        .hidden = read.rows("hidden", hidden, s.ffn),
        .pre = {nullptr, nullptr},
        .results = read.rows("results", results, s.hidden),
        .output = read.tokens("output", output)};
    if (pre.size() > 0) read.pre_activations("pre", pre, t.pre);
    return t;
}

DownGradTensors down_grad_tensors(const LayerCall& call, const py::handle& grad,
                                  const py::handle& workspace, const py::handle& grad_rows,
                                  const py::sequence& pre, const py::sequence& grad_pre,
                                  const py::handle& weighted_hidden, const py::handle& row_dots,
                                  const py::handle& grad_weights, const py::handle& grad_down,
                                  const py::handle& grad_down_bias, bool adds_to_down) {
    const TensorReader read{call};
    const auto& s = read.s;
    DownGradTensors t{
        .grad = read.tokens("grad", grad),
        .workspace = read.workspace(workspace),
        .grad_rows = read.rows("grad_rows", grad_rows, s.hidden),
        .pre = {nullptr, nullptr},
        .grad_pre = {nullptr, nullptr},
        .weighted_hidden = read.rows("weighted_hidden", weighted_hidden, s.ffn),
        .row_dots = pointer<float>(checked_address("row_dots", row_dots, float32_dtype(),
                                                   {call.num_row_dots(), s.max_rows})),
        .grad_weights = read.routes<float>("grad_weights", grad_weights, float32_dtype()),
        .grad_down = read.expert_matrices("grad_down", grad_down, s.hidden, s.ffn),
        .grad_down_bias = read.expert_vectors("grad_down_bias", grad_down_bias, s.hidden),
        .adds_to_down = adds_to_down};
    read.pre_activations("pre", pre, t.pre);
    read.pre_activations("grad_pre", grad_pre, t.grad_pre);
    return t;
}

UpGradTensors up_grad_tensors(const LayerCall& call, const py::handle& workspace,
                              const py::sequence& grad_pre, const py::handle& rows,
                              const py::handle& grad_rows, const py::handle& grad_first,
                              const py::handle& grad_first_bias, bool adds_to_first) {
    const TensorReader read{call};
    const auto& s = read.s;
    UpGradTensors t{
        .workspace = read.workspace(workspace),
        .grad_pre = {nullptr, nullptr},
        .rows = read.rows("rows", rows, s.hidden),
        .grad_rows = grad_rows.is_none() ? nullptr : read.rows("grad_rows", grad_rows, s.hidden),
        .grad_first = read.expert_matrices("grad_first", grad_first, s.ffn, s.hidden),
        .grad_first_bias = read.expert_vectors("grad_first_bias", grad_first_bias, s.ffn),
        .adds_to_first = adds_to_first};
    read.pre_activations("grad_pre", grad_pre, t.grad_pre);
    if (call.has_peers() && t.grad_rows == nullptr) {
        throw std::invalid_argument("grad_rows must not be None where other ranks wait for it");
    }
    return t;
}

void sum_grads(const LayerCall& call, const py::handle& workspace, const py::handle& grad_rows,
               const py::handle& grad_tokens, const py::handle& grad_weights, uintptr_t exposure,
               uintptr_t stream) {
    const TensorReader read{call};
    call.sum_grads({.workspace = read.workspace(workspace),
                    .grad_rows = read.rows("grad_rows", grad_rows, read.s.hidden),
                    .grad_tokens = read.tokens("grad_tokens", grad_tokens),
                    .grad_weights =
                        read.routes<float>("grad_weights", grad_weights, float32_dtype())},
                   pointer<Exposure>(exposure), pointer<CUstream_st>(stream));
}

// Which launch of a direction to make: all, or one by itself.
void forward(const LayerCall& call, const std::string& part, const ForwardTensors& t,
             const std::array<EventPair, 2>& events, uintptr_t exposure, uintptr_t stream,
             uintptr_t side_stream) {
    const Streams streams{pointer<CUstream_st>(stream), pointer<CUstream_st>(side_stream)};
    const LaunchEvents found[2] = {launch_events(events[0]), launch_events(events[1])};
    auto* to = pointer<Exposure>(exposure);
    if (part == "all") return call.forward(t, found, to, streams);
    if (part == "plan") return call.plan_rows(t, streams.main);
    if (part == "dispatch") return call.dispatch(t, to, streams);
    if (part == "up") return call.up(t, found[0], to, streams.main);
    if (part == "down") return call.down(t, found[1], to, streams.main);
    throw std::invalid_argument("no part of a forward is called " + part);
}

void weight_grad(const LayerCall& call, const py::handle& workspace, const py::handle& a,
                 const py::handle& b, const py::handle& grad, const py::handle& grad_bias,
                 bool adds, bool is_down, uintptr_t stream) {
    const TensorReader read{call};
    const int64_t a_cols = is_down ? read.s.hidden : read.s.ffn;
    const int64_t b_cols = is_down ? read.s.ffn : read.s.hidden;
    call.weight_grad({.workspace = read.workspace(workspace),
                      .a = read.rows("a", a, a_cols),
                      .b = read.rows("b", b, b_cols),
                      .a_cols = a_cols,
                      .b_cols = b_cols,
                      .grad = read.expert_matrices("grad", grad, a_cols, b_cols),
                      .grad_bias = read.expert_vectors("grad_bias", grad_bias, a_cols),
                      .is_weighted = is_down,
                      .adds = adds},
                     pointer<CUstream_st>(stream));
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
    const EventPair no_events{};
    const std::array<EventPair, 2> no_event_pairs{};
    py::class_<LayerCall>(m, "LayerCall")
        .def(py::init(&make_layer_call), py::kw_only(), arg("hidden"), arg("ffn"),
             arg("num_experts"), arg("num_all_experts"), arg("top_k"), arg("max_rows"),
             arg("num_tokens"), arg("rank"), arg("num_sms"), arg("is_bfloat16"), arg("is_gated"),
             arg("activation"), arg("maps"), arg("biases"), arg("pull") = Split{},
             arg("push") = Split{}, arg("pull_grad") = Split{}, arg("push_grad") = Split{},
             arg("sources") = py::list(), arg("published") = 0, arg("flags") = py::list(),
             arg("topk_ids") = py::list(), arg("topk_weights") = py::list(),
             arg("ranks") = py::list(), arg("kept_counts") = py::list(),
             arg("tokens") = py::list(), arg("epoch") = 0, arg("late") = 0,
             arg("timeout_ns") = 0, arg("has_copy_engines") = true)
        .def_property_readonly("has_peers", &LayerCall::has_peers)
        .def_property_readonly("num_row_dots", &LayerCall::num_row_dots)
        .def_property_readonly("workspace_bytes",
                               [](const LayerCall& call) { return call.workspace().num_bytes; })
        .def_property_readonly("workspace_parts", &workspace_parts)
        .def(
            "begin",
            [](const LayerCall& call, const py::handle& tokens, uintptr_t stream,
               uintptr_t side_stream) {
                const Streams streams{pointer<CUstream_st>(stream),
                                      pointer<CUstream_st>(side_stream)};
                call.begin(TensorReader{call}.tokens("tokens", tokens), streams);
            },
            py::kw_only(), arg("tokens"), arg("stream"), arg("side_stream"))
        .def(
            "forward",
            [](const LayerCall& call, const py::handle& tokens, const py::handle& topk_ids,
               const py::handle& topk_weights, const py::handle& ranks,
               const py::handle& kept_counts, const py::handle& workspace, const py::handle& rows,
               const py::handle& hidden, const py::sequence& pre, const py::handle& results,
               const py::handle& output, const std::array<EventPair, 2>& events,
               uintptr_t exposure, uintptr_t stream, uintptr_t side_stream,
               const std::string& part) {
                const auto t = forward_tensors(call, tokens, topk_ids, topk_weights, ranks,
                                               kept_counts, workspace, rows, hidden, pre, results,
                                               output);
                forward(call, part, t, events, exposure, stream, side_stream);
            },
            py::kw_only(), arg("tokens"), arg("topk_ids"), arg("topk_weights"), arg("ranks"),
            arg("kept_counts"), arg("workspace"), arg("rows"), arg("hidden"), arg("pre"),
            arg("results"), arg("output"), arg("events") = no_event_pairs, arg("exposure") = 0,
            arg("stream"), arg("side_stream") = 0, arg("part") = "all")
        .def(
            "backward_down",
            [](const LayerCall& call, const py::handle& grad, const py::handle& workspace,
               const py::handle& grad_rows, const py::sequence& pre, const py::sequence& grad_pre,
               const py::handle& weighted_hidden, const py::handle& row_dots,
               const py::handle& grad_weights, const py::handle& grad_down,
               const py::handle& grad_down_bias, bool adds_to_down, const EventPair& events,
               uintptr_t exposure, uintptr_t stream, bool only_gemm) {
                const auto t = down_grad_tensors(call, grad, workspace, grad_rows, pre, grad_pre,
                                                 weighted_hidden, row_dots, grad_weights,
                                                 grad_down, grad_down_bias, adds_to_down);
                const auto run = only_gemm ? &LayerCall::down_grad : &LayerCall::backward_down;
                (call.*run)(t, launch_events(events), pointer<Exposure>(exposure),
                            pointer<CUstream_st>(stream));
            },
            py::kw_only(), arg("grad"), arg("workspace"), arg("grad_rows"), arg("pre"),
            arg("grad_pre"), arg("weighted_hidden"), arg("row_dots"), arg("grad_weights"),
            arg("grad_down") = py::none(), arg("grad_down_bias") = py::none(),
            arg("adds_to_down") = false, arg("events") = no_events, arg("exposure") = 0, arg("stream"),
            arg("only_gemm") = false)
        .def(
            "backward_up",
            [](const LayerCall& call, const py::handle& workspace, const py::sequence& grad_pre,
               const py::handle& rows, const py::handle& grad_rows, const py::handle& grad_first,
               const py::handle& grad_first_bias, bool adds_to_first, const EventPair& events,
               uintptr_t exposure, uintptr_t stream, bool only_gemm) {
                const auto t = up_grad_tensors(call, workspace, grad_pre, rows, grad_rows,
                                               grad_first, grad_first_bias, adds_to_first);
                if (only_gemm) return call.up_grad(t, pointer<CUstream_st>(stream));
                call.backward_up(t, launch_events(events), pointer<Exposure>(exposure),
                                 pointer<CUstream_st>(stream));
            },
            py::kw_only(), arg("workspace"), arg("grad_pre"), arg("rows"), arg("grad_rows"),
            arg("grad_first") = py::none(),
            arg("grad_first_bias") = py::none(), arg("adds_to_first") = false,
            arg("events") = no_events, arg("exposure") = 0, arg("stream"),
            arg("only_gemm") = false)
        .def("sum_grads", &sum_grads, py::kw_only(), arg("workspace"), arg("grad_rows"),
             arg("grad_tokens"), arg("grad_weights"), arg("exposure") = 0, arg("stream"))
        .def("weight_grad", &weight_grad, py::kw_only(), arg("workspace"), arg("a"), arg("b"),
             arg("grad"), arg("grad_bias") = py::none(), arg("adds") = false, arg("is_down"),
             arg("stream"));
}

}  // namespace comet_ds
