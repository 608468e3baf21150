// SPDX-License-Identifier: Apache-2.0
// Launches of layer_call.h, in order.
#include "host/layer_call.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "host/launch.h"
#include "host/tensor_map.h"
#include "rows/combine.h"

namespace comet_ds {
namespace {

// Rows of the boxes of operands, and of what epilogues read and write.
constexpr int kOperandRows = 64, kResultRows = 16;
constexpr int64_t kPartAlignment = 256;  // bytes; parts of the workspace start at multiples

// Tile orders in the plan (RowPlan::block_order), where several ranks take part: plain, and for the
// passes that overlap communication.
enum TileOrder : int { kPlainOrder = 0, kUpOrder = 1, kDownGradOrder = 2, kDownOrder = 3 };
constexpr int kNumPeerOrders = 4;

enum CounterSet : int { kPullCounters = 0, kPushCounters = 1 };

const Communication kNoCommunication{};

struct Timeline {
    uintptr_t next = 0, end = 0;

    Record* take(int num_ctas) {
        const size_t num_bytes = size_t(num_ctas) * kRecordLists * kMaxRecords * sizeof(Record);
        if (!kTimeline || end - next < num_bytes) return nullptr;
        next += num_bytes;
        return reinterpret_cast<Record*>(next - num_bytes);
    }
} timeline;

template <typename T>
T* at(void* base, int64_t offset) {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(base) + offset);
}

const uint8_t* advance(const void* base, int64_t num_bytes) {
    return static_cast<const uint8_t*>(base) + num_bytes;
}

Workspace lay_out(const LayerSizes& s, bool has_peers) {
    const int64_t blocks = s.max_rows / kRowBlock, tokens = s.num_all_tokens();
    const int64_t ranks = s.num_ranks(), orders = has_peers ? kNumPeerOrders : 1;
    const int64_t words = sizeof(Counters) / sizeof(uint32_t) + std::max(blocks, ranks);
    Workspace w{.parts = {{"row_of_route", 0, 8, {tokens, s.top_k}},
                          {"topk_ids", 0, 8, {tokens, s.top_k}},
                          {"route_weights", 0, 4, {tokens, s.top_k}},
                          {"token_of_row", 0, 4, {s.max_rows}},
                          {"row_weights", 0, 4, {s.max_rows}},
                          {"expert_offsets", 0, 4, {s.num_experts + 1}},
                          {"block_order", 0, 4, {orders, blocks}},
                          {"expert_order", 0, 4, {orders, blocks}},
                          {"remote_begin", 0, 4, {orders, ranks}},
                          {"remote_rows", 0, 4, {blocks}},
                          {"peers", 0, 4, {tokens}},
                          {"counters", 0, 4, {2, words}}},
                .num_bytes = 0};
    for (auto& part : w.parts) {
        part.offset = w.num_bytes;
        const int64_t items = std::accumulate(part.shape.begin(), part.shape.end(), int64_t{1},
                                              std::multiplies<int64_t>());
        w.num_bytes += (items * part.item_bytes + kPartAlignment - 1) / kPartAlignment *
                       kPartAlignment;
    }
    return w;
}

// Returns how many rows to allocate for so many: a few sizes in all, so that memory which a step
// frees fits the next one, whatever its routing; at most a sixteenth more than needed.
int64_t room_for(int64_t num_rows, int64_t max_rows) {
    const uint64_t blocks = std::max<int64_t>(num_rows / kRowBlock, 1);
    const uint64_t step = std::max<uint64_t>(std::bit_floor(blocks) / 16, 1);
    return std::min<int64_t>((blocks + step - 1) / step * step * kRowBlock, max_rows);
}

}  // namespace

size_t set_timeline_room(uintptr_t records, size_t num_bytes) {
    const size_t left = timeline.end - timeline.next;
    timeline = {records, records + num_bytes};
    return left;
}

