// What a decoder does between products, on single rows of float32. One table a set of instructions.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "weight.h"

namespace fewbits {

struct Steps {
    void (*widen)(Scale kind, const uint8_t* from, long width, float* out);  // a row of f16, bf16 or f32
    void (*norm)(const float* x, const float* weight, long width, float epsilon, float* out);  // root mean square
    void (*gate)(const float* gate, const float* up, long width, float* out);                  // silu(gate) * up
    void (*add)(const float* x, long width, float* to);
    void (*rotate)(float* x, const float* cos, const float* sin, long half);  // pairs x[i], x[i + half]
};

FEWBITS_TABLE(Steps, steps)

}  // namespace fewbits
