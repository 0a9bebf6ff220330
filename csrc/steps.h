// What a decoder does between products, on single rows of float32. One table a set of instructions.
#pragma once

#include <cstdint>

#include "cpu.h"
#include "weight.h"

namespace fewbits {

constexpr int QUERIES = 4;         // that meet a head's keys and values together
constexpr int LINE = 16;           // positions whose keys lie side by side
constexpr long WIDEST_HEAD = 256;  // columns of a head

inline long lined(long n) { return (n + LINE - 1) / LINE * LINE; }

// Keys and values of a layer's head, as float16: keys [positions / 16][width][16], values [positions][lined(width)].
struct Head {
    long width;
    uint16_t *keys, *values;
};

// A row of a head: what it asks, which positions it sees, where the result goes.
struct Query {
    const float* x;
    long first, last;
    float* out;
};

struct Steps {
    void (*widen)(Scale kind, const uint8_t* from, long width, float* out);  // a row of f16, bf16 or f32
    void (*norm)(const float* x, const float* weight, long width, float epsilon, float* out);  // root mean square
    void (*gate)(const float* gate, const float* up, long width, float* out);                  // silu(gate) * up
    void (*add)(const float* x, long width, float* to);
    void (*rotate)(float* x, const float* cos, const float* sin, long half);  // pairs x[i], x[i + half]
    void (*keep)(const Head&, long position, const float* key, const float* value);
    void (*attend)(const Head&, const Query* queries, int count, float scale);  // softmax(scale * x keys) values
};

FEWBITS_TABLE(Steps, steps)

}  // namespace fewbits
