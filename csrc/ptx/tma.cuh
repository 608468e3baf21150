// SPDX-License-Identifier: Apache-2.0
// TMA copies between global and shared memory, the mbarriers that count their bytes, and other
// instructions on shared memory, clusters and registers.
// One function per instruction, with its name. Source: PTX ISA, "cp.async.bulk.tensor", "mbarrier".
#pragma once

#include <cuda.h>

#include <cstdint>

namespace comet_ds {

__device__ inline uint32_t smem_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarrier: a phase completes after all expected arrivals and all announced bytes ------------

__device__ inline void mbarrier_init(uint32_t barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals));
}

// Makes initialised mbarriers visible to TMA and to the other CTAs of the cluster.
__device__ inline void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void mbarrier_arrive_expect_tx(uint32_t barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(num_bytes)
                 : "memory");
}

__device__ inline void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the mbarrier at the same address in another CTA of the cluster.
__device__ inline void mbarrier_arrive_cluster(uint32_t barrier, int cta_rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
        "r"(cta_rank)
        : "memory");
}

// Arrives at the mbarrier at the same address in another CTA and announces bytes to it.
__device__ inline void mbarrier_arrive_expect_tx_cluster(uint32_t barrier, int num_bytes,
                                                         int cta_rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %2;\n"
        "mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [remote], %1;\n}\n"
        ::"r"(barrier), "r"(num_bytes), "r"(cta_rank)
        : "memory");
}

// Stores a word at the same address in another CTA of the cluster; that CTA's mbarrier counts the
// bytes.
__device__ inline void st_async(uint32_t smem, int value, uint32_t barrier, int cta_rank) {
    asm volatile(
        "{\n.reg .b32 remote, counted;\n"
        "mapa.shared::cluster.u32 remote, %0, %3;\n"
        "mapa.shared::cluster.u32 counted, %2, %3;\n"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [remote], %1, [counted];\n"
        "}\n" ::"r"(smem), "r"(value), "r"(barrier), "r"(cta_rank)
        : "memory");
}

__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "wait:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n"
        "bra wait;\n"
        "finished:\n}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// --- named barriers: num_threads counts the threads of all warps that sync or arrive -------------

__device__ inline void named_barrier_sync(int barrier, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// Arrives without waiting.
__device__ inline void named_barrier_arrive(int barrier, int num_threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(num_threads) : "memory");
}

// --- TMA ----------------------------------------------------------------------------------------

// Loads the box at (col, row, batch). Elements outside the tensor are zeros and count as bytes.
__device__ inline void tma_load(uint32_t smem, const CUtensorMap* map, uint32_t barrier, int col,
                                int row, int batch) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem),
        "l"(map), "r"(barrier), "r"(col), "r"(row), "r"(batch)
        : "memory");
}

// Loads the box into every CTA of `cta_mask` at the same shared address; the mbarrier at the same
// address in each of them counts the bytes.
__device__ inline void tma_load_multicast(uint32_t smem, const CUtensorMap* map, uint32_t barrier,
                                          int col, int row, int batch, uint16_t cta_mask) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem),
        "l"(map), "r"(barrier), "r"(col), "r"(row), "r"(batch), "h"(cta_mask)
        : "memory");
}

// Adds a box to the tensor element by element and rounds to the tensor's type. Each addition is
// atomic. Elements outside the tensor are skipped.
__device__ inline void tma_reduce_add(const CUtensorMap* map, uint32_t smem, int col, int row,
                                      int batch) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group"
        " [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(smem), "r"(col), "r"(row), "r"(batch)
        : "memory");
}

// Stores a box. Elements outside the tensor are skipped.
__device__ inline void tma_store(const CUtensorMap* map, uint32_t smem, int col, int row,
                                 int batch) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];"
        ::"l"(map), "r"(smem), "r"(col), "r"(row), "r"(batch)
                 : "memory");
}

__device__ inline void bulk_commit_group() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's groups still read shared memory.
template <int kPending>
__device__ inline void bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Waits until the writes of all but kPending of this thread's groups are complete.
template <int kPending>
__device__ inline void bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Orders this thread's accesses to shared memory before later accesses by TMA.
__device__ inline void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Lets this thread use a tensor map in global memory that was written before the launch.
__device__ inline void fence_tensormap_acquire(const CUtensorMap* map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// --- clusters, registers, fragments --------------------------------------------------------------

__device__ inline int cluster_cta_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ inline void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}

template <int kRegisters>
__device__ inline void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Stores four 8 x 8 matrices of 2-byte elements. Lane l gives the address of row l % 8 of matrix
// l / 8 and holds, of each matrix, row l / 4 and columns 2 (l % 4) + 0, 1.
__device__ inline void stmatrix_x4(uint32_t smem, const uint32_t (&matrix)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem),
                 "r"(matrix[0]), "r"(matrix[1]), "r"(matrix[2]), "r"(matrix[3])
                 : "memory");
}

// Loads four 8 x 8 matrices; addresses and values are distributed as in stmatrix_x4.
__device__ inline void ldmatrix_x4(uint32_t smem, uint32_t (&matrix)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
                 : "r"(smem)
                 : "memory");
}

__device__ inline void st_shared(uint32_t smem, uint4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

__device__ inline int ld_shared_word(uint32_t smem) {
    int value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(smem) : "memory");
    return value;
}

__device__ inline uint4 ld_shared(uint32_t smem) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(smem)
                 : "memory");
    return value;
}

}  // namespace comet_ds
