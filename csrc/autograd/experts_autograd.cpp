// SPDX-License-Identifier: Apache-2.0
#include "autograd/experts_autograd.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/tensor.h"
#include "bindings.h"
#include "host/launch.h"

namespace comet_ds {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Node;

constexpr uintptr_t kAlignmentBytes = 16;  // the copy engine's, of addresses and rows

// Returns a contiguous tensor whose rows can be read 16 bytes at a time.
Tensor aligned(const Tensor& tensor) {
    const Tensor found = tensor.contiguous();
    return uintptr_t(found.data_ptr()) % kAlignmentBytes ? found.clone() : found;
}

// Frees memory to which autograd still has a reference.
void free_memory(const Tensor& tensor) {
    const at::Storage& storage = tensor.storage();
    storage.unsafeGetStorageImpl()->set_data_ptr(at::DataPtr(nullptr, tensor.device()));
    storage.unsafeGetStorageImpl()->set_nbytes(0);
}

// Whether this backward will run a leaf's node, as torch._C._will_engine_execute_node says; false
// in torch.autograd.grad, which captures the gradient in place of adding it.
bool will_run(Node* node) {
    const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
    const auto* infos = torch::autograd::get_current_graph_task_exec_info();
    if (nodes == nullptr || infos == nullptr || nodes->find(node) == nodes->end()) return false;
    if (infos->empty()) return true;
    const auto info = infos->find(node);
    return info != infos->end() && info->second.should_execute() && !info->second.captures_;
}

// Whether the kernels may add to a parameter's gradient in autograd's place.
//
// Autograd would add the new gradient to it, in place; with the new one already in it, it only has
// to put it back. That must not be seen by anyone: not by hooks of the parameter, which get the new
// gradient alone, nor by torch.autograd.grad, which adds to none.
bool can_add_to_grad(const Tensor& param) {
    if (!param.is_leaf() || !param.requires_grad()) return false;
    const Tensor& grad = param.grad();
    if (!grad.defined() || grad.scalar_type() != param.scalar_type() || grad.requires_grad()) {
        return false;
    }
    if (!grad.is_contiguous() || uintptr_t(grad.data_ptr()) % kAlignmentBytes) return false;
    if (!torch::autograd::impl::hooks(param).empty()) return false;
    const auto node = torch::autograd::impl::grad_accumulator(param);
    return node->pre_hooks().empty() && will_run(&*node);
}

// A Python object that any thread may let go of.
class PythonHandle {
  public:
    explicit PythonHandle(py::object object) : object_(std::move(object)) {}
    ~PythonHandle() {
        if (!Py_IsInitialized()) {
            object_.release();
            return;
        }
        const py::gil_scoped_acquire gil;
        object_ = py::object();
    }
    PythonHandle(const PythonHandle&) = delete;
    PythonHandle& operator=(const PythonHandle&) = delete;

    bool is_none() const { return object_.is_none(); }
    py::object& operator*() { return object_; }

  private:
    py::object object_;
};

// Lets other Python threads run while this one may wait for the GPU.
template <typename Function>
auto without_gil(const Function& function) {
    const py::gil_scoped_release released;
    return function();
}

// A forward whose backward is to come; ends with it, or when its graph is freed.
class PendingUse {
  public:
    explicit PendingUse(std::shared_ptr<Uses> uses) : uses_(std::move(uses)) { uses_->begin(); }
    ~PendingUse() { end(); }
    PendingUse(const PendingUse&) = delete;
    PendingUse& operator=(const PendingUse&) = delete;

    void end() {
        if (uses_ != nullptr) uses_->end();
        uses_ = nullptr;
    }

  private:
    std::shared_ptr<Uses> uses_;
};

// Addresses of two events, as Python has them.
using EventPair = std::pair<uintptr_t, uintptr_t>;

// One forward of a layer and its backward.
struct Call : torch::CustomClassHolder {
    Call(std::shared_ptr<PreparedLaunches> launches, py::object prepared, py::object trial,
         py::object meter, py::object needs, cudaStream_t side)
        : launches(std::move(launches)),
          prepared(std::move(prepared)),
          trial(std::move(trial)),
          meter(std::move(meter)),
          needs(std::move(needs)),
          side(side) {}

