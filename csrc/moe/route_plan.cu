// SPDX-License-Identifier: Apache-2.0
// Launchers of route_plan.cuh.
#include "route_plan.cuh"

#include "device/launch.h"

namespace comet_ds {

void plan_routes(const RoutePlanParams& p, cudaStream_t stream) {
    const int64_t num_routes = p.num_tokens * p.top_k;
    const int num_blocks = (num_routes + kRoutesPerBlock - 1) / kRoutesPerBlock;
    const int bins_bytes = (p.num_parts * p.num_experts + 1) * sizeof(int);
    if (num_blocks > 0) {
        count_routes_kernel<<<num_blocks, kRoutesPerBlock, bins_bytes, stream>>>(p);
    }
    scan_routes_kernel<<<1, kScanThreads, bins_bytes, stream>>>(p, num_blocks);
    if (num_blocks > 0) place_routes_kernel<<<num_blocks, kRoutesPerBlock, 0, stream>>>(p);
    check_launch("plan_routes");
}

void order_arrival(const ArrivalParams& p, cudaStream_t stream) {
    // One block at least: it writes the offsets.
    const int num_blocks = p.num_rows / kArrivalThreads + 1;
    const int smem_bytes = 3 * p.num_ranks * p.num_experts * sizeof(int);
    order_arrival_kernel<<<num_blocks, kArrivalThreads, smem_bytes, stream>>>(p);
    check_launch("order_arrival");
}

}  // namespace comet_ds
