// What a decoder does between products, on single rows of float32. One table a set of instructions.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "weight.h"

namespace fewbits {

enum class Activation : uint8_t { silu, gelu, gelu_tanh, relu };  // gelu: x times the normal distribution's integral

struct Steps {
    void (*widen)(Scale kind, const uint8_t* from, long width, float* out);  // a row of f16, bf16 or f32
    void (*norm)(const float* x, const float* weight, long width, float epsilon, float* out);  // root mean square
    // the same of what differs from the mean, plus `bias` (or null)
    void (*layer_norm)(const float* x, const float* weight, const float* bias, long width, float epsilon, float* out);
    void (*gate)(Activation, const float* gate, const float* up, long width, float* out);  // act(gate) * up (or null)
    void (*add)(const float* x, float factor, long width, float* to);  // to += factor * x
    void (*scale)(float* x, float factor, long width);
    void (*cap)(float* x, float most, long width);  // most * tanh(x / most)
    void (*rotate)(float* x, const float* cos, const float* sin, long half);  // pairs x[i], x[i + half]
};

FEWBITS_TABLE(Steps, steps)

}  // namespace fewbits