int64_t LayerSizes::num_all_tokens() const {
    return std::accumulate(num_tokens.begin(), num_tokens.end(), int64_t{0});
}

int64_t Workspace::offset(const char* name) const {
    for (const auto& part : parts) {
        if (std::strcmp(part.name, name) == 0) return part.offset;
    }
    throw std::logic_error(std::string("no part of the workspace is called ") + name);
}

LayerCall::LayerCall(LayerSizes sizes, LayerWeights weights, CtaSplits splits, PeerPlaces places)
    : sizes_(std::move(sizes)),
      weights_(weights),
      splits_(splits),
      places_(std::move(places)),
      workspace_(lay_out(sizes_, places_.is_used)) {
    if (sizes_.num_ranks() > kMaxRanks) throw std::invalid_argument("too many ranks");
    if (sizes_.max_rows % kRowBlock != 0) {
        throw std::invalid_argument("max_rows must be a multiple of " + std::to_string(kRowBlock));
    }
    if (!has_peers()) return;
    if (places_.mailboxes.flags[0] != nullptr && sizes_.top_k > kMaxTopK) {
        throw std::invalid_argument("at most " + std::to_string(kMaxTopK) +
                                    " routes per token, got " + std::to_string(sizes_.top_k));
    }
    check(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming), "LayerCall");
    check(cudaEventCreateWithFlags(&joined_, cudaEventDisableTiming), "LayerCall");
    if (!sizes_.counts_rows) return;
    void* count;
    check(cudaHostAlloc(&count, 2 * sizeof(int64_t), cudaHostAllocMapped), "LayerCall");
    row_count_ = static_cast<int64_t*>(count);
    row_count_[1] = 0;
}

LayerCall::~LayerCall() {
    for (cudaEvent_t event : {forked_, joined_}) {
        if (event != nullptr) cudaEventDestroy(event);
    }
    if (row_count_ != nullptr) cudaFreeHost(const_cast<int64_t*>(row_count_));
}

int64_t LayerCall::num_row_dots() const {
    return (sizes_.ffn + kDownGradTileCols - 1) / kDownGradTileCols;
}

// ---- forward -----------------------------------------------------------------------------------

void LayerCall::begin(const void* tokens, Streams streams) const {
    if (!has_peers()) return;
    fork(streams);
    if (is_pushed()) return send_half(0, tokens, streams);
    CopyParams params{.num_copies = 1};
    params.from[0] = tokens;
    params.to[0] = places_.published;
    params.num_bytes[0] = sizes_.num_own_tokens() * sizes_.hidden * 2;
    publish(params, streams.side);
}

void LayerCall::forward(const ForwardTensors& t, const LaunchEvents (&events)[2],
                        Exposure* exposure, Streams streams) const {
    dispatch(t, exposure, streams);
    up(t, events[0], exposure, streams.main);
    down(t, events[1], exposure, streams.main);
    const Sources sources = this->sources(t.plan.tokens, t.plan.routing, nullptr);
    combine(t.results, t.plan.workspace, t.plan.routing.topk_weights, sources, t.output, exposure,
            streams.main);
}

int64_t LayerCall::plan(const PlanTensors& t, Exposure* exposure, Streams streams) const {
    if (row_count_ == nullptr) return sizes_.max_rows;
    exchange_tables(t, exposure, streams);
    const Sources sources = this->sources(t.tokens, t.routing, nullptr);
    count_rows(sources, sizes_.num_experts, const_cast<int64_t*>(row_count_), ++num_counted_,
               streams.main);
    comet_ds::plan_rows(sources, row_plan(t.workspace, sizes_.max_rows), streams.main);
    return room_for(wait_for_count(streams.main), sizes_.max_rows);
}

int64_t LayerCall::wait_for_count(cudaStream_t stream) const {
    constexpr unsigned kPollsPerQuery = 4096;  // reading memory is cheap, asking the driver is not
    for (unsigned polls = 1; row_count_[1] != num_counted_; ++polls) {
        if (polls % kPollsPerQuery != 0) continue;
        const cudaError_t error = cudaStreamQuery(stream);
        if (error != cudaErrorNotReady) check(error, "counting rows");
    }
    return row_count_[0];
}

