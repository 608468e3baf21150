// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies from global to shared memory that a thread starts and later waits for.
// One function per instruction, with its name. Source: PTX ISA, "cp.async".
#pragma once

#include <cstdint>

namespace comet_ds {

// Copies 16 bytes and bypasses L1.
__device__ inline void cp_async(uint32_t smem, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(from) : "memory");
}

__device__ inline void cp_async_commit_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups are incomplete.
template <int kPending>
__device__ inline void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace comet_ds
