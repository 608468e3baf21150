// SPDX-License-Identifier: Apache-2.0
// The gate as a node of autograd's graph: logits on tensor cores, everything behind them in three
// launches. T tokens, E experts, K routes of a token, H hidden.
//
//   RouteTokens   x [T, H] and weight [E, H], bf16, H a multiple of 8
//   RouteLogits   logits [T, E] fp32
//
// RouteTokens' logits are at least as close to fp64 as DeepSpeed's fp32 operation on upcast
// operands; only the order of the sum differs, and that a sum which becomes infinite is NaN. The
// gradient of the logits goes back as two bf16 terms, exact to 16 bits.
#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/autograd.h"
#include "autograd/tensor.h"
#include "bindings.h"
#include "gate/gate.h"
#include "gate/gate_logits.h"
#include "host/tensor_map.h"

namespace comet_ds {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;

constexpr int kOperandRows = 64;  // of the boxes of operands

// How routes are chosen and kept.
struct GateOptions {
    int64_t top_k;
    int64_t capacity;   // rows an expert keeps; negative: all
    Tensor noise;       // K <= 2: [T, E] fp32, added to the logits for the last choice
    Tensor priority;    // K = 1: [T, E] fp32, who stays in an overfull expert; undefined: the first
    Tensor used_token;  // K = 1: T entries; a token whose entry is 0 gets no route
};

struct Routes {
    Tensor probs;         // [T, E] fp32
    Tensor topk_ids;      // [T, K] int64, -1 where dropped
    Tensor topk_weights;  // [T, K] fp32
    Tensor slot_in_expert;  // [T, K] int32
    Tensor kept_counts;   // [E] int32
    Tensor exp_counts;    // [E] int64
    Tensor loss_share;    // [E] fp32
    Tensor l_aux;         // [] fp32
};

Tensor gate_logits(const Tensor& x, const Tensor& weight) {
    const int64_t num_tokens = x.size(0), num_experts = weight.size(0), hidden = x.size(1);
    Tensor logits = at::empty({num_tokens, num_experts}, x.options().dtype(at::kFloat));
    if (num_tokens == 0) return logits;
    const auto* x_at = checked_pointer<void>("x", x, at::kBFloat16, {num_tokens, hidden});
    const auto* weight_at =
        checked_pointer<void>("weight", weight, at::kBFloat16, {num_experts, hidden});
    const GateLogitsParams params{
        .x = encode_tensor_map({uintptr_t(x_at), 1, num_tokens, hidden}, true, kOperandRows),
        .weight =
            encode_tensor_map({uintptr_t(weight_at), 1, num_experts, hidden}, true, kOperandRows),
        .logits = logits.mutable_data_ptr<float>(),
        .num_tokens = int(num_tokens),
        .num_experts = int(num_experts),
        .hidden = int(hidden)};
    gate_logits(params, current_stream(x));
    return logits;
}

// Returns the gradients of x, added in place to add_to where that is defined, and of weight.
std::array<Tensor, 2> gate_logits_backward(const Tensor& grad, const Tensor& x,
                                           const Tensor& weight, bool needs_x, bool needs_weight,
                                           const Tensor& add_to) {
    const int64_t num_tokens = grad.size(0), num_experts = grad.size(1);
    const int64_t hidden = weight.size(1);
    const Tensor terms = at::empty({num_tokens, 2 * num_experts}, x.options());
    const Tensor doubled = at::empty({2 * num_experts, hidden}, x.options());
    const std::array<int64_t, 2> by_expert{num_tokens, num_experts};
    const SplitGradParams params{
        .in = checked_pointer<float>("grad", grad, at::kFloat, by_expert),
        .weight = checked_pointer<void>("weight", weight, at::kBFloat16, {num_experts, hidden}),
        .terms = terms.data_ptr(),
        .doubled_weight = doubled.data_ptr(),
        .num_rows = num_tokens,
        .num_cols = num_experts,
        .hidden = hidden};
    if (num_tokens > 0) split_grad(params, current_stream(x));
    std::array<Tensor, 2> grads;
    if (needs_x) {
        grads[0] =
            add_to.defined() ? Tensor(add_to).addmm_(terms, doubled) : at::mm(terms, doubled);
    }
    if (needs_weight) {
        const Tensor both = at::mm(terms.t(), x, at::kFloat);
        grads[1] = at::empty_like(weight);
        add_terms(both.const_data_ptr<float>(), grads[1].data_ptr(), weight.numel(),
                  current_stream(x));
    }
    return grads;
}

Routes choose_routes(const Tensor& logits, const GateOptions& options) {
    const int64_t num_tokens = logits.size(0), num_experts = logits.size(1);
    const int64_t top_k = options.top_k;
    const auto parts = allocate_together(logits, {{{num_tokens, top_k}, at::kLong},
                                                  {{num_tokens, top_k}, at::kFloat},
                                                  {{num_tokens, top_k}, at::kInt},
                                                  {{num_experts}, at::kInt},
                                                  {{num_experts}, at::kLong},
                                                  {{num_experts}, at::kFloat},
                                                  {{}, at::kFloat}});
    Routes routes{.probs = at::softmax(logits, 1),
                  .topk_ids = parts[0],
                  .topk_weights = parts[1],
                  .slot_in_expert = parts[2],
                  .kept_counts = parts[3],
                  .exp_counts = parts[4],
                  .loss_share = parts[5],
                  .l_aux = parts[6]};
    if (num_tokens == 0) {  // nothing is launched
        for (const Tensor& part : parts) part.zero_();
        return routes;
    }
    Tensor scores, used;
    if (options.noise.defined()) {
        scores = logits + options.noise;
    } else if (top_k == 2) {
        scores = logits;
    }
    if (options.used_token.defined()) {
        used = options.used_token.reshape(-1).ne(0).view(at::kByte);
    }
    const std::array<int64_t, 2> by_expert{num_tokens, num_experts};
    const GateParams params{
        .probs = checked_pointer<float>("probs", routes.probs, at::kFloat, by_expert),
        .scores = checked_pointer_or_null<float>("scores", scores, at::kFloat, by_expert),
        .priority =
            checked_pointer_or_null<float>("priority", options.priority, at::kFloat, by_expert),
        .used_token =
            checked_pointer_or_null<uint8_t>("used_token", used, at::kByte, {num_tokens}),
        .capacity = options.capacity,
        .num_tokens = num_tokens,
        .num_experts = num_experts,
        .top_k = top_k,
        .topk_ids = routes.topk_ids.mutable_data_ptr<int64_t>(),
        .topk_weights = routes.topk_weights.mutable_data_ptr<float>(),
        .slot_in_expert = routes.slot_in_expert.mutable_data_ptr<int32_t>(),
        .kept_counts = routes.kept_counts.mutable_data_ptr<int32_t>(),
        .exp_counts = routes.exp_counts.mutable_data_ptr<int64_t>(),
        .loss_share = routes.loss_share.mutable_data_ptr<float>(),
        .l_aux = routes.l_aux.mutable_data_ptr<float>()};
    const int64_t num_bytes = gate_scratch_bytes(num_tokens, num_experts, top_k);
    const Tensor scratch = at::empty({num_bytes}, logits.options().dtype(at::kByte));
    route_tokens(params, scratch.data_ptr(), current_stream(logits));
    return routes;
}

// Returns the gradient of the logits, [T, E] fp32.
Tensor routes_backward(const Tensor& probs, const Tensor& topk_ids, const Tensor& loss_share,
                       Tensor grad_weights, Tensor grad_l_aux) {
    Tensor grad_logits = at::empty_like(probs);
    if (probs.size(0) == 0) return grad_logits;
    grad_weights = grad_weights.defined() ? grad_weights.contiguous()
                                          : at::zeros(topk_ids.sizes(), probs.options());
    if (!grad_l_aux.defined()) grad_l_aux = at::zeros({}, probs.options());
    const GateGradParams params{
        .probs = probs.const_data_ptr<float>(),
        .topk_ids = topk_ids.const_data_ptr<int64_t>(),
        .grad_weights =
            checked_pointer<float>("grad_weights", grad_weights, at::kFloat, topk_ids.sizes()),
        .grad_l_aux = checked_pointer<float>("grad_l_aux", grad_l_aux, at::kFloat, {}),
        .loss_share = loss_share.const_data_ptr<float>(),
        .grad_logits = grad_logits.mutable_data_ptr<float>(),
        .num_tokens = probs.size(0),
        .num_experts = probs.size(1),
        .top_k = topk_ids.size(1)};
    route_tokens_backward(params, current_stream(probs));
    return grad_logits;
}

class RouteTokens : public torch::autograd::Function<RouteTokens> {
  public:
    // Also returns x for one reader, the experts. Their backward must return a new contiguous tensor
    // that nobody else holds: the product that makes the gate's gradient adds to it in place.
    static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                                 const GateOptions& options, Routes* chosen) {
        const Tensor rows = x.contiguous();
        *chosen = choose_routes(gate_logits(rows, weight), options);
        ctx->save_for_backward(
            {rows, weight, chosen->probs, chosen->topk_ids, chosen->loss_share});
        ctx->set_materialize_grads(false);
        const Tensor passed = x.view_as(x);
        if (!x.requires_grad()) ctx->mark_non_differentiable({passed});
        return {chosen->topk_weights, chosen->l_aux, passed};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        return once_differentiable([&]() -> variable_list {
            const Tensor &grad_weights = grads[0], &grad_l_aux = grads[1];
            const Tensor& grad_x = grads[2];
            if (!grad_weights.defined() && !grad_l_aux.defined()) return {grad_x, {}, {}, {}};
            const auto saved = ctx->get_saved_variables();
            const Tensor grad =
                routes_backward(saved[2], saved[3], saved[4], grad_weights, grad_l_aux);
            const auto found =
                gate_logits_backward(grad, saved[0], saved[1], ctx->needs_input_grad(0),
                                     ctx->needs_input_grad(1), grad_x);
            return {found[0], found[1], {}, {}};
        });
    }
};