void LayerCall::exchange_tables(const PlanTensors& t, Exposure* exposure, Streams streams) const {
    send_tables(t.routing, streams.main);
    if (!is_pushed()) join(streams);  // the tokens, too, are published
    sync_ranks(RankBarrier::kTokens, exposure, streams.main);
    if (is_pushed()) {  // the first half has left the link to the tables
        fork(streams);
        send_half(1, t.tokens, streams);
    }
}

void LayerCall::plan_and_dispatch(const ForwardTensors& t, cudaStream_t stream) const {
    const int64_t num_counters = 2 * workspace_.parts.back().shape[1];
    comet_ds::plan_and_dispatch(sources(t.plan.tokens, t.plan.routing, nullptr),
                                row_plan(t.plan.workspace, t.num_rows), t.rows, sizes_.hidden * 2,
                                counters(t.plan.workspace, 0), num_counters, stream);
}

void LayerCall::dispatch(const ForwardTensors& t, Exposure* exposure, Streams streams) const {
    const cudaStream_t stream = streams.main;
    if (!has_peers()) return plan_and_dispatch(t, stream);
    const Sources sources = this->sources(t.plan.tokens, t.plan.routing, nullptr);
    const RowPlan rows = row_plan(t.plan.workspace, t.num_rows);
    if (row_count_ != nullptr) {  // `plan` has written the plan
        dispatch_rows(sources, rows, nullptr, t.rows, sizes_.hidden * 2,
                      counters(t.plan.workspace, 0), 2 * workspace_.parts.back().shape[1], stream);
    } else {
        exchange_tables(t.plan, exposure, streams);
        plan_and_dispatch(t, stream);
    }
    if (is_pushed()) {
        join(streams);
        sync_ranks(RankBarrier::kPushedTokens, exposure, stream);
        dispatch_other_rows(sources, rows, t.rows, sizes_.hidden * 2, stream);
    }
}

void LayerCall::up(const ForwardTensors& t, const LaunchEvents& events, Exposure* exposure,
                   cudaStream_t stream) const {
    const auto& s = sizes_;
    const bool is_pulling = has_peers() && !is_pushed();
    const RowPlan plan = row_plan(t.plan.workspace, t.num_rows);
    const auto result_map = [&](void* result) {
        return encode_tensor_map({uintptr_t(result), 1, t.num_rows, s.ffn}, s.is_bfloat16,
                                 kResultRows);
    };
    UpParams params{.x = encode_tensor_map({uintptr_t(t.rows), 1, t.num_rows, s.hidden},
                                           s.is_bfloat16, kOperandRows),
                    .h = result_map(t.hidden),
                    .shape = gemm_shape(plan, s.ffn),
                    .tiles = row_tiles(plan, is_pulling ? kUpOrder : kPlainOrder, s.hidden),
                    .saves_gate_up = t.pre[0] != nullptr};
    const int first = s.is_gated ? 0 : 1;
    for (int i = 0; i < 1 + s.is_gated; ++i) {
        if (params.saves_gate_up) params.gate_up[i] = result_map(t.pre[i]);
        params.weights[i] = weights_.maps[first + i];
        params.bias[i] = weights_.biases[first + i];
    }
    Communication communication{};
    if (is_pulling) {
        communication = this->communication(sources(t.plan.tokens, t.plan.routing, nullptr),
                                            t.plan.workspace, t.rows, kPullCounters,
                                            splits_.pull.num_comm_ctas, t.num_rows, exposure);
    }
    launch(params, communication, events, stream);
}

