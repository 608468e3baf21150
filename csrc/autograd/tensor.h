// SPDX-License-Identifier: Apache-2.0
// Tensors that are handed to a launch, checked.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace comet_ds {

// Returns "Float [64, 2] on cuda:0". Without streams: what they need of the C++ library is not
// always the same in an extension and in torch.
inline std::string describe(at::ScalarType dtype, at::IntArrayRef shape) {
    std::string text = std::string(c10::toString(dtype)) + " [";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// Returns where a contiguous CUDA tensor of this dtype and shape lies. Throws
// std::invalid_argument, which is a ValueError in Python, that names the tensor, what it must be
// and what it is.
template <typename T>
T* checked_pointer(const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                   at::IntArrayRef shape) {
    const bool fits = tensor.defined() && tensor.scalar_type() == dtype &&
                      tensor.sizes() == shape && tensor.is_contiguous() && tensor.is_cuda();
    if (!fits) {
        const std::string got = tensor.defined()
                                    ? describe(tensor.scalar_type(), tensor.sizes()) + " on " +
                                          tensor.device().str()
                                    : "None";
        throw std::invalid_argument(std::string(name) + " must be contiguous " +
                                    describe(dtype, shape) + " on a CUDA device, got " + got);
    }
    return static_cast<T*>(tensor.data_ptr());
}

// The same, or null where there is no tensor.
template <typename T>
T* checked_pointer_or_null(const char* name, const at::Tensor& tensor, at::ScalarType dtype,
                           at::IntArrayRef shape) {
    return tensor.defined() ? checked_pointer<T>(name, tensor, dtype, shape) : nullptr;
}

struct TensorShape {
    std::vector<int64_t> sizes;
    at::ScalarType dtype;
};

// Returns uninitialised tensors on a tensor's device that share one allocation, for those that live
// and die together: to the host, an allocation costs several times what a tensor does.
inline std::vector<at::Tensor> allocate_together(const at::Tensor& like,
                                                 const std::vector<TensorShape>& shapes) {
    constexpr int64_t kAlignment = 256;  // bytes
    std::vector<int64_t> offsets;
    int64_t end = 0;
    for (const auto& [sizes, dtype] : shapes) {
        offsets.push_back(end);
        const int64_t num_bytes = c10::multiply_integers(sizes) * c10::elementSize(dtype);
        end += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    }
    const at::Tensor block = at::empty({end}, like.options().dtype(at::kByte));
    std::vector<at::Tensor> found;
    for (size_t i = 0; i < shapes.size(); ++i) {
        const auto& [sizes, dtype] = shapes[i];
        at::Tensor part = at::detail::make_tensor<at::TensorImpl>(
            c10::Storage(block.storage()), block.key_set(), c10::scalarTypeToTypeMeta(dtype));
        part.unsafeGetTensorImpl()->set_storage_offset(offsets[i] / c10::elementSize(dtype));
        part.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
        found.push_back(std::move(part));
    }
    return found;
}

inline at::Tensor or_undefined(const std::optional<at::Tensor>& tensor) {
    return tensor.value_or(at::Tensor());
}

// Returns the current stream of a tensor's device, which must be the current one: MOELayer.forward
// makes it so, autograd does in backward.
inline cudaStream_t current_stream(const at::Tensor& tensor) {
    const auto current = c10::cuda::current_device();
    if (tensor.get_device() != current) {
        throw std::runtime_error("the current CUDA device must be " +
                                 std::to_string(tensor.get_device()) + ", the tensor's, not " +
                                 std::to_string(current));
    }
    return c10::cuda::getCurrentCUDAStream(current).stream();
}

}  // namespace comet_ds
