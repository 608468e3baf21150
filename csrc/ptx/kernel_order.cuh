// SPDX-License-Identifier: Apache-2.0
// Programmatic dependent launch: how a kernel overlaps the previous and the next one on its stream
// (host/launch.h). Source: PTX ISA, "griddepcontrol".
#pragma once

namespace comet_ds {

// Waits until the previous kernel has ended and its writes are visible.
__device__ inline void await_previous_kernel() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets CTAs of the next kernel take the SMs that this kernel's CTAs leave, once every CTA of this
// kernel has called it.
__device__ inline void admit_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Every thread of a kernel calls this before it touches global memory. The barrier between ranks is
// the exception: it admits the next kernel only when all ranks have arrived (exchange.cuh).
// Because the next kernel is admitted after the previous one has ended, at most one kernel per
// stream waits while it holds SMs, and it waits for a kernel that is certain to end.
__device__ inline void begin_kernel() {
    await_previous_kernel();
    admit_next_kernel();
}

}  // namespace comet_ds