void LayerCall::down(const ForwardTensors& t, const LaunchEvents& events, Exposure* exposure,
                     cudaStream_t stream) const {
    const auto& s = sizes_;
    const RowPlan plan = row_plan(t.plan.workspace, t.num_rows);
    const DownParams params{
        .h = encode_tensor_map({uintptr_t(t.hidden), 1, t.num_rows, s.ffn}, s.is_bfloat16,
                               kOperandRows),
        .y = encode_tensor_map({uintptr_t(t.results), 1, t.num_rows, s.hidden}, s.is_bfloat16,
                               kResultRows),
        .weights = weights_.maps[int(MatrixOf::kDown)],
        .bias = weights_.biases[int(MatrixOf::kDown)],
        .shape = gemm_shape(plan, s.hidden),
        .tiles = row_tiles(plan, has_peers() ? kDownOrder : kPlainOrder, s.ffn)};
    Communication communication{};
    if (has_peers()) {
        communication = this->communication(sources(t.plan.tokens, t.plan.routing, nullptr),
                                            t.plan.workspace, t.results, kPushCounters,
                                            splits_.push.num_comm_ctas, t.num_rows, exposure);
        communication.remote_begin =
            communication.exchange.plan.remote_begin + kDownOrder * s.num_ranks();
    }
    launch(params, communication, events, stream);
}

// ---- backward ----------------------------------------------------------------------------------

void LayerCall::backward_down(const DownGradTensors& t, const LaunchEvents& events,
                              Exposure* exposure, cudaStream_t stream) const {
    const auto& s = sizes_;
    const Sources sources = this->sources(t.grad, {}, t.grad_weights);
    const RowPlan plan = row_plan(t.workspace, t.num_rows);
    void* published = has_peers() ? places_.published : nullptr;
    dispatch_rows(sources, plan, published, t.grad_rows, s.hidden * 2, counters(t.workspace, 0),
                  2 * workspace_.parts.back().shape[1], stream);
    if (has_peers()) sync_ranks(RankBarrier::kTokens, exposure, stream);
    down_grad(t, events, exposure, stream);
    sum_row_dots(sources, plan, t.row_dots, num_row_dots(), t.grad_rows,
                 weights_.biases[int(MatrixOf::kDown)], s.hidden, s.is_bfloat16, stream);
    if (t.grad_down == nullptr) return;
    weight_grad({.workspace = t.workspace,
                 .num_rows = t.num_rows,
                 .a = t.grad_rows,
                 .b = t.weighted_hidden,
                 .a_cols = s.hidden,
                 .b_cols = s.ffn,
                 .grad = t.grad_down,
                 .grad_bias = t.grad_down_bias,
                 .is_weighted = true,
                 .adds = t.adds_to_down},
                stream);
}

void LayerCall::down_grad(const DownGradTensors& t, const LaunchEvents& events,
                          Exposure* exposure, cudaStream_t stream) const {
    const auto& s = sizes_;
    const RowPlan plan = row_plan(t.workspace, t.num_rows);
    DownGradParams params{
        .grad_y = encode_tensor_map({uintptr_t(t.grad_rows), 1, t.num_rows, s.hidden},
                                    s.is_bfloat16, kOperandRows),
        .weighted_h = t.weighted_hidden,
        .weights = weights_.maps[int(MatrixOf::kDown)],
        .row_weights = plan.row_weights,
        .row_dots = t.row_dots,
        .shape = gemm_shape(plan, s.ffn),
        .tiles = row_tiles(plan, has_peers() ? kDownGradOrder : kPlainOrder, s.hidden),
        .num_rows = int(t.num_rows)};
    for (int i = 0; i < 1 + s.is_gated; ++i) {
        params.gate_up[i] = t.pre[i];
        params.grad_preact[i] = t.grad_pre[i];
    }
    Communication communication{};
    if (has_peers()) {
        communication = this->communication(sources(t.grad, {}, nullptr), t.workspace, t.grad_rows,
                                            kPullCounters, splits_.pull_grad.num_comm_ctas,
                                            t.num_rows, exposure);
    }
    launch(params, communication, events, stream);
}