class RouteLogits : public torch::autograd::Function<RouteLogits> {
  public:
    static variable_list forward(AutogradContext* ctx, const Tensor& logits,
                                 const GateOptions& options, Routes* chosen) {
        *chosen = choose_routes(logits, options);
        ctx->save_for_backward({chosen->probs, chosen->topk_ids, chosen->loss_share});
        ctx->set_materialize_grads(false);
        return {chosen->topk_weights, chosen->l_aux};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        return once_differentiable([&]() -> variable_list {
            const auto saved = ctx->get_saved_variables();
            return {routes_backward(saved[0], saved[1], saved[2], grads[0], grads[1]), {}, {}};
        });
    }
};

using MaybeTensor = std::optional<Tensor>;

GateOptions gate_options(int64_t top_k, std::optional<int64_t> capacity, const MaybeTensor& noise,
                         const MaybeTensor& priority, const MaybeTensor& used_token) {
    return {top_k, capacity.value_or(-1), or_undefined(noise), or_undefined(priority),
            or_undefined(used_token)};
}

// Returns (topk_weights, l_aux, topk_ids, slot_in_expert, kept_counts, exp_counts) and whatever else
// has a gradient. The decisions have none, and are not shown to autograd: noting that takes time.
std::vector<Tensor> with_decisions(const variable_list& found, const Routes& chosen) {
    std::vector<Tensor> all{found[0],     found[1],           chosen.topk_ids,
                            chosen.slot_in_expert, chosen.kept_counts, chosen.exp_counts};
    all.insert(all.end(), found.begin() + 2, found.end());
    return all;
}

}  // namespace

