// Codes and values of a known grid, bit for bit as fewbits.codecs.grids computes them; and how ggml packs codes.
#pragma once

#include "encoders.h"

namespace fewbits::FEWBITS_ISA {

void nearest_codes(const Grid& grid, const Levels& levels, const uint8_t* order, const float* w, ptrdiff_t first,
                   ptrdiff_t last, uint8_t* codes);
Squares measured_codes(const Grid& grid, const Levels& levels, const uint8_t* order, const float* w,
                       const float* importance, ptrdiff_t count, uint8_t* codes);
void values_of(const Grid& grid, const float* table, const uint8_t* codes, ptrdiff_t first, ptrdiff_t last, float* w);
void join_planes(const uint8_t* codes, int bits, int parts, int run, ptrdiff_t first, ptrdiff_t last, uint8_t* bytes);
void split_planes(const uint8_t* bytes, int bits, int parts, int run, ptrdiff_t first, ptrdiff_t last, uint8_t* codes);

}  // namespace fewbits::FEWBITS_ISA
