// SPDX-License-Identifier: Apache-2.0
// Grouped GEMMs of the experts' MLPs, forward and backward: parameters and host launchers.
//
// An expert has matrices gate and up, [ffn, hidden] each, and down, [hidden, ffn]; without gating
// it has no gate. R is the number of rows of all experts (rows/dispatch.h). "gate_up" stands for
// the pre-activations of gate and up, [R, ffn] each, or of up alone; grad_preact for their
// gradients.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "gemm/timeline.h"
#include "peer/exchange.h"

namespace comet_ds {

// Columns of kDownGrad's tiles. Each tile leaves one partial dot product per row.
constexpr int kDownGradTileCols = 128;

// Codes are shared with Python.
enum class Activation : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

// The GEMMs, for rows of expert e. Codes are shared with Python.
enum class Pass : int {
    kUp = 0,          // preact = x up[e]^T + bias; h = act(preact); gated: h = act(gate) * up
    kDown = 1,        // y = h down[e]^T + bias
    kDownGrad = 2,    // dh = dy down[e]; from it grad_preact, weighted h and the dots <dh, h>
    kUpGrad = 3,      // dx = grad_preact up[e]; gated: the sum of the products with gate and up
    kWeightGrad = 4,  // grad up[e] = grad_preact^T x, or grad down[e] = dy^T (weighted h)
};

// --- parameters: one struct per pass, made of parts that passes share ----------------------------
//
// Tensor maps of operands have boxes of 64 x 64 elements, those of results 16 x 64 (a warp's rows).
// Arrays of two hold [gate, up], or up alone at [0].

// Of every pass.
struct GemmShape {
    const int* expert_offsets;  // [num_experts + 1]: first row, multiples of kRowBlock
    int num_experts;
    int n;            // columns of the result; of one matrix where it is gated
    Record* records;  // of this launch's CTAs (timeline.h), or null
};

// Of the passes whose tiles are rows: all but kWeightGrad.
struct RowTiles {
    const int* block_order;   // [row blocks]: the pass's tile order
    const int* expert_order;  // [row blocks]: the expert of each block of block_order
    int k;                    // length of the reduction; of one matrix where it is gated
};

struct UpParams {
    static constexpr Pass kPass = Pass::kUp;
    CUtensorMap x;                  // [R, hidden]
    CUtensorMap h;                  // [R, ffn], written
    CUtensorMap gate_up[2];         // [R, ffn] each, written
    const CUtensorMap* weights[2];  // [num_experts] each
    const void* const* bias[2];     // [num_experts] each, or null
    GemmShape shape;
    RowTiles tiles;
    bool saves_gate_up;  // whether gate_up is written
};

struct DownParams {
    static constexpr Pass kPass = Pass::kDown;
    CUtensorMap h;               // [R, ffn]
    CUtensorMap y;               // [R, hidden], written
    const CUtensorMap* weights;  // [num_experts]
    const void* const* bias;     // [num_experts], or null
    GemmShape shape;
    RowTiles tiles;
};

struct DownGradParams {
    static constexpr Pass kPass = Pass::kDownGrad;
    CUtensorMap grad_y;          // [R, hidden]
    const void* gate_up[2];      // [R, ffn] each
    void* weighted_h;            // [R, ffn], written: row_weights * h
    void* grad_preact[2];        // [R, ffn] each, written; may be gate_up
    const CUtensorMap* weights;  // [num_experts]
    const float* row_weights;    // [R], 0 in padding
    float* row_dots;             // [ceil(ffn / kDownGradTileCols), num_rows], written: <dh, h>
    GemmShape shape;
    RowTiles tiles;
    int num_rows;  // allocated R
};

struct UpGradParams {
    static constexpr Pass kPass = Pass::kUpGrad;
    CUtensorMap grad_preact[2];     // [R, ffn] each
    CUtensorMap grad_x;             // [R, hidden], written
    const CUtensorMap* weights[2];  // [num_experts] each
    GemmShape shape;
    RowTiles tiles;
};

// grad[e] = a^T b, or += , over the rows of expert e.
struct WeightGradParams {
    static constexpr Pass kPass = Pass::kWeightGrad;
    CUtensorMap a;     // [R, m]
    CUtensorMap b;     // [R, n]
    CUtensorMap grad;  // [num_experts, m, n], written or added to
    GemmShape shape;
    int m;
    bool accumulates;  // whether grad is added to
};

// Which kernel of a pass.
struct ExpertGemmVariant {
    bool is_bfloat16;  // else fp16
    bool is_gated;
    Activation activation;  // of kUp and kDownGrad
};

// Launches a pass; Params is one of the structs above. Throws std::runtime_error when the launch
// fails, std::invalid_argument where the communication does not fit the pass or the GPU.
template <typename Params>
void expert_gemm(const Params& params, const ExpertGemmVariant& variant,
                 const Communication& communication, int num_sms, cudaStream_t stream);

}  // namespace comet_ds
