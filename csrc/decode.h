// Values of quantized weights.
#pragma once

#include "cpu.h"
#include "weight.h"

namespace fewbits {

struct Decoders {
    // Of `count` rows of a tile: row `lanes[i]` of the tile to out[i] [columns].
    void (*rows)(const Weight&, long tile, const int* lanes, int count, float* const* out);
    void (*column)(const Weight&, long tile, long column, float* out);  // of a tile's rows: [16]
    // Of a whole tile: column c to out[c * stride …], the 16 rows side by side.
    void (*turned)(const Weight&, long tile, float* out, long stride);
};

FEWBITS_TABLE(Decoders, decoders)

}  // namespace fewbits
