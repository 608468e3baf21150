// SPDX-License-Identifier: Apache-2.0
// Element types of activations. Codes are shared with Python.
#pragma once

namespace comet_ds {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace comet_ds