void LayerCall::backward_up(const UpGradTensors& t, const LaunchEvents& events, Exposure* exposure,
                            cudaStream_t stream) const {
    const auto& s = sizes_;
    const bool has_weight_grad = t.grad_first != nullptr;
    if (t.grad_rows != nullptr) up_grad(t, stream);
    Communication communication{};
    if (has_peers()) {
        const int num_comm_ctas = has_weight_grad ? splits_.push_grad.num_comm_ctas : s.num_sms;
        communication = this->communication(sources(nullptr, {}, nullptr), t.workspace,
                                            t.grad_rows, kPushCounters, num_comm_ctas, t.num_rows,
                                            exposure);
        if (!has_weight_grad) push_sums(communication, false, s.num_sms, stream);
    }
    if (has_weight_grad) {
        weight_grad({.workspace = t.workspace,
                     .num_rows = t.num_rows,
                     .a = t.grad_pre[0],
                     .b = t.rows,
                     .a_cols = s.ffn,
                     .b_cols = s.hidden,
                     .grad = t.grad_first,
                     .grad_bias = t.grad_first_bias,
                     .is_weighted = false,
                     .adds = t.adds_to_first},
                    communication, events, stream);
    }
}

void LayerCall::sum_grads(const TokenGradTensors& t, Exposure* exposure,
                          cudaStream_t stream) const {
    combine(t.grad_rows, t.workspace, nullptr, sources(nullptr, {}, nullptr), t.grad_tokens,
            exposure, stream);
    const size_t num_bytes = sizes_.num_own_tokens() * sizes_.top_k * sizeof(float);
    if (has_peers() && num_bytes > 0) {
        const float* summed = places_.sources.source[sizes_.rank].grad_weights;
        check(cudaMemcpyAsync(t.grad_weights, summed, num_bytes, cudaMemcpyDeviceToDevice, stream),
              "sum_grads");
    }
}

void LayerCall::up_grad(const UpGradTensors& t, cudaStream_t stream) const {
    const auto& s = sizes_;
    const RowPlan plan = row_plan(t.workspace, t.num_rows);
    UpGradParams params{
        .grad_x = encode_tensor_map({uintptr_t(t.grad_rows), 1, t.num_rows, s.hidden},
                                    s.is_bfloat16, kResultRows),
        .shape = gemm_shape(plan, s.hidden),
        .tiles = row_tiles(plan, kPlainOrder, s.ffn)};
    const int first = s.is_gated ? 0 : 1;
    for (int i = 0; i < 1 + s.is_gated; ++i) {
        params.grad_preact[i] = encode_tensor_map({uintptr_t(t.grad_pre[i]), 1, t.num_rows, s.ffn},
                                                  s.is_bfloat16, kOperandRows);
        params.weights[i] = weights_.maps[first + i];
    }
    launch(params, kNoCommunication, {}, stream);
}

void LayerCall::weight_grad(const WeightGradTensors& t, cudaStream_t stream) const {
    weight_grad(t, kNoCommunication, {}, stream);
}

void LayerCall::weight_grad(const WeightGradTensors& t, const Communication& communication,
                            const LaunchEvents& events, cudaStream_t stream) const {
    const auto& s = sizes_;
    const RowPlan plan = row_plan(t.workspace, t.num_rows);
    const WeightGradParams params{
        .a = encode_tensor_map({uintptr_t(t.a), 1, t.num_rows, t.a_cols}, s.is_bfloat16,
                               kOperandRows),
        .b = encode_tensor_map({uintptr_t(t.b), 1, t.num_rows, t.b_cols}, s.is_bfloat16,
                               kOperandRows),
        .grad = encode_tensor_map({uintptr_t(t.grad), s.num_experts, t.a_cols, t.b_cols},
                                  s.is_bfloat16, kResultRows),
        .shape = gemm_shape(plan, t.b_cols),
        .m = int(t.a_cols),
        .accumulates = t.adds};
    launch(params, communication, events, stream);
    if (t.grad_bias != nullptr) {
        sum_expert_rows(plan, t.a, t.is_weighted, t.a_cols, s.is_bfloat16, t.grad_bias, stream);
    }
}

