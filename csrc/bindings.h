// SPDX-License-Identifier: Apache-2.0
// The parts of the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace comet_ds {

void bind_gate(pybind11::module_& m);          // gate_autograd.cpp
void bind_layer_call(pybind11::module_& m);    // layer_bindings.cpp
void bind_experts(pybind11::module_& m);       // experts_autograd.cpp; after bind_layer_call
void bind_module_watch(pybind11::module_& m);  // module_watch.cpp

}  // namespace comet_ds
