// From a file's floats, and to a file's blocks.
#pragma once

#include "encoders.h"

namespace fewbits::FEWBITS_ISA {

void widen(const Source& from, int width, ptrdiff_t first, ptrdiff_t last, float* to);
void join(const Packing& how, const uint8_t* raw, ptrdiff_t count, uint8_t* blocks);

}  // namespace fewbits::FEWBITS_ISA