// ---- parts of both -----------------------------------------------------------------------------

RowPlan LayerCall::row_plan(void* workspace, int64_t num_rows) const {
    const auto offset = [&](int part) { return workspace_.parts[part].offset; };
    RowPlan plan{.row_of_route = at<int64_t>(workspace, offset(0)),
                 .token_of_row = at<int32_t>(workspace, offset(3)),
                 .row_weights = at<float>(workspace, offset(4)),
                 .expert_offsets = at<int32_t>(workspace, offset(5)),
                 .block_order = at<int32_t>(workspace, offset(6)),
                 .expert_order = at<int32_t>(workspace, offset(7)),
                 .remote_begin = at<int32_t>(workspace, offset(8)),
                 .remote_rows = at<int32_t>(workspace, offset(9)),
                 .topk_ids = at<int64_t>(workspace, offset(1)),
                 .route_weights = at<float>(workspace, offset(2)),
                 .peers = at<uint32_t>(workspace, offset(10)),
                 .num_tokens = sizes_.num_all_tokens(),
                 .top_k = sizes_.top_k,
                 .num_experts = sizes_.num_experts,
                 .max_rows = sizes_.max_rows,
                 .num_rows = num_rows,
                 .num_split_experts = {0},
                 .num_tile_orders = has_peers() ? kNumPeerOrders : 1};
    plan.num_split_experts[kUpOrder] = splits_.pull.num_split_experts;
    plan.num_split_experts[kDownGradOrder] = splits_.pull_grad.num_split_experts;
    plan.num_split_experts[kDownOrder] = splits_.push.num_split_experts;
    return plan;
}

uint32_t* LayerCall::counters(void* workspace, int which) const {
    const auto& part = workspace_.parts.back();
    return at<uint32_t>(workspace, part.offset) + which * part.shape[1];
}

Sources LayerCall::sources(const void* tokens, const RoutingTables& routing,
                           float* grad_weights) const {
    Sources sources = places_.sources;
    Source& own = sources.source[sizes_.rank];
    own.topk_ids = routing.topk_ids;
    own.topk_weights = routing.topk_weights;
    own.slot_in_expert = routing.slot_in_expert;
    own.kept_counts = routing.kept_counts;
    own.tokens = tokens;
    if (!has_peers()) own.grad_weights = grad_weights;
    return sources;
}

Communication LayerCall::communication(const Sources& sources, void* workspace, void* rows,
                                       int counters, int num_comm_ctas, int64_t num_rows,
                                       Exposure* exposure) const {
    return {.exchange = {.sources = sources,
                         .plan = row_plan(workspace, num_rows),
                         .hidden = sizes_.hidden,
                         .dtype = sizes_.is_bfloat16 ? DType::kBFloat16 : DType::kFloat16},
            .rows = rows,
            .num_comm_ctas = num_comm_ctas,
            .remote_begin = nullptr,
            .counters = reinterpret_cast<Counters*>(this->counters(workspace, counters)),
            .timeout_ns = places_.timeout_ns,
            .late = places_.late,
            .exposure = exposure};
}

GemmShape LayerCall::gemm_shape(const RowPlan& plan, int64_t n) const {
    return {.expert_offsets = plan.expert_offsets,
            .num_experts = int(plan.num_experts),
            .n = int(n),
            .records = timeline.take(sizes_.num_sms)};
}

RowTiles LayerCall::row_tiles(const RowPlan& plan, int tile_order, int64_t k) const {
    const int64_t begin = tile_order * (plan.max_rows / kRowBlock);
    return {.block_order = plan.block_order + begin,
            .expert_order = plan.expert_order + begin,
            .k = int(k)};
}

