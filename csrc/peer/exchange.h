// SPDX-License-Identifier: Apache-2.0
// Tokens and results between the ranks of an expert parallel group, by addresses every rank can
// read and write: host launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "host/dtype.h"
#include "rows/dispatch.h"

namespace comet_ds {

// A rank's block of memory that its peers can address: where flags lie in it, by writer.
struct Mailboxes {
    uint64_t* flags[kMaxRanks];  // [num_ranks] each; flags[r][s] is what rank s has told rank r
    int rank;
    int num_ranks;
};

// What a meeting is for, in the order of a direction: tables, or tokens too; tokens where they came
// later than the tables; results.
enum class Meeting : int { kTokens = 0, kSentTokens = 1, kResults = 2 };
constexpr uint64_t kMeetings = 3;  // a direction counts as many, whether it has the second or not

// What a CTA of a GEMM kernel waited for until its deadline had passed.
struct LateWait {
    uint32_t is_set;
    uint32_t index;  // into Communication::progress
    uint32_t seen;
    uint32_t expected;
};

// What CTAs of a GEMM kernel tell each other, in this GPU's memory.
struct Counters {
    uint32_t groups;      // of routes, taken by warps that communicate
    uint32_t units;       // of the GEMM, taken by clusters
    uint32_t progress[];  // rows that have come, by block; or pieces stored, by rank's distance
};

// What communication takes from computation, ns; added up over launches.
struct Exposure {
    uint64_t communicating;  // of a GEMM kernel's CTAs while they do not compute, their sum
    uint64_t meeting;        // of the stream, from coming to a meeting to the last rank's coming
};

struct MeetParams {
    Mailboxes mailboxes;
    uint64_t* epoch;       // this rank's count of meetings
    const LateWait* late;  // of the launches before
    uint64_t timeout_ns;
    Meeting what;
    Exposure* exposure;  // to add to, or null
};

constexpr int kMaxCopies = 4 * (kMaxRanks - 1);

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

// Routes of a token; a warp holds them all.
constexpr int kMaxTopK = 32;

// What goes on beside a GEMM in its kernel (overlap.cuh).
struct Communication {
    ExchangeParams exchange;
    void* rows;          // written with pulled tokens, or summed and pushed
    int num_ctas;        // set apart for it; even, 0 for a kernel without communication
    const int32_t* remote_begin;  // kDown: RowPlan's, of the order that it computes backwards
    Counters* counters;           // zero before
    uint64_t timeout_ns;
    LateWait* late;
    Exposure* exposure;  // to add to, or null
};

// All throw std::runtime_error when a launch fails.

// Copies blocks of memory to where peers read them, here or there; addresses are multiples of 16.
void publish(const CopyParams& params, cudaStream_t stream);

// Copies a block of memory to a peer by a copy engine, which takes no SM.
void send(const void* from, void* to, int64_t num_bytes, cudaStream_t stream);

// Waits until all ranks have come as often as this one. What a rank wrote before, its peers see
// after. A rank that does not come in time is printed, and the kernel traps; so does a rank that
// was late itself, or whose meeting is out of order, before it tells the others that it came.
void meet(const MeetParams& params, cudaStream_t stream);

// What goes on beside a GEMM, where there is none: for every token of other ranks that has rows
// here, the sum of these rows, weighted or not, into the slot of the token's rank that is this
// rank's.
void push_sums(const Communication& communication, bool is_weighted, int num_sms,
               cudaStream_t stream);

// output[t] of this rank's tokens: the sum of its own rows, weighted or not, and the slots.
void sum_partials(const ExchangeParams& params, const void* rows, bool is_weighted, void* output,
                  cudaStream_t stream);

}  // namespace comet_ds
