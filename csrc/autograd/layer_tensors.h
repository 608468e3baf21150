// SPDX-License-Identifier: Apache-2.0
// What the launches of host/layer_call.h take, from torch's tensors: each one's dtype and shape
// follow from the layer's sizes and are checked. std::invalid_argument names what does not fit.
#pragma once

#include <ATen/core/Tensor.h>

#include "host/layer_call.h"

namespace comet_ds {

// At most one tensor for gate and one for up, in this order.
using PerMatrix = std::vector<at::Tensor>;

// A rank's routing tables: topk_ids [T, K] int64, topk_weights [T, K] fp32, slot_in_expert [T, K]
// int32, kept_counts [E] int32.
struct RoutingTensors {
    at::Tensor topk_ids, topk_weights, slot_in_expert, kept_counts;
};

// A gradient of one matrix of all experts, [E, m, n], and of its bias, [E, m]. Undefined where
// nobody needs it.
struct MatrixGrad {
    at::Tensor weight, bias;
    bool is_added = false;  // to what weight holds, instead of written
};

// tokens [T, H].
const void* token_pointer(const LayerCall& call, const at::Tensor& tokens);

// tokens [T, H]; workspace [workspace().num_bytes] uint8.
PlanTensors plan_tensors(const LayerCall& call, const at::Tensor& tokens,
                         const RoutingTensors& routing, const at::Tensor& workspace);

// R, the first dimension of rows, is a multiple of kRowBlock and at most the call's max_rows. rows,
// results [R, H]; hidden and each of pre [R, F]; pre is empty where backward needs none; output
// [T, H].
ForwardTensors forward_tensors(const LayerCall& call, const PlanTensors& plan,
                               const at::Tensor& rows, const at::Tensor& hidden,
                               const PerMatrix& pre, const at::Tensor& results,
                               const at::Tensor& output);

// grad [T, H]; grad_rows [R, H]; pre, grad_pre and weighted_hidden [R, F]; row_dots
// [num_row_dots(), R] fp32; grad_weights [T, K] fp32.
DownGradTensors down_grad_tensors(const LayerCall& call, const at::Tensor& grad,
                                  const at::Tensor& workspace, const at::Tensor& grad_rows,
                                  const PerMatrix& pre, const PerMatrix& grad_pre,
                                  const at::Tensor& weighted_hidden, const at::Tensor& row_dots,
                                  const at::Tensor& grad_weights, const MatrixGrad& down);

// grad_rows is undefined where nobody needs the tokens' gradient, first where the first matrix's
// is not needed.
UpGradTensors up_grad_tensors(const LayerCall& call, const at::Tensor& workspace,
                              const PerMatrix& grad_pre, const at::Tensor& rows,
                              const at::Tensor& grad_rows, const MatrixGrad& first);

TokenGradTensors token_grad_tensors(const LayerCall& call, const at::Tensor& workspace,
                                    const at::Tensor& grad_rows, const at::Tensor& grad_tokens,
                                    const at::Tensor& grad_weights);

// Of down: a [R, H], b [R, F]; else a [R, F], b [R, H].
WeightGradTensors weight_grad_tensors(const LayerCall& call, const at::Tensor& workspace,
                                      const at::Tensor& a, const at::Tensor& b,
                                      const MatrixGrad& grad, bool is_down);

}  // namespace comet_ds
