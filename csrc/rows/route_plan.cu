// SPDX-License-Identifier: Apache-2.0
// Launchers of route_plan.cuh.
#include "rows/route_plan.cuh"

#include "host/launch.h"

namespace comet_ds {

void plan_routes(const RoutePlanParams& p, cudaStream_t stream) {
    const int64_t num_routes = p.num_tokens * p.top_k;
    const unsigned num_ctas = (num_routes + kRoutesPerBlock - 1) / kRoutesPerBlock;
    const size_t bins_bytes = (p.num_parts * p.num_experts + 1) * sizeof(int);
    const auto* op = "plan_routes";
    if (num_ctas > 0) {
        launch(op, count_routes_kernel, {num_ctas, kRoutesPerBlock, bins_bytes}, stream, p);
    }
    launch(op, scan_routes_kernel, {1, kScanThreads, bins_bytes}, stream, p, num_ctas);
    if (num_ctas > 0) {
        launch(op, place_routes_kernel, {num_ctas, kRoutesPerBlock}, stream, p);
    }
}

void order_arrival(const ArrivalParams& p, cudaStream_t stream) {
    // NOTE: at least one CTA, because it writes the offsets.
    const unsigned num_ctas = p.num_rows / kArrivalThreads + 1;
    const size_t smem_bytes = 3 * p.num_ranks * p.num_experts * sizeof(int);
    launch("order_arrival", order_arrival_kernel, {num_ctas, kArrivalThreads, smem_bytes}, stream,
           p);
}

}  // namespace comet_ds
