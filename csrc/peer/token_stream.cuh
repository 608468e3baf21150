// SPDX-License-Identifier: Apache-2.0
// What the warps that communicate do: pull other ranks' tokens to their rows, or push sums of rows
// to other ranks.
//
// 1. Math: exchange.h. A pulled token is copied to each of its rows. A token's rows are summed in
//    fp32 in order of its routes and rounded once.
// 2. Grid and roles: any number of warps, all alike. They take route groups from one queue. A route
//    group is up to 32 routes, one per lane: all routes of a few tokens of one rank. Pulling takes
//    the nearest rank's groups first, pushing the farthest rank's. Pushing splits a rank's tokens
//    into slices of columns and takes one slice of all tokens after another. A warp takes a group
//    from the queue two groups ahead and reads its routes one group ahead.
// 3. Flags (owned by gemm/overlap.cuh, which has their readers):
//        flag               writer           release                  proxy fence
//        arrived_rows[b]    pull_tokens:     red.release.gpu += 1     fence.proxy.async.global
//                           one lane per     per row of row block b   before it: TMA reads the row
//                           row
//        next_route_group   every warp       none (relaxed atomic     none
//                                            add): it hands out work
//    Pushing sets no flags: the barrier between ranks that follows covers it (exchange.cuh).
// 4. Shared memory: one ring of slices per warp (SliceRing, about 17 KB). All slices but the one in
//    use are in flight. A lane reads only vectors that it copied itself, so it waits for its own
//    copies only.
//
// NOTE: these warps are limited by their instructions, so all that can be is done once per group.
#pragma once

#include "peer/exchange.h"
#include "ptx/cp_async.cuh"
#include "ptx/memory_order.cuh"
#include "ptx/tma.cuh"
#include "ptx/vector.cuh"

namespace comet_ds {

// A warp's ring of buffers for slices of tokens or rows. A slice is kLaneVectors 16-byte vectors
// per lane. A note says what to do with it.
template <typename NoteType, int kNumLaneVectors, int kNumSlices>
struct SliceRing {
    using Note = NoteType;
    static constexpr int kLaneVectors = kNumLaneVectors, kSlices = kNumSlices;
    static constexpr int kVectors = kLaneVectors * 32;
    static constexpr int kCols = kVectors * kVectorBytes / 2;
    uint4 vectors[kSlices][kLaneVectors][32];
    Note notes[kSlices];

    // Starts to copy a slice of num_vectors vectors; `from` is the lane's first one.
    __device__ void copy(int buffer, const uint4* from, int num_vectors) {
        const int lane = threadIdx.x % 32;
        const uint32_t to = smem_address(&vectors[buffer][0][lane]);
#pragma unroll
        for (int i = 0; i < kLaneVectors; ++i) {
            if (i * 32 + lane < num_vectors) cp_async(to + i * 32 * kVectorBytes, from + i * 32);
        }
    }
};

// Calls start(buffer) until it returns false, and use(buffer) for every slice that was started,
// kSlices - 1 calls later.
template <int kSlices, typename Start, typename Use>
__device__ inline void stream_slices(const Start& start, const Use& use) {
    constexpr int kAhead = kSlices - 1;
    int num_started = 0;
    bool has_more = true;
    for (int i = -kAhead; i < num_started || has_more || i < 0; ++i) {
        if (has_more) has_more = start((i + kAhead) % kSlices);
        num_started += has_more;
        cp_async_commit_group();
        if (i < 0 || i >= num_started) continue;
        cp_async_wait_group<kAhead>();
        __syncwarp();  // all lanes' notes are written
        use(i % kSlices);
        __syncwarp();  // all lanes have read them
    }
}

constexpr int kNoRow = -1, kNoDistance = 0;

// Up to 32 routes, one per lane: all routes of a few tokens of one rank.
struct RouteGroup {
    int rank;        // the tokens' rank
    int distance;    // that rank's ring distance; kNoDistance where there is no group
    int slice;       // of columns
    int token;       // the lane's, among its rank's tokens
    int row;         // of the lane's route; negative where the route has none here
    float weight;    // of the lane's route
    uint32_t peers;  // RowPlan::peers of the token
};

// The groups one warp takes from the queue.
class RouteGroups {
public:
    __device__ RouteGroups(const ExchangeParams& p, uint32_t* queue, int num_slices,
                           bool is_farthest_first)
        : p_(p), queue_(queue), num_slices_(num_slices), is_farthest_first_(is_farthest_first) {
        const int lane = threadIdx.x % 32, top_k = p.plan.top_k;
        tokens_per_group_ = 32 / top_k;
        token_in_group_ = lane / top_k;
        token_lanes_ = (~0u >> (32 - top_k)) << token_in_group_ * top_k;
        take();
        load();
        take();
    }

