// SPDX-License-Identifier: Apache-2.0
// Tokens on their way between ranks: what warps do that pull tokens or push sums of their rows.
//
// 1. Math: exchange.h. Pulled tokens are copied to all their rows; sums are added in fp32 in order
//    of the routes and rounded once.
// 2. Grid: any number of warps. They take groups of up to 32 routes, those of a few tokens, from
//    one queue: rank by rank of the tokens, in ring order where they pull and from the farthest on
//    where they push, a rank's slice by slice of columns. A group is taken two groups before its
//    turn, and its routes are read one before.
// 3. Flags: arrived[block] += 1 for every row, when it is written (release, GPU scope).
// 4. Shared memory: a ring of slices for every warp; all but one are on their way while that is
//    used. A lane copies and reads the same 16-byte vectors, so it waits for its own copies only.
//    Instructions are what limits these warps: what can be is done once a group.
#pragma once

#include "peer/exchange.h"
#include "ptx/cp_async.cuh"
#include "ptx/memory_order.cuh"
#include "ptx/tma.cuh"
#include "ptx/vector.cuh"

namespace comet_ds {

// What a warp needs of shared memory. A slice has kLaneVectors vectors for every lane, and a note.
template <typename NoteType, int kNumLaneVectors, int kNumSlices>
struct SliceRing {
    using Note = NoteType;
    static constexpr int kLaneVectors = kNumLaneVectors, kSlices = kNumSlices;
    static constexpr int kVectors = kLaneVectors * 32;
    static constexpr int kCols = kVectors * kVectorBytes / 2;
    uint4 vectors[kSlices][kLaneVectors][32];
    Note notes[kSlices];

    // Starts copying a slice; `from` is the lane's first vector, num_vectors those of the slice.
    __device__ void copy(int slot, const uint4* from, int num_vectors) {
        const int lane = threadIdx.x % 32;
        const uint32_t to = smem_address(&vectors[slot][0][lane]);
#pragma unroll
        for (int i = 0; i < kLaneVectors; ++i) {
            if (i * 32 + lane < num_vectors) cp_async(to + i * 32 * kVectorBytes, from + i * 32);
        }
    }
};

// Calls start(slot) until it returns false, and use(slot) for each slot kSlices - 1 calls later.
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
        __syncwarp();  // notes are written
        use(i % kSlices);
        __syncwarp();  // and read
    }
}

constexpr int kNoRow = -1, kNoDistance = 0;

// Up to 32 routes, a lane each: all those of some tokens.
struct RouteGroup {
    int rank;      // the tokens'
    int distance;  // of that rank, in ring order
    int slice;     // of columns
    int token;     // the lane's, among its rank's
    int row;       // of the lane's route; negative if it has none here, or the lane has no route
    float weight;
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

    // Whether there is another one, and which.
    __device__ bool next(RouteGroup& group) {
        if (loaded_.distance == kNoDistance) return false;
        group = loaded_;
        load();
        take();
        return true;
    }