template <typename Params>
void LayerCall::launch(const Params& params, const Communication& communication,
                       const LaunchEvents& events, cudaStream_t stream) const {
    const ExpertGemmVariant variant{sizes_.is_bfloat16, sizes_.is_gated, sizes_.activation};
    const bool is_timed = events.start != nullptr && communication.num_comm_ctas > 0;
    if (is_timed) check(cudaEventRecord(events.start, stream), "expert_gemm");
    expert_gemm(params, variant, communication, sizes_.num_sms, stream);
    if (is_timed) check(cudaEventRecord(events.end, stream), "expert_gemm");
}

void LayerCall::combine(const void* rows, void* workspace, const float* weights,
                        const Sources& sources, void* output, Exposure* exposure,
                        cudaStream_t stream) const {
    const RowPlan plan = row_plan(workspace, sizes_.max_rows);
    const DType dtype = sizes_.is_bfloat16 ? DType::kBFloat16 : DType::kFloat16;
    if (has_peers()) {
        sync_ranks(RankBarrier::kResults, exposure, stream);
        const ExchangeParams params{sources, plan, sizes_.hidden, dtype};
        return sum_partials(params, rows, weights != nullptr, output, stream);
    }
    combine_forward({.rows = rows,
                     .row_of_route = plan.row_of_route,
                     .weights = weights,
                     .output = output,
                     .num_tokens = sizes_.num_own_tokens(),
                     .top_k = sizes_.top_k,
                     .hidden = sizes_.hidden},
                    dtype, stream);
}

void LayerCall::send_tables(const RoutingTables& routing, cudaStream_t stream) const {
    const int64_t routes = sizes_.num_own_tokens() * sizes_.top_k;
    CopyParams params{.num_copies = 0};
    const auto add = [&](const void* from, void* to, int64_t num_bytes) {
        params.from[params.num_copies] = from;
        params.to[params.num_copies] = to;
        params.num_bytes[params.num_copies++] = num_bytes;
    };
    for (int i = 0; i < sizes_.num_ranks() - 1; ++i) {
        add(routing.topk_ids, places_.topk_ids[i], routes * 8);
        add(routing.topk_weights, places_.topk_weights[i], routes * 4);
        add(routing.slot_in_expert, places_.slot_in_expert[i], routes * 4);
        add(routing.kept_counts, places_.kept_counts[i], sizes_.num_all_experts * 4);
    }
    publish(params, stream);
}

void LayerCall::send_half(int half, const void* tokens, Streams streams) const {
    const int64_t count = sizes_.num_own_tokens(), row_bytes = sizes_.hidden * 2;
    const int64_t begin = count * half / 2 * row_bytes, end = count * (half + 1) / 2 * row_bytes;
    if (begin == end) return;
    for (void* to : places_.tokens) {
        if (places_.has_copy_engines) {
            push_by_copy_engine(advance(tokens, begin), at<void>(to, begin), end - begin,
                                streams.side);
            continue;
        }
        CopyParams params{.num_copies = 1};
        params.from[0] = advance(tokens, begin);
        params.to[0] = at<void>(to, begin);
        params.num_bytes[0] = end - begin;
        publish(params, streams.side);
    }
}

void LayerCall::sync_ranks(RankBarrier barrier, Exposure* exposure, cudaStream_t stream) const {
    comet_ds::sync_ranks({.mailboxes = places_.mailboxes,
                          .epoch = places_.epoch,
                          .late = places_.late,
                          .timeout_ns = places_.timeout_ns,
                          .barrier = barrier,
                          .exposure = exposure},
                         stream);
}

void LayerCall::fork(Streams streams) const {
    check(cudaEventRecord(forked_, streams.main), "fork");
    check(cudaStreamWaitEvent(streams.side, forked_, 0), "fork");
}

void LayerCall::join(Streams streams) const {
    check(cudaEventRecord(joined_, streams.side), "join");
    check(cudaStreamWaitEvent(streams.main, joined_, 0), "join");
}

}  // namespace comet_ds
