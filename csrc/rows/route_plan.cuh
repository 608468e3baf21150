// SPDX-License-Identifier: Apache-2.0
// Row order of a routing, and of a chunk of tokens that has arrived (pipelined path).
//
// 1. Math: plan_routes is a stable counting sort of the routes by segment (routing.py says what a
//    segment is). Dropped routes belong to one more segment after all others. Three launches:
//        count    histogram of the segments of kRoutesPerBlock consecutive routes   scratch[b, s]
//        scan     first row of block b's routes of segment s                        scratch[b, s]
//        place    row of a route: that first row + number of earlier routes of the same segment in
//                 its block
//    order_arrival turns rank-major segments into expert-major ones, in one launch. Every CTA sums
//    the few segment sizes for itself.
// 2. Grid and roles: count and place have one CTA per kRoutesPerBlock routes, one thread per route;
//    scan has one CTA, one thread per segment; order_arrival one thread per row.
// 3. Flags: none; launches on one stream are ordered. The only atomics count integers.
// 4. Shared memory, with S segments: count and scan 4 (S + 1) bytes, place 4 kRoutesPerBlock,
//    order_arrival 12 S.
#pragma once

#include "ptx/kernel_order.cuh"
#include "rows/route_plan.h"

namespace comet_ds {

constexpr int kScanThreads = 1024;
constexpr int kArrivalThreads = 256;

__device__ inline int segment_of(const RoutePlanParams& p, int64_t route) {
    const int64_t expert = p.topk_ids[route];
    if (expert < 0) return p.num_parts * p.num_experts;
    const int64_t part = route / p.top_k * p.num_parts / p.num_tokens;
    return p.segment_of_expert[part * p.num_experts + expert];
}

__global__ void __launch_bounds__(kRoutesPerBlock) count_routes_kernel(RoutePlanParams p) {
    begin_kernel();
    extern __shared__ int smem_count[];
    const int num_bins = p.num_parts * p.num_experts + 1;
    for (int bin = threadIdx.x; bin < num_bins; bin += kRoutesPerBlock) smem_count[bin] = 0;
    __syncthreads();
    const int64_t route = int64_t{blockIdx.x} * kRoutesPerBlock + threadIdx.x;
    if (route < p.num_tokens * p.top_k) atomicAdd(&smem_count[segment_of(p, route)], 1);
    __syncthreads();
    for (int bin = threadIdx.x; bin < num_bins; bin += kRoutesPerBlock) {
        p.scratch[int64_t{blockIdx.x} * num_bins + bin] = smem_count[bin];
    }
}

__global__ void __launch_bounds__(kScanThreads) scan_routes_kernel(RoutePlanParams p,
                                                                   int num_blocks) {
    begin_kernel();
    extern __shared__ int smem_total[];
    const int num_bins = p.num_parts * p.num_experts + 1;
    for (int bin = threadIdx.x; bin < num_bins; bin += kScanThreads) {
        int total = 0;
#pragma unroll 8
        for (int block = 0; block < num_blocks; ++block) {
            total += p.scratch[int64_t{block} * num_bins + bin];
        }
        smem_total[bin] = total;
        if (bin < num_bins - 1) p.segment_counts[bin] = total;
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < num_bins; bin += kScanThreads) {
        int start = 0;
        for (int before = 0; before < bin; ++before) start += smem_total[before];
#pragma unroll 8
        for (int block = 0; block < num_blocks; ++block) {
            int* count = &p.scratch[int64_t{block} * num_bins + bin];
            const int next = start + *count;
            *count = start;
            start = next;
        }
    }
}

__global__ void __launch_bounds__(kRoutesPerBlock) place_routes_kernel(RoutePlanParams p) {
    begin_kernel();
    __shared__ int smem_segment[kRoutesPerBlock];
    const int num_bins = p.num_parts * p.num_experts + 1;
    const int64_t route = int64_t{blockIdx.x} * kRoutesPerBlock + threadIdx.x;
    const bool is_route = route < p.num_tokens * p.top_k;
    const int segment = is_route ? segment_of(p, route) : -1;
    smem_segment[threadIdx.x] = segment;
    __syncthreads();
    if (!is_route) return;
    int row = p.scratch[int64_t{blockIdx.x} * num_bins + segment];
    for (int before = 0; before < threadIdx.x; ++before) row += smem_segment[before] == segment;
    p.row_of_route[route] = segment == num_bins - 1 ? -1 : row;
    p.token_of_row[row] = route / p.top_k;
}

__global__ void __launch_bounds__(kArrivalThreads) order_arrival_kernel(ArrivalParams p) {
    begin_kernel();
    extern __shared__ int smem[];
    const int num_experts = p.num_experts, num_segments = p.num_ranks * num_experts;
    int* size = smem;                         // [rank, expert]
    int* arrival = smem + num_segments;       // first row, rank-major
    int* sorted = smem + 2 * num_segments;    // first row, expert-major
    for (int s = threadIdx.x; s < num_segments; s += kArrivalThreads) {
        size[s] = p.counts[s / num_experts * p.counts_stride + s % num_experts];
    }
    __syncthreads();
    for (int s = threadIdx.x; s < num_segments; s += kArrivalThreads) {
        const int expert = s % num_experts;
        int before_here = 0, before_sorted = 0;
        for (int other = 0; other < num_segments; ++other) {
            const int other_expert = other % num_experts;
            const bool is_before = other_expert < expert || (other_expert == expert && other < s);
            before_here += other < s ? size[other] : 0;
            before_sorted += is_before ? size[other] : 0;
        }
        arrival[s] = before_here;
        sorted[s] = before_sorted;
        if (blockIdx.x == 0 && s >= num_segments - num_experts) {
            p.offsets[expert] = before_sorted + size[s];
        }
    }
    __syncthreads();
    const int64_t row = int64_t{blockIdx.x} * kArrivalThreads + threadIdx.x;
    if (row >= p.num_rows) return;
    // Finds the last segment that starts at or before the row. Empty segments before it may start
    // at the same row.
    int low = 0, high = num_segments;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (arrival[middle] <= row ? low : high) = middle;
    }
    const int64_t target = sorted[low] + row - arrival[low];
    p.order[target] = row;
    p.inverse[row] = target;
}

}  // namespace comet_ds