    // Returns false where no group is left, else writes the next one.
    __device__ bool next(RouteGroup& group) {
        if (loaded_.distance == kNoDistance) return false;
        group = loaded_;
        load();
        take();
        return true;
    }

    // Returns the lanes that have routes of this lane's token, one bit each.
    __device__ uint32_t token_lanes() const { return token_lanes_; }

private:
    __device__ int rank_at(int distance) const {
        return (p_.sources.rank + distance) % p_.sources.num_ranks;
    }
    __device__ int num_groups(int rank) const {
        return (p_.sources.source[rank].num_tokens + tokens_per_group_ - 1) / tokens_per_group_;
    }
    // Takes a group's index from the queue.
    __device__ void take() {
        if (threadIdx.x % 32 == 0) taken_ = atomicAdd(queue_, 1);
    }
    // Finds the group of the index taken last and reads the lane's route.
    __device__ void load() {
        const uint32_t index = __shfl_sync(~0u, taken_, 0);
        loaded_.row = kNoRow;
        loaded_.distance = kNoDistance;
        const int num_ranks = p_.sources.num_ranks;
        int group = index;
        for (int i = 1; i < num_ranks; ++i) {
            const int distance = is_farthest_first_ ? num_ranks - i : i, rank = rank_at(distance);
            const int size = num_groups(rank);  // of one slice
            if (group >= size * num_slices_) {
                group -= size * num_slices_;
                continue;
            }
            loaded_.rank = rank;
            loaded_.distance = distance;
            loaded_.slice = group / size;
            loaded_.token = group % size * tokens_per_group_ + token_in_group_;
            break;
        }
        if (loaded_.distance == kNoDistance) return;
        const Source& source = p_.sources.source[loaded_.rank];
        if (token_in_group_ >= tokens_per_group_ || loaded_.token >= source.num_tokens) return;
        const int64_t token = source.first_token + loaded_.token;
        const int64_t route = token * p_.plan.top_k + threadIdx.x % 32 -
                              token_in_group_ * p_.plan.top_k;
        loaded_.row = p_.plan.row_of_route[route];
        loaded_.weight = p_.plan.route_weights[route];
        loaded_.peers = p_.plan.peers[token];
    }