    std::shared_ptr<PreparedLaunches> launches;
    PythonHandle prepared;  // PreparedCall of comet_ds/fused/call.py
    PythonHandle trial;     // Trial of comet_ds/tuning/online.py, or None
    PythonHandle meter;     // ExposureMeter of comet_ds/fused/peer/exchange.py, or None
    PythonHandle needs;     // BackwardNeeds of comet_ds/ranks/gradients.py, if a rank runs no backward
    cudaStream_t side;
    std::optional<PendingUse> pending;
    std::vector<int64_t> versions;  // of the parameters

    // The events to record around a launch that overlaps with communication.
    LaunchEvents events(Pass pass) {
        if (trial.is_none()) return {};
        const py::gil_scoped_acquire gil;
        const auto found = (*trial).attr("events")(int(pass)).cast<EventPair>();
        return {reinterpret_cast<cudaEvent_t>(found.first),
                reinterpret_cast<cudaEvent_t>(found.second)};
    }

    // Where kernels note what communication takes; 0 forward, 1 backward.
    Exposure* exposure(int direction) {
        if (meter.is_none()) return nullptr;
        const py::gil_scoped_acquire gil;
        return reinterpret_cast<Exposure*>((*meter).attr("begin")(direction).cast<uintptr_t>());
    }

    // Refuses a backward that a rank will not come to.
    void check_present() {
        if (needs.is_none()) return;
        const py::gil_scoped_acquire gil;
        (*needs).attr("check_present")();
    }

    // Prepares the launches again, should the group's memory have moved since.
    void refresh() {
        if (launches->peers == nullptr || launches->generation == launches->peers->generation) {
            return;
        }
        const py::gil_scoped_acquire gil;
        *prepared = (*prepared).attr("current")();
        launches = (*prepared).attr("launches").cast<std::shared_ptr<PreparedLaunches>>();
    }

    void note_parameters() {
        for (const Tensor& param : launches->parameters->all()) {
            versions.push_back(param._version());
        }
    }

    // Refuses weights changed or moved since forward, as autograd refuses saved tensors.
    void check_parameters() const {
        const auto& params = launches->parameters->all();
        bool is_same = launches->parameters->are_in_place();
        for (size_t i = 0; i < params.size(); ++i) is_same &= params[i]._version() == versions[i];
        TORCH_CHECK(is_same,
                        "an expert parameter needed for gradient computation has been modified in "
                        "place or moved between forward and backward");
    }
};

// The gradients of one backward.
class Backward {
  public:
    Backward(AutogradContext* ctx, const Tensor& grad)
        : ctx_(ctx),
          call_(c10::static_intrusive_pointer_cast<Call>(ctx->saved_data.at("call").toCapsule())),
          grad_(aligned(grad)) {
        const auto saved = ctx->get_saved_variables();
        workspace_ = saved[0];
        rows_ = saved[1];
        pre_.assign(saved.begin() + 2, saved.end());
        call_->check_present();
        call_->check_parameters();
        call_->refresh();
    }

    variable_list run() {
        const PreparedLaunches& prepared = *call_->launches;
        const LayerCall& launches = *prepared.backward;
        const LayerSizes& s = launches.sizes();
        if (prepared.peers != nullptr) prepared.peers->enter();
        const cudaStream_t stream = current_stream(grad_);
        Exposure* exposure = call_->exposure(1);
        // Nobody reads the pre-activations again, unless the graph is kept: their gradients take
        // their place.
        is_kept_ = torch::autograd::get_current_graph_task_keep_graph();
        const size_t num_params = prepared.parameters->all().size();
        for (size_t i = 0; i < num_params; ++i) needs_params_ |= ctx_->needs_input_grad(2 + i);
        const auto fp32 = grad_.options().dtype(at::kFloat);
        Tensor grad_rows = at::empty_like(rows_);
        Tensor grad_weights = at::empty({grad_.size(0), s.top_k}, fp32);
        PerMatrix grad_pre = down(launches, grad_rows, grad_weights, exposure, stream);
        const bool has_dx = ctx_->needs_input_grad(0) || prepared.peers != nullptr;
        // One weight gradient is long enough to hide the results' way; alone, there is no such way.
        const bool has_first = prepared.peers != nullptr && needs_params_;
        if (has_first) new_grad(first());
        const Tensor needed_rows = has_dx ? grad_rows : Tensor();
        launches.backward_up(up_grad_tensors(launches, workspace_, grad_pre, rows_, needed_rows,
                                             has_first ? grads_[int(first())] : MatrixGrad{}),
                             has_first ? call_->events(Pass::kWeightGrad) : LaunchEvents{},
                             exposure, stream);
        if (has_first) free_memory(grad_pre[0]);
        Tensor grad_x;
        if (has_dx) {
            grad_x = at::empty_like(grad_);
            launches.sum_grads(
                token_grad_tensors(launches, workspace_, grad_rows, grad_x, grad_weights), exposure,
                stream);
        }
        grad_rows = Tensor();
        for (size_t i = has_first; needs_params_ && i < grad_pre.size(); ++i) {
            const MatrixOf matrix{int(first()) + int(i)};
            new_grad(matrix);
            launches.weight_grad(weight_grad_tensors(launches, workspace_, grad_pre[i], rows_,
                                                     grads_[int(matrix)], false),
                                 stream);
            free_memory(grad_pre[i]);
        }
        return finish(grad_x, grad_weights);
    }

