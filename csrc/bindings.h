// SPDX-License-Identifier: Apache-2.0
// The parts of what Python can call.
#pragma once

#include <pybind11/pybind11.h>

namespace comet_ds {

void bind_layer_call(pybind11::module_& m);
void bind_module_watch(pybind11::module_& m);

}  // namespace comet_ds
