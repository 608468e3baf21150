// SPDX-License-Identifier: Apache-2.0
// A rank's experts as a node of autograd's graph: dispatch, experts and combine.
//
//   forward    x -> dispatch -> up + activation -> down -> combine -> output
//   backward   grad -> dispatch -> down, weight and activation -> up -> combine -> x.grad;
//              weight gradients
//
// Saved for backward are the plan (the workspace), the dispatched rows and the pre-activations; the
// rest is computed again in the epilogue that needs it. No step waits on the host.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "autograd/autograd.h"
#include "autograd/layer_tensors.h"

namespace comet_ds {

// The weights, or the biases, of the same Linear of all experts.
struct ParameterGroup {
    MatrixOf matrix;
    std::vector<at::Tensor> params;  // one stack, or one for each expert
    bool is_stacked;
};

// Counts the forwards of a layer whose backward is to come. Where there are several, autograd may
// put their gradients together before it accumulates them: what one of them adds to the parameter's
// gradient itself would be in limbo until then.
class Uses {
  public:
    void begin();
    void end();
    // Whether the one pending forward was the only one all the time.
    bool is_single() const;

  private:
    mutable std::mutex mutex_;
    int num_pending_ = 0;
    bool were_several_ = false;
};

// The parameters of a layer's local experts: of weights, then of biases, by matrix.
class ExpertParameters {
  public:
    ExpertParameters(std::vector<ParameterGroup> weights, std::vector<ParameterGroup> biases);

    const std::vector<at::Tensor>& all() const { return all_; }
    // Whether all lie where they lay at first.
    bool are_in_place() const;
    bool has_bias(MatrixOf matrix) const { return bias_of_[int(matrix)] >= 0; }
    // The stack of a matrix and its place in all(); undefined where every expert has its own.
    at::Tensor stack(MatrixOf matrix) const;
    // Gradients in the order of all(), from those of the matrices.
    variable_list in_order(const std::array<MatrixGrad, 3>& grads) const;

    const std::shared_ptr<Uses> uses = std::make_shared<Uses>();
    // How many gradients the kernels have added to those of micro-batches before.
    std::atomic<int64_t> num_added{0};

  private:
    std::vector<ParameterGroup> weights_, biases_;
    std::vector<at::Tensor> all_;
    std::vector<const void*> addresses_;
    int weight_of_[3], bias_of_[3];  // places in weights_ and biases_, by matrix; -1 for none
};

// What orders the calls of a group on this rank.
class PeerStreams {
  public:
    // Makes the current stream wait for what an earlier call did on another one; returns it and
    // the stream of copies that run meanwhile.
    Streams enter();
    void set_side(cudaStream_t stream) { side_ = stream; }

    // How often the group's memory has moved; addresses of before are not valid any more.
    int64_t generation = 0;
    // Whether a CUDA graph has captured a call, so that the memory must not move.
    bool is_captured = false;

  private:
    std::optional<cudaStream_t> last_;
    std::optional<cudaStream_t> side_;
};

// The launches of a layer for some sizes, in both directions.
struct PreparedLaunches {
    std::shared_ptr<LayerCall> forward, backward;  // they differ in where tokens lie, if sent
    std::shared_ptr<ExpertParameters> parameters;
    std::shared_ptr<PeerStreams> peers;  // null where all experts are local
    int64_t generation;                  // of the memory whose addresses they hold
};

}  // namespace comet_ds
