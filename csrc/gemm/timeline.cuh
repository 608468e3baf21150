// SPDX-License-Identifier: Apache-2.0
// Recorder: a thread notes what it did for how long. Empty where kTimeline is false.
#pragma once

#include "gemm/expert_gemm.h"
#include "gemm/timeline.h"
#include "ptx/memory_order.cuh"

namespace comet_ds {

template <Pass kPass, bool kIsOn = kTimeline>
class Recorder {
public:
    __device__ Recorder(Record*, Recording, int, bool) {}
    __device__ void start() {}
    __device__ void stop(Activity) {}
};

template <Pass kPass>
class Recorder<kPass, true> {
public:
    // records: [CTAs, kRecordLists, kMaxRecords], zero, or null. Only one thread per list records.
    __device__ Recorder(Record* records, Recording who, int warpgroup, bool is_thread) {
        if (records == nullptr || !is_thread) return;
        const int list = static_cast<int>(who) + warpgroup;
        next_ = records + (int64_t{blockIdx.x} * kRecordLists + list) * kMaxRecords;
        end_ = next_ + kMaxRecords;
    }

    __device__ void start() { start_ns_ = global_time_ns(); }

    // Notes an activity that lasted since the last start() or stop().
    __device__ void stop(Activity activity) {
        const uint64_t now = global_time_ns();
        if (next_ < end_) {
            *next_++ = {start_ns_, uint32_t(now - start_ns_), uint8_t(kPass), activity, 0};
        }
        start_ns_ = now;
    }

private:
    Record *next_ = nullptr, *end_ = nullptr;
    uint64_t start_ns_ = 0;
};

}  // namespace comet_ds