  private:
    // gate, or up where there is none.
    MatrixOf first() const { return pre_.size() == 2 ? MatrixOf::kGate : MatrixOf::kUp; }

    // Through down, whose weight gradient is computed here; returns those of the pre-activations.
    PerMatrix down(const LayerCall& launches, const Tensor& grad_rows, const Tensor& grad_weights,
                   Exposure* exposure, cudaStream_t stream) {
        PerMatrix grad_pre = pre_;
        if (is_kept_) {
            for (Tensor& tensor : grad_pre) tensor = at::empty_like(tensor);
        }
        const Tensor weighted_hidden = at::empty_like(pre_[0]);
        const Tensor row_dots = at::empty({launches.num_row_dots(), rows_.size(0)},
                                          grad_weights.options());
        if (needs_params_) new_grad(MatrixOf::kDown);
        launches.backward_down(
            down_grad_tensors(launches, grad_, workspace_, grad_rows, pre_, grad_pre,
                              weighted_hidden, row_dots, grad_weights,
                              grads_[int(MatrixOf::kDown)]),
            call_->events(Pass::kDownGrad), exposure, stream);
        return grad_pre;
    }

    // Makes memory for the gradients of a matrix and its bias.
    void new_grad(MatrixOf matrix) {
        const LayerSizes& s = call_->launches->backward->sizes();
        const ExpertParameters& parameters = *call_->launches->parameters;
        const bool is_down = matrix == MatrixOf::kDown;
        const int64_t m = is_down ? s.hidden : s.ffn, n = is_down ? s.ffn : s.hidden;
        MatrixGrad& found = grads_[int(matrix)];
        if (parameters.has_bias(matrix)) {
            found.bias = at::empty({s.num_experts, m}, rows_.options());
        }
        const Tensor stack = parameters.stack(matrix);
        if (stack.defined() && !is_kept_ && parameters.uses->is_single() &&
            can_add_to_grad(stack)) {
            found.weight = stack.grad();
            found.is_added = true;
            ++call_->launches->parameters->num_added;
            return;
        }
        found.weight = at::empty({s.num_experts, m, n}, rows_.options());
    }

    variable_list finish(const Tensor& grad_x, const Tensor& grad_weights) {
        const ExpertParameters& parameters = *call_->launches->parameters;
        for (int i = 0; i < 3; ++i) {
            // Taken out of the parameter, so that autograd puts it back instead of adding it.
            if (grads_[i].is_added) parameters.stack(MatrixOf{i}).mutable_grad() = Tensor();
        }
        if (!is_kept_ && call_->pending) call_->pending->end();
        variable_list result{grad_x, grad_weights, {}, {}};
        auto in_order = parameters.in_order(grads_);
        grads_ = {};  // autograd takes a gradient that nobody else holds, and copies others
        for (Tensor& gradient : in_order) result.push_back(std::move(gradient));
        return result;
    }