void bind_gate(py::module_& m) {
    using py::arg;
    m.def("gate_logits", static_cast<Tensor (*)(const Tensor&, const Tensor&)>(&gate_logits),
          arg("x"), arg("weight"),
          "x [T, H] bf16 times weight [E, H] bf16, transposed: [T, E] fp32");
    m.def(
        "gate_logits_backward",
        [](const Tensor& grad, const Tensor& x, const Tensor& weight, const MaybeTensor& add_to) {
            return gate_logits_backward(grad, x, weight, true, true, or_undefined(add_to));
        },
        arg("grad"), arg("x"), arg("weight"), py::kw_only(), arg("add_to") = py::none());
    m.def(
        "route_tokens",
        [](const Tensor& x, const Tensor& weight, int64_t top_k, std::optional<int64_t> capacity,
           const MaybeTensor& noise, const MaybeTensor& priority, const MaybeTensor& used_token) {
            Routes chosen;
            const auto found = RouteTokens::apply(
                x, weight, gate_options(top_k, capacity, noise, priority, used_token), &chosen);
            return with_decisions(found, chosen);
        },
        arg("x"), arg("weight"), py::kw_only(), arg("top_k"), arg("capacity"), arg("noise"),
        arg("priority"), arg("used_token"));
    m.def(
        "route_logits",
        [](const Tensor& logits, int64_t top_k, std::optional<int64_t> capacity,
           const MaybeTensor& noise, const MaybeTensor& priority, const MaybeTensor& used_token) {
            Routes chosen;
            const auto found = RouteLogits::apply(
                logits, gate_options(top_k, capacity, noise, priority, used_token), &chosen);
            return with_decisions(found, chosen);
        },
        arg("logits"), py::kw_only(), arg("top_k"), arg("capacity"), arg("noise"), arg("priority"),
        arg("used_token"));
}

}  // namespace comet_ds
