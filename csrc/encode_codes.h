// Nearest codes of a known grid, bit for bit as fewbits.codecs.grids computes them.
#pragma once

#include "encoders.h"

namespace fewbits::FEWBITS_ISA {

void nearest_codes(const Grid& grid, const Levels& levels, const uint8_t* order, ptrdiff_t first, ptrdiff_t last,
                   uint8_t* codes);

}  // namespace fewbits::FEWBITS_ISA
