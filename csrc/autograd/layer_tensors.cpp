// SPDX-License-Identifier: Apache-2.0
#include "autograd/layer_tensors.h"

#include <string>

#include "autograd/tensor.h"

namespace comet_ds {
namespace {

// Checks the tensors of one call; num_rows is R where it takes rows.
struct TensorReader {
    const LayerCall& call;
    const int64_t num_rows = 0;
    const LayerSizes& s = call.sizes();
    const at::ScalarType element = s.is_bfloat16 ? at::kBFloat16 : at::kHalf;

    void* tokens(const char* name, const at::Tensor& tensor) const {
        return checked_pointer<void>(name, tensor, element, {s.num_own_tokens(), s.hidden});
    }
    void* rows(const char* name, const at::Tensor& tensor, int64_t cols) const {
        return checked_pointer<void>(name, tensor, element, {num_rows, cols});
    }
    void* workspace(const at::Tensor& tensor) const {
        return checked_pointer<void>("workspace", tensor, at::kByte, {call.workspace().num_bytes});
    }
    template <typename T>
    T* routes(const char* name, const at::Tensor& tensor, at::ScalarType dtype) const {
        return checked_pointer<T>(name, tensor, dtype, {s.num_own_tokens(), s.top_k});
    }
    template <typename Pointer>
    void per_matrix(const char* name, const PerMatrix& tensors, Pointer (&to)[2]) const {
        if (int(tensors.size()) != 1 + s.is_gated) {
            throw std::invalid_argument(std::string(name) + " must have " +
                                        std::to_string(1 + s.is_gated) + " tensors, got " +
                                        std::to_string(tensors.size()));
        }
        for (size_t i = 0; i < tensors.size(); ++i) to[i] = rows(name, tensors[i], s.ffn);
    }
    void* expert_matrices(const char* name, const at::Tensor& tensor, int64_t m, int64_t n) const {
        return checked_pointer_or_null<void>(name, tensor, element, {s.num_experts, m, n});
    }
    void* expert_vectors(const char* name, const at::Tensor& tensor, int64_t n) const {
        return checked_pointer_or_null<void>(name, tensor, element, {s.num_experts, n});
    }
};

// Returns R of a buffer of rows.
int64_t num_rows_of(const char* name, const LayerCall& call, const at::Tensor& rows) {
    const int64_t found = rows.defined() && rows.dim() == 2 ? rows.size(0) : 0;
    const int64_t most = call.sizes().max_rows;
    if (found <= 0 || found % kRowBlock != 0 || found > most) {
        throw std::invalid_argument(std::string(name) + " must have a multiple of " +
                                    std::to_string(kRowBlock) + " rows, at most " +
                                    std::to_string(most) + ", got " + std::to_string(found));
    }
    return found;
}

}  // namespace

const void* token_pointer(const LayerCall& call, const at::Tensor& tokens) {
    return TensorReader{call}.tokens("tokens", tokens);
}

PlanTensors plan_tensors(const LayerCall& call, const at::Tensor& tokens,
                         const RoutingTensors& routing, const at::Tensor& workspace) {
    const TensorReader read{call};
    return {
        .tokens = read.tokens("tokens", tokens),
        .routing = {.topk_ids = read.routes<int64_t>("topk_ids", routing.topk_ids, at::kLong),
                    .topk_weights =
                        read.routes<float>("topk_weights", routing.topk_weights, at::kFloat),
                    .slot_in_expert =
                        read.routes<int32_t>("slot_in_expert", routing.slot_in_expert, at::kInt),
                    .kept_counts = checked_pointer<int32_t>("kept_counts", routing.kept_counts,
                                                            at::kInt, {read.s.num_all_experts})},
        .workspace = read.workspace(workspace)};
}

ForwardTensors forward_tensors(const LayerCall& call, const PlanTensors& plan,
                               const at::Tensor& rows, const at::Tensor& hidden,
                               const PerMatrix& pre, const at::Tensor& results,
                               const at::Tensor& output) {
    const TensorReader read{call, num_rows_of("rows", call, rows)};
    const auto& s = read.s;
    ForwardTensors t{
        .plan = plan,
        .num_rows = read.num_rows,
        .rows = read.rows("rows", rows, s.hidden),
        .hidden = read.rows("hidden", hidden, s.ffn),
        .pre = {nullptr, nullptr},
        .results = read.rows("results", results, s.hidden),
        .output = read.tokens("output", output)};
    if (!pre.empty()) read.per_matrix("pre", pre, t.pre);
    return t;
}

DownGradTensors down_grad_tensors(const LayerCall& call, const at::Tensor& grad,
                                  const at::Tensor& workspace, const at::Tensor& grad_rows,
                                  const PerMatrix& pre, const PerMatrix& grad_pre,
                                  const at::Tensor& weighted_hidden, const at::Tensor& row_dots,
                                  const at::Tensor& grad_weights, const MatrixGrad& down) {
    const TensorReader read{call, num_rows_of("grad_rows", call, grad_rows)};
    const auto& s = read.s;
    DownGradTensors t{
        .grad = read.tokens("grad", grad),
        .workspace = read.workspace(workspace),
        .num_rows = read.num_rows,
        .grad_rows = read.rows("grad_rows", grad_rows, s.hidden),
        .pre = {nullptr, nullptr},
        .grad_pre = {nullptr, nullptr},
        .weighted_hidden = read.rows("weighted_hidden", weighted_hidden, s.ffn),
        .row_dots = checked_pointer<float>("row_dots", row_dots, at::kFloat,
                                           {call.num_row_dots(), read.num_rows}),
        .grad_weights = read.routes<float>("grad_weights", grad_weights, at::kFloat),
        .grad_down = read.expert_matrices("grad_down", down.weight, s.hidden, s.ffn),
        .grad_down_bias = read.expert_vectors("grad_down_bias", down.bias, s.hidden),
        .adds_to_down = down.is_added};
    read.per_matrix("pre", pre, t.pre);
    read.per_matrix("grad_pre", grad_pre, t.grad_pre);
    return t;
}

UpGradTensors up_grad_tensors(const LayerCall& call, const at::Tensor& workspace,
                              const PerMatrix& grad_pre, const at::Tensor& rows,
                              const at::Tensor& grad_rows, const MatrixGrad& first) {
    const TensorReader read{call, num_rows_of("rows", call, rows)};
    const auto& s = read.s;
    if (call.has_peers() && !grad_rows.defined()) {
        throw std::invalid_argument("grad_rows must not be None where other ranks wait for it");
    }
    UpGradTensors t{
        .workspace = read.workspace(workspace),
        .num_rows = read.num_rows,
        .grad_pre = {nullptr, nullptr},
        .rows = read.rows("rows", rows, s.hidden),
        .grad_rows = grad_rows.defined() ? read.rows("grad_rows", grad_rows, s.hidden) : nullptr,
        .grad_first = read.expert_matrices("grad_first", first.weight, s.ffn, s.hidden),
        .grad_first_bias = read.expert_vectors("grad_first_bias", first.bias, s.ffn),
        .adds_to_first = first.is_added};
    read.per_matrix("grad_pre", grad_pre, t.grad_pre);
    return t;
}

TokenGradTensors token_grad_tensors(const LayerCall& call, const at::Tensor& workspace,
                                    const at::Tensor& grad_rows, const at::Tensor& grad_tokens,
                                    const at::Tensor& grad_weights) {
    const TensorReader read{call, num_rows_of("grad_rows", call, grad_rows)};
    return {.workspace = read.workspace(workspace),
            .grad_rows = read.rows("grad_rows", grad_rows, read.s.hidden),
            .grad_tokens = read.tokens("grad_tokens", grad_tokens),
            .grad_weights = read.routes<float>("grad_weights", grad_weights, at::kFloat)};
}

WeightGradTensors weight_grad_tensors(const LayerCall& call, const at::Tensor& workspace,
                                      const at::Tensor& a, const at::Tensor& b,
                                      const MatrixGrad& grad, bool is_down) {
    const TensorReader read{call, num_rows_of("a", call, a)};
    const int64_t a_cols = is_down ? read.s.hidden : read.s.ffn;
    const int64_t b_cols = is_down ? read.s.ffn : read.s.hidden;
    return {.workspace = read.workspace(workspace),
            .num_rows = read.num_rows,
            .a = read.rows("a", a, a_cols),
            .b = read.rows("b", b, b_cols),
            .a_cols = a_cols,
            .b_cols = b_cols,
            .grad = checked_pointer<void>("grad", grad.weight, read.element,
                                          {read.s.num_experts, a_cols, b_cols}),
            .grad_bias = read.expert_vectors("grad_bias", grad.bias, a_cols),
            .is_weighted = is_down,
            .adds = grad.is_added};
}

}  // namespace comet_ds
