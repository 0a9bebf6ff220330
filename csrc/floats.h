// Products of float weights, as they are stored, with rows of float32 activations. However many rows there are, results
// have the same bits.
#pragma once

#include "cpu.h"
#include "weight.h"

namespace fewbits {

struct FloatWeight {
    long rows, columns;
    Scale kind;             // f16, bf16 or f32
    const uint8_t* values;  // [rows][columns]
};

struct FloatProducts {
    // out[row of x, row of the weight] = their product + bias, for `rows` rows of the weight from `first` on
    void (*multiply)(const FloatWeight&, const float* x, long count, long first, long rows, float* out,
                     const float* bias);
};

FEWBITS_TABLE(FloatProducts, float_products)

// out = x [count, columns] times the weight transposed, plus bias (or null).
void product(const FloatWeight& weight, const float* x, long count, float* out, const float* bias, int threads);

}  // namespace fewbits
