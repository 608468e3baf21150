// SPDX-License-Identifier: Apache-2.0
// Flags and counters shared by CTAs or by GPUs, and the clock for deadlines.
// One function per instruction, with its name. Source: PTX ISA, "Memory Consistency Model".
#pragma once

#include <cstdint>

namespace comet_ds {

// --- scope: system (all GPUs of the host) --------------------------------------------------------

__device__ inline void store_release_system(uint64_t* flag, uint64_t value) {
    asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ inline uint64_t load_acquire_system(const uint64_t* flag) {
    uint64_t value;
    asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
    return value;
}

// --- scope: GPU ----------------------------------------------------------------------------------

__device__ inline uint32_t load_acquire_gpu(const uint32_t* count) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
    return value;
}

__device__ inline void add_release_gpu(uint32_t* count, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(count), "r"(value) : "memory");
}

// Orders this thread's own accesses to global memory (generic proxy) and accesses by TMA (async
// proxy), in both directions.
__device__ inline void fence_proxy_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ inline uint64_t global_time_ns() {
    uint64_t time;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
    return time;
}

}  // namespace comet_ds
