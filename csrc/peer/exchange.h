// SPDX-License-Identifier: Apache-2.0
// Tokens and results between the ranks of an expert parallel group, at addresses that every rank
// can read and write: parameters and host launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "host/dtype.h"
#include "rows/dispatch.h"

namespace comet_ds {

// The ranks' flags: flags[r][s] lies in rank r's memory and is written by rank s.
struct Mailboxes {
    uint64_t* flags[kMaxRanks];  // [num_ranks] each
    int rank;                    // this one
    int num_ranks;
};

// Barriers between all ranks, on the device, in the order of a direction (forward or backward).
enum class RankBarrier : int {
    kTokens = 0,        // tables have arrived, and tokens are published or have arrived
    kPushedTokens = 1,  // only where copy engines push tokens: these have arrived
    kResults = 2,       // partial sums are in their slots
};
// Every direction counts all of them, whether it has kPushedTokens or not.
constexpr uint64_t kRankBarriers = 3;

// The first wait of a GEMM kernel that exceeded its deadline.
struct LateWait {
    uint32_t is_set;
    uint32_t index;  // of the flag, in Counters::flags
    uint32_t seen;
    uint32_t expected;
};

// How the CTAs of a GEMM kernel that communicates share work and wait for each other (overlap.cuh).
struct Counters {
    uint32_t next_route_group;   // queue of the warps that communicate
    uint32_t next_cluster_tile;  // queue of the clusters
    uint32_t flags[];            // arrived_rows or stored_sub_tiles

    // kUp, kDownGrad: [row block].
    __host__ __device__ uint32_t* arrived_rows() { return flags; }
    // kDown: [ring distance].
    __host__ __device__ uint32_t* stored_sub_tiles() { return flags; }
};

// Time that communication takes from computation, ns; launches add to it.
struct Exposure {
    uint64_t communicating;  // sum over CTAs of a GEMM kernel, while they compute nothing
    uint64_t rank_barriers;  // from this rank's arrival at a barrier to the last rank's
};

struct RankBarrierParams {
    Mailboxes mailboxes;
    uint64_t* epoch;       // barriers this rank has passed
    const LateWait* late;  // written by earlier launches
    uint64_t timeout_ns;
    RankBarrier barrier;
    Exposure* exposure;  // or null
};

constexpr int kMaxCopies = 4 * (kMaxRanks - 1);  // the routing tables, for every other rank

struct CopyParams {
    const void* from[kMaxCopies];
    void* to[kMaxCopies];
    int64_t num_bytes[kMaxCopies];  // multiples of 4
    int num_copies;
};

struct ExchangeParams {
    Sources sources;
    RowPlan plan;  // top_k at most kMaxTopK
    int64_t hidden;
    DType dtype;  // not fp32
};

// A warp holds all routes of a token, one per lane.
constexpr int kMaxTopK = 32;

// Communication that a GEMM kernel overlaps with its tiles (overlap.cuh).
struct Communication {
    ExchangeParams exchange;
    void* rows;                   // tokens are pulled to them, or sums of them pushed
    int num_comm_ctas;            // an even number; 0 for a kernel without communication
    const int32_t* remote_begin;  // kDown: [ranks], RowPlan's for the kernel's tile order
    Counters* counters;           // zero before the launch
    uint64_t timeout_ns;
    LateWait* late;
    Exposure* exposure;  // or null
};

// All throw std::runtime_error when a launch fails.

// Copies blocks of memory, on this GPU or to peers. Addresses are multiples of 16.
void publish(const CopyParams& params, cudaStream_t stream);

// Pushes a block of memory to a peer by a copy engine, which takes no SM.
void push_by_copy_engine(const void* from, void* to, int64_t num_bytes, cudaStream_t stream);

// Barrier between all ranks. Writes a rank made before it are visible to its peers after it. Where
// a rank does not arrive before the deadline, prints which and traps. Also prints and traps, before
// it arrives itself, where an earlier GEMM of this rank missed a deadline, or where this barrier is
// out of order because an earlier direction was not finished.
void sync_ranks(const RankBarrierParams& params, cudaStream_t stream);

// Sums, for every token of another rank, the token's rows on this rank, weighted or not, and pushes
// the sum to the token's slot that belongs to this rank. This is the push of overlap.cuh without a
// GEMM to overlap it.
void push_sums(const Communication& communication, bool is_weighted, int num_sms,
               cudaStream_t stream);

// output[t] = sum of the rows of own token t on this rank, weighted or not, and of its slots.
void sum_partials(const ExchangeParams& params, const void* rows, bool is_weighted, void* output,
                  cudaStream_t stream);

}  // namespace comet_ds