    // The lanes that have routes of the same token, a bit each.
    __device__ uint32_t token_lanes() const { return token_lanes_; }

private:
    __device__ int rank_at(int distance) const {
        return (p_.sources.rank + distance) % p_.sources.num_ranks;
    }
    __device__ int num_groups(int rank) const {
        return (p_.sources.source[rank].num_tokens + tokens_per_group_ - 1) / tokens_per_group_;
    }
    __device__ void take() {
        if (threadIdx.x % 32 == 0) taken_ = atomicAdd(queue_, 1);
    }
    __device__ void load() {
        const uint32_t index = __shfl_sync(~0u, taken_, 0);
        loaded_.row = kNoRow;
        loaded_.distance = kNoDistance;
        const int num_ranks = p_.sources.num_ranks;
        int group = index;
        for (int i = 1; i < num_ranks; ++i) {
            const int distance = is_farthest_first_ ? num_ranks - i : i, rank = rank_at(distance);
            const int size = num_groups(rank);  // of a slice
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
    int row[32];  // of the token, by lane; none where negative
    int first_vector;
};
using PullRing = SliceRing<PullNote, 4, 8>;

// Copies tokens of other ranks to their rows; a warp together, as all here.
__device__ inline void pull_tokens(const ExchangeParams& p, uint4* rows, uint32_t* queue,
                                   uint32_t* arrived, PullRing& ring) {
    const int lane = threadIdx.x % 32, row_vectors = p.hidden * 2 / kVectorBytes;
    RouteGroups groups(p, queue, 1, false);
    RouteGroup group{};
    uint32_t left = 0;     // routes of the group to come, a bit each
    int next_vector = 0;   // of the token whose route is first among them
    const auto start = [&](int slot) {
        while (left == 0) {
            if (!groups.next(group)) return false;
            left = __ballot_sync(~0u, group.row >= 0);
        }
        const int first = __ffs(left) - 1;
        const uint32_t lanes = __shfl_sync(~0u, groups.token_lanes(), first);
        const int token = __shfl_sync(~0u, group.token, first);
        ring.notes[slot].row[lane] = lanes >> lane & 1 ? group.row : kNoRow;
        if (lane == 0) ring.notes[slot].first_vector = next_vector;
        const auto* tokens = static_cast<const uint4*>(p.sources.source[group.rank].tokens);
        ring.copy(slot, tokens + int64_t{token} * row_vectors + next_vector + lane,
                  row_vectors - next_vector);
        next_vector += PullRing::kVectors;
        if (next_vector >= row_vectors) next_vector = 0, left &= ~lanes;
        return true;
    };
    int complete_row = kNoRow;  // of the token before, for whose stores no lane has waited yet
    const auto count_complete = [&] {
        // The copy engine will read them.
        fence_proxy_async_global();
        __syncwarp();
        if (complete_row >= 0) add_release_gpu(arrived + complete_row / kRowBlock, 1);
        complete_row = kNoRow;
    };
    const auto use = [&](int slot) {
        const int own_row = ring.notes[slot].row[lane];
        const int first_vector = ring.notes[slot].first_vector;
        uint4 in[PullRing::kLaneVectors];
#pragma unroll
        for (int i = 0; i < PullRing::kLaneVectors; ++i) in[i] = ring.vectors[slot][i][lane];
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
    T* to;  // where the token's sum is complete with this row, else null
    float weight;
    int num_vectors;
};
template <typename T>
using PushRing = SliceRing<PushNote<T>, 4, 8>;

// Sums tokens' rows into their slots, once await(distance of the tokens' rank) has returned.
template <typename T, bool kIsWeighted, typename Await>
__device__ inline void push_tokens(const ExchangeParams& p, const T* rows, uint32_t* queue,
                                   PushRing<T>& ring, const Await& await) {
    using Ring = PushRing<T>;
    constexpr int kSize = kVectorBytes / sizeof(T);
    const int lane = threadIdx.x % 32, row_vectors = p.hidden / kSize;
    RouteGroups groups(p, queue, (row_vectors + Ring::kVectors - 1) / Ring::kVectors, true);
    RouteGroup group{};
    uint32_t left = 0;             // routes of the group to come, a bit each
    PushNote<T> note{};            // of the lane's route
    const uint4* first = nullptr;  // the lane's vector of the slice of row 0
    const auto start = [&](int slot) {
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
        if (lane == source_lane) ring.notes[slot] = note;
        left &= left - 1;
        ring.copy(slot, first + int64_t{row} * row_vectors, note.num_vectors);
        return true;
    };
    float sum[Ring::kLaneVectors][kSize] = {};
    const auto use = [&](int slot) {
        const PushNote<T> used = ring.notes[slot];
        const float weight = kIsWeighted ? used.weight : 1.0f;
#pragma unroll
        for (int i = 0; i < Ring::kLaneVectors; ++i) {
            const auto in =
                *reinterpret_cast<const Vector<T, kSize>*>(&ring.vectors[slot][i][lane]);
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
