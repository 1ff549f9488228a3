#pragma once

#include <pybind11/pybind11.h>

namespace lk {

// Adds PagePool, BatchPlan and plan() to the module.
void bind_multi_lora(pybind11::module_& m);

}  // namespace lk
