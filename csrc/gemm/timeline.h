// SPDX-License-Identifier: Apache-2.0
// Records in global memory of what each CTA of a GEMM kernel did when, for `comet_ds timeline`.
#pragma once

#include <cstdint>

// Recording costs registers and time, so a layer's kernels are normally compiled without it.
#ifndef COMET_TIMELINE
#define COMET_TIMELINE 0
#endif

namespace comet_ds {

constexpr bool kTimeline = COMET_TIMELINE;

// Codes are shared with Python.
enum class Activity : uint8_t {
    kPull = 0,        // copying other ranks' tokens to their rows
    kPush = 1,        // summing rows and storing the sums in other ranks' memory
    kAwaitRows = 2,   // waiting for a tile's rows to arrive
    kAwaitTiles = 3,  // waiting, before a push, for tiles to be stored
    kMultiply = 4,    // a tile's products, including the wait for its operands
    kFinish = 5,      // a tile's epilogue and stores
};

struct Record {
    uint64_t start_ns;  // of this GPU's clock; 0 where there is no record
    uint32_t duration_ns;
    uint8_t pass;
    Activity activity;
    uint16_t reserved;
};

// Who records in a CTA; each has a list of its own.
enum class Recording : int { kCommunication = 0, kTiles = 1, kMath = 2 };  // kMath + warpgroup
constexpr int kRecordLists = 4;
constexpr int kMaxRecords = 512;  // of a list; later ones are lost

}  // namespace comet_ds