    AutogradContext* ctx_;
    c10::intrusive_ptr<Call> call_;
    Tensor grad_, workspace_, rows_;
    PerMatrix pre_;
    std::array<MatrixGrad, 3> grads_;  // by matrix
    bool is_kept_ = false, needs_params_ = false;
};

class FusedExperts : public torch::autograd::Function<FusedExperts> {
  public:
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& topk_weights,
                          const RoutingTensors& routing, const c10::intrusive_ptr<Call>& call,
                          const at::TensorList parameters, bool has_backward) {
        const LayerCall& launches = *call->launches->forward;
        const LayerSizes& s = launches.sizes();
        const Tensor workspace =
            at::empty({launches.workspace().num_bytes}, x.options().dtype(at::kByte));
        RoutingTensors tables = routing;
        tables.topk_weights = topk_weights.contiguous();
        const PlanTensors plan = plan_tensors(launches, x, tables, workspace);
        const Streams streams{current_stream(x), call->side};
        Exposure* exposure = call->exposure(0);
        const int64_t num_rows =
            without_gil([&] { return launches.plan(plan, exposure, streams); });
        const Tensor rows = at::empty({num_rows, s.hidden}, x.options());
        const Tensor hidden = at::empty({num_rows, s.ffn}, x.options());
        PerMatrix pre;
        for (int i = 0; has_backward && i < 1 + s.is_gated; ++i) {
            pre.push_back(at::empty_like(hidden));
        }
        const Tensor results = at::empty_like(rows), output = at::empty_like(x);
        const bool is_pulling = launches.has_peers() && !launches.is_pushed();
        const LaunchEvents events[2] = {is_pulling ? call->events(Pass::kUp) : LaunchEvents{},
                                        call->events(Pass::kDown)};
        const auto tensors = forward_tensors(launches, plan, rows, hidden, pre, results, output);
        launches.forward(tensors, events, exposure, streams);
        if (has_backward) {
            call->note_parameters();
            call->pending.emplace(call->launches->parameters->uses);
            variable_list saved{workspace, rows};
            saved.insert(saved.end(), pre.begin(), pre.end());
            ctx->save_for_backward(std::move(saved));
            ctx->saved_data["call"] = c10::IValue::make_capsule(call);
        }
        return output;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        return once_differentiable([&] {
            variable_list found = Backward(ctx, grads[0]).run();
            found.emplace_back();  // has_backward
            return found;
        });
    }
};

Tensor run_experts(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids,
                   const Tensor& slot_in_expert, const Tensor& kept_counts,
                   const std::shared_ptr<PreparedLaunches>& launches, py::object prepared,
                   py::object trial, py::object meter, py::object needs, uintptr_t side_stream) {
    const auto& parameters = launches->parameters->all();
    bool has_backward = x.requires_grad() || topk_weights.requires_grad();
    for (const Tensor& param : parameters) has_backward |= param.requires_grad();
    auto call = c10::make_intrusive<Call>(launches, std::move(prepared), std::move(trial),
                                          std::move(meter), std::move(needs),
                                          reinterpret_cast<cudaStream_t>(side_stream));
    const RoutingTensors routing{topk_ids, {}, slot_in_expert, kept_counts};
    return FusedExperts::apply(x, topk_weights, routing, call, at::TensorList(parameters),
                               has_backward && at::GradMode::is_enabled());
}

}  // namespace

void Uses::begin() {
    const std::lock_guard lock(mutex_);
    were_several_ |= ++num_pending_ > 1;
}

void Uses::end() {
    const std::lock_guard lock(mutex_);
    were_several_ &= --num_pending_ > 0;
}

bool Uses::is_single() const {
    const std::lock_guard lock(mutex_);
    return num_pending_ == 1 && !were_several_;
}

ExpertParameters::ExpertParameters(std::vector<ParameterGroup> weights,
                                   std::vector<ParameterGroup> biases)
    : weights_(std::move(weights)), biases_(std::move(biases)) {
    std::fill_n(weight_of_, 3, -1);
    std::fill_n(bias_of_, 3, -1);
    for (size_t i = 0; i < weights_.size(); ++i) weight_of_[int(weights_[i].matrix)] = i;
    for (size_t i = 0; i < biases_.size(); ++i) bias_of_[int(biases_[i].matrix)] = i;
    for (const auto* groups : {&weights_, &biases_}) {
        for (const auto& group : *groups) {
            all_.insert(all_.end(), group.params.begin(), group.params.end());
        }
    }
    for (const Tensor& param : all_) addresses_.push_back(param.const_data_ptr());
}

bool ExpertParameters::are_in_place() const {
    for (size_t i = 0; i < all_.size(); ++i) {
        if (all_[i].const_data_ptr() != addresses_[i]) return false;
    }
    return true;
}

Tensor ExpertParameters::stack(MatrixOf matrix) const {
    const ParameterGroup& group = weights_[weight_of_[int(matrix)]];
    return group.is_stacked ? group.params[0] : Tensor();
}

