#pragma once

#include <nanobind/nanobind.h>

namespace fewbits {

void bind_encoders(nanobind::module_& m);

}  // namespace fewbits