    const ExchangeParams& p_;
    uint32_t* queue_;
    int num_slices_, tokens_per_group_, token_in_group_;
    bool is_farthest_first_;
    uint32_t token_lanes_, taken_ = 0;
    RouteGroup loaded_;
};

struct PullNote {
    int row[32];       // the token's rows; negative in lanes without one
    int first_vector;  // of the slice, in the token
};
using PullRing = SliceRing<PullNote, 4, 8>;

// Copies other ranks' tokens to their rows. All lanes of a warp call it together.
__device__ inline void pull_tokens(const ExchangeParams& p, uint4* rows, uint32_t* queue,
                                   uint32_t* arrived, PullRing& ring) {
    const int lane = threadIdx.x % 32, row_vectors = p.hidden * 2 / kVectorBytes;
    RouteGroups groups(p, queue, 1, false);
    RouteGroup group{};
    uint32_t left = 0;    // routes of the group that are not started, one bit each
    int next_vector = 0;  // next one to start of the token whose route is first among them
    const auto start = [&](int buffer) {
        while (left == 0) {
            if (!groups.next(group)) return false;
            left = __ballot_sync(~0u, group.row >= 0);
        }
        const int first = __ffs(left) - 1;
        const uint32_t lanes = __shfl_sync(~0u, groups.token_lanes(), first);
        const int token = __shfl_sync(~0u, group.token, first);
        ring.notes[buffer].row[lane] = lanes >> lane & 1 ? group.row : kNoRow;
        if (lane == 0) ring.notes[buffer].first_vector = next_vector;
        const auto* tokens = static_cast<const uint4*>(p.sources.source[group.rank].tokens);
        ring.copy(buffer, tokens + int64_t{token} * row_vectors + next_vector + lane,
                  row_vectors - next_vector);
        next_vector += PullRing::kVectors;
        if (next_vector >= row_vectors) next_vector = 0, left &= ~lanes;
        return true;
    };
    int complete_row = kNoRow;  // the lane's row of the previous token: stored, not yet counted
    const auto count_complete = [&] {
        // NOTE: every lane orders its own stores before TMA's reads, then one lane releases.
        fence_proxy_async_global();
        __syncwarp();
        if (complete_row >= 0) add_release_gpu(arrived + complete_row / kRowBlock, 1);
        complete_row = kNoRow;
    };
    const auto use = [&](int buffer) {
        const int own_row = ring.notes[buffer].row[lane];
        const int first_vector = ring.notes[buffer].first_vector;
        uint4 in[PullRing::kLaneVectors];
#pragma unroll
        for (int i = 0; i < PullRing::kLaneVectors; ++i) in[i] = ring.vectors[buffer][i][lane];
        if (first_vector == 0) count_complete();
        for (uint32_t routes = __ballot_sync(~0u, own_row >= 0); routes != 0;
             routes &= routes - 1) {
            const int row = __shfl_sync(~0u, own_row, __ffs(routes) - 1);
            uint4* to = rows + int64_t{row} * row_vectors + first_vector + lane;
#pragma unroll
            for (int i = 0; i < PullRing::kLaneVectors; ++i) {
                if (first_vector + i * 32 + lane < row_vectors) to[i * 32] = in[i];
            }
        }
        if (first_vector + PullRing::kVectors >= row_vectors) complete_row = own_row;
    };
    stream_slices<PullRing::kSlices>(start, use);
    count_complete();
}

template <typename T>
struct alignas(16) PushNote {
    T* to;            // where to store the token's sum after its last row; null for other rows
    float weight;     // of the row
    int num_vectors;  // of the row, from the slice's first one on
};
template <typename T>
using PushRing = SliceRing<PushNote<T>, 4, 8>;

// Sums tokens' rows and stores the sums to their slots. Reads rows for the tokens of a rank only
// after await(ring distance of the rank) has returned.
template <typename T, bool kIsWeighted, typename Await>
__device__ inline void push_tokens(const ExchangeParams& p, const T* rows, uint32_t* queue,
                                   PushRing<T>& ring, const Await& await) {
    using Ring = PushRing<T>;
    constexpr int kSize = kVectorBytes / sizeof(T);
    const int lane = threadIdx.x % 32, row_vectors = p.hidden / kSize;
    RouteGroups groups(p, queue, (row_vectors + Ring::kVectors - 1) / Ring::kVectors, true);
    RouteGroup group{};
    uint32_t left = 0;             // routes of the group that are not started, one bit each
    PushNote<T> note{};            // of the lane's route
    const uint4* first = nullptr;  // the lane's first vector of the slice, in row 0
    const auto start = [&](int buffer) {
        while (left == 0) {
            if (!groups.next(group)) return false;
            await(group.distance);
            left = __ballot_sync(~0u, group.row >= 0);
            const Source& source = p.sources.source[group.rank];
            const int64_t index = __popc(group.peers & ((1u << p.sources.rank) - 1));
            const bool is_last = (left & groups.token_lanes()) >> lane == 1;
            const int first_vector = group.slice * Ring::kVectors;
            auto* to = static_cast<T*>(source.slots) + first_vector * kSize +
                       (index * source.num_tokens + group.token) * p.hidden;
            note = {is_last ? to : nullptr, group.weight, row_vectors - first_vector};
            first = reinterpret_cast<const uint4*>(rows) + first_vector + lane;
        }
        const int source_lane = __ffs(left) - 1;
        const int row = __shfl_sync(~0u, group.row, source_lane);
        if (lane == source_lane) ring.notes[buffer] = note;
        left &= left - 1;
        ring.copy(buffer, first + int64_t{row} * row_vectors, note.num_vectors);
        return true;
    };
    float sum[Ring::kLaneVectors][kSize] = {};
    const auto use = [&](int buffer) {
        const PushNote<T> used = ring.notes[buffer];
        const float weight = kIsWeighted ? used.weight : 1.0f;
#pragma unroll
        for (int i = 0; i < Ring::kLaneVectors; ++i) {
            const auto in =
                *reinterpret_cast<const Vector<T, kSize>*>(&ring.vectors[buffer][i][lane]);
#pragma unroll
            for (int j = 0; j < kSize; ++j) sum[i][j] += weight * to_float(in.value[j]);
        }
        if (used.to == nullptr) return;
        auto* to = reinterpret_cast<Vector<T, kSize>*>(used.to) + lane;
#pragma unroll
        for (int i = 0; i < Ring::kLaneVectors; ++i) {
            Vector<T, kSize> out;
#pragma unroll
            for (int j = 0; j < kSize; ++j) out.value[j] = from_float<T>(sum[i][j]), sum[i][j] = 0;
            if (i * 32 + lane < used.num_vectors) to[i * 32] = out;
        }
    };
    stream_slices<Ring::kSlices>(start, use);
}

}  // namespace comet_ds