variable_list ExpertParameters::in_order(const std::array<MatrixGrad, 3>& grads) const {
    variable_list found;
    const auto append = [&](const ParameterGroup& group, const Tensor& grad) {
        if (!grad.defined()) {
            found.resize(found.size() + group.params.size());
        } else if (group.is_stacked) {
            found.push_back(grad.view(group.params[0].sizes()));
        } else {
            for (const Tensor& part : grad.unbind()) found.push_back(part);
        }
    };
    for (const auto& group : weights_) append(group, grads[int(group.matrix)].weight);
    for (const auto& group : biases_) append(group, grads[int(group.matrix)].bias);
    return found;
}

Streams PeerStreams::enter() {
    const auto device = c10::cuda::current_device();
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device).stream();
    cudaStreamCaptureStatus status;
    check(cudaStreamIsCapturing(stream, &status), "enter");
    if (status != cudaStreamCaptureStatusNone) {
        is_captured = true;
    } else if (last_ != stream) {
        if (last_) {
            cudaEvent_t event;
            check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "enter");
            check(cudaEventRecord(event, *last_), "enter");
            check(cudaStreamWaitEvent(stream, event, 0), "enter");
            check(cudaEventDestroy(event), "enter");
        }
        last_ = stream;
    }
    if (!side_) side_ = c10::cuda::getStreamFromPool(false, device).stream();
    return {stream, *side_};
}

void bind_experts(py::module_& m) {
    using py::arg;
    py::enum_<MatrixOf>(m, "MatrixOf")
        .value("gate", MatrixOf::kGate)
        .value("up", MatrixOf::kUp)
        .value("down", MatrixOf::kDown);
    py::class_<ParameterGroup>(m, "ParameterGroup")
        .def(py::init([](MatrixOf matrix, std::vector<Tensor> params, bool is_stacked) {
                 return ParameterGroup{matrix, std::move(params), is_stacked};
             }),
             arg("matrix"), arg("params"), arg("is_stacked"));
    py::class_<ExpertParameters, std::shared_ptr<ExpertParameters>>(m, "ExpertParameters")
        .def(py::init<std::vector<ParameterGroup>, std::vector<ParameterGroup>>(), arg("weights"),
             arg("biases"))
        .def("are_in_place", &ExpertParameters::are_in_place)
        .def_property_readonly("num_added",
                               [](const ExpertParameters& p) { return p.num_added.load(); });
    py::class_<Uses, std::shared_ptr<Uses>>(m, "Uses")
        .def(py::init<>())
        .def("begin", &Uses::begin)
        .def("end", &Uses::end)
        .def_property_readonly("is_single", &Uses::is_single);
    py::class_<PeerStreams, std::shared_ptr<PeerStreams>>(m, "PeerStreams")
        .def(py::init<>())
        .def("enter",
             [](PeerStreams& streams) {
                 return uintptr_t(streams.enter().side);
             })
        .def("set_side",
             [](PeerStreams& streams, uintptr_t side) {
                 streams.set_side(reinterpret_cast<cudaStream_t>(side));
             })
        .def_readwrite("generation", &PeerStreams::generation)
        .def_readonly("is_captured", &PeerStreams::is_captured);
    py::class_<PreparedLaunches, std::shared_ptr<PreparedLaunches>>(m, "PreparedLaunches")
        .def(py::init([](std::shared_ptr<LayerCall> forward, std::shared_ptr<LayerCall> backward,
                         std::shared_ptr<ExpertParameters> parameters,
                         std::shared_ptr<PeerStreams> peers) {
                 const int64_t generation = peers == nullptr ? 0 : peers->generation;
                 return std::make_shared<PreparedLaunches>(
                     PreparedLaunches{std::move(forward), std::move(backward),
                                      std::move(parameters), std::move(peers), generation});
             }),
             py::kw_only(), arg("forward"), arg("backward"), arg("parameters"), arg("peers"))
        .def_readonly("forward", &PreparedLaunches::forward)
        .def_readonly("backward", &PreparedLaunches::backward)
        .def_readonly("generation", &PreparedLaunches::generation);
    m.def("run_experts", &run_experts, py::kw_only(), arg("x"), arg("topk_weights"),
          arg("topk_ids"), arg("slot_in_expert"), arg("kept_counts"), arg("launches"),
          arg("prepared"), arg("trial"), arg("meter"), arg("needs"), arg("side_stream"));
}

}  // namespace comet_ds
