// SPDX-License-Identifier: Apache-2.0
// What the CTAs of the GEMM kernels did when: records in global memory, for comet_ds.timeline.
#pragma once

#include <cstdint>

// Recording costs registers and time: the kernels a layer normally runs are compiled without.
#ifndef COMET_TIMELINE
#define COMET_TIMELINE 0
#endif

namespace comet_ds {

constexpr bool kTimeline = COMET_TIMELINE;

// Codes are shared with Python.
enum class Activity : uint8_t {
    kPull = 0,        // other ranks' tokens into rows
    kPush = 1,        // sums of rows into other ranks' memory
    kAwaitRows = 2,   // a tile's rows are still to come
    kAwaitTiles = 3,  // sums wait for tiles
    kMultiply = 4,    // products of a tile, and waiting for its operands
    kFinish = 5,      // its epilogue and stores
};

struct Record {
    uint64_t start_ns;  // 0: none; this GPU's clock
    uint32_t duration_ns;
    uint8_t pass;
    Activity activity;
    uint16_t reserved;
};

// Who records in a CTA, each in a list of its own.
enum class Recording : int { kCommunication = 0, kTiles = 1, kMath = 2 };  // kMath + warpgroup
constexpr int kRecordLists = 4;
constexpr int kMaxRecords = 512;  // of a list; what is beyond is not recorded

}  // namespace comet_ds
