// SPDX-License-Identifier: Apache-2.0
// What the nodes of autograd's graph have in common.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

namespace comet_ds {

using torch::autograd::variable_list;

// Passes gradients on; refuses to be differentiated.
class NotTwiceDifferentiable : public torch::autograd::Function<NotTwiceDifferentiable> {
  public:
    static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& gradient) {
        return gradient.view_as(gradient);
    }
    static variable_list backward(torch::autograd::AutogradContext*, const variable_list&) {
        TORCH_CHECK(false,
                    "a gradient of comet_ds cannot be differentiated once more: it comes from "
                    "kernels. Where a loss needs gradients of gradients (create_graph=True), "
                    "compute this layer with DeepSpeed's, or on the CPU");
    }
};

// Runs a backward whose kernels autograd does not see. With create_graph, who differentiates the
// result gets an error instead of gradients that lack this layer's part.
template <typename Backward>
variable_list once_differentiable(const Backward& backward) {
    variable_list result;
    {
        at::AutoGradMode without_graph(false);
        result = backward();
    }
    // Also where no incoming gradient requires one, as that of output.sum(): whoever differentiates
    // the result means this layer's part of it.
    if (!at::GradMode::is_enabled()) return result;
    for (auto& gradient : result) {
        if (!gradient.defined()) continue;
        gradient = NotTwiceDifferentiable::apply(gradient.detach().requires_grad_());
    }
    return result;
}

}  // namespace comet_ds
