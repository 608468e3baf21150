// SPDX-License-Identifier: Apache-2.0
// Grouped GEMMs of the experts' MLPs, forward and backward: parameters and host launchers.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "gemm/timeline.h"
#include "peer/exchange.h"

namespace comet_ds {

// Columns of kDownGrad's tiles, each of which leaves one partial dot product a row.
constexpr int kDownGradTileCols = 128;

// Codes are shared with Python.
enum class Activation : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

// Which GEMM; with x, dy: [R, hidden], pre, h, dpre: [R, ffn], all rows sorted by expert e.
enum class Pass : int {
    kUp = 0,          // pre = x up[e]^T + bias; h = act(pre); gated: h = act(pre_gate) * pre_up
    kDown = 1,        // y = h down[e]^T + bias
    kDownGrad = 2,    // dh = dy down[e]; dpre, weighted h, routing weight's gradient from it
    kUpGrad = 3,      // dx = dpre up[e], gated: dpre_gate gate[e] + dpre_up up[e]
    kWeightGrad = 4,  // d up[e] = dpre^T x over the expert's rows, d down[e] = dy^T (weighted h)
};

// Tensor maps have boxes of 64 x 64 elements for operands, 16 x 64 (a warp's rows) for results.
// Gated lists are [gate, up].
struct ExpertGemmParams {
    CUtensorMap a[2];               // kUpGrad: dpre
    CUtensorMap b;                  // kWeightGrad only
    CUtensorMap out[3];             // kUp: h, pre; kDownGrad: unused
    const void* pre[2];             // kDownGrad: [R, n] each
    void* results[3];               // kDownGrad: weighted h, dpre, [R, n] each; dpre may be pre
    const CUtensorMap* weights[2];  // [num_experts] each: the pass's matrices
    const void* const* bias[2];     // [num_experts] each, or null
    const int* expert_offsets;      // [num_experts + 1] first row, multiples of kRowBlock
    const int* block_order;         // [row blocks]: in which they are computed
    const int* expert_order;        // [row blocks]: whose they are
    const float* row_weights;       // kDownGrad: [R], 0 in padding
    float* row_dots;                // kDownGrad: [ceil(n / kDownGradTileCols), max_rows]: <dh, h>
    int num_experts;
    int max_rows;   // allocated R
    int m;          // kWeightGrad: rows of one expert's result
    int n;          // columns of the result (one matrix's where gated)
    int k;          // length of the reduction (one matrix's where gated); not of kWeightGrad
    bool save_pre;    // kUp: whether to write pre
    bool accumulates;  // kWeightGrad: whether to add to the result that is there
    Record* records;  // of this launch's CTAs (timeline.h), or null
};

// Which kernel; is_gated and activation matter to kUp, kDownGrad and kUpGrad.
struct ExpertGemmVariant {
    Pass pass;
    bool is_bfloat16;  // else fp16
    bool is_gated;
    Activation activation;
};

// Throws std::runtime_error when the launch fails.
void expert_gemm(const ExpertGemmParams& params, const ExpertGemmVariant& variant,
                 const Communication& communication, int num_sms, cudaStream_t stream);

}  // namespace comet_ds
