// SPDX-License-Identifier: Apache-2.0
// A kernel's place between the one before and the one behind it on its stream (launch.h).
// Source: PTX ISA, "griddepcontrol".
#pragma once

namespace comet_ds {

// Waits until the kernel before has ended and what it wrote can be read.
__device__ inline void await_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next kernel put CTAs where this one's have ended, once all of this one's have begun.
__device__ inline void admit_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// What every thread of a kernel does before it touches global memory; a kernel that waits for other
// GPUs admits the next one when all have come. The next kernel is admitted after the one before has
// ended, so never more than one waits in place on a stream, and for a kernel that will end.
__device__ inline void begin_kernel() {
    await_previous_kernel();
    admit_next_kernel();
}

}  // namespace comet_ds
