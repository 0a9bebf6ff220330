// Codes of a matrix into records of tiles, and back. See weight.h.
#pragma once

#include <cstdint>

namespace fewbits {

// Some tiles: codes [up to tiles * 16, columns] to records [tiles, blocks, 64 * bits].
void interleave(const uint8_t* codes, long rows, long columns, int bits, uint8_t* records);
void deinterleave(const uint8_t* records, long rows, long columns, int bits, uint8_t* codes);

}  // namespace fewbits
