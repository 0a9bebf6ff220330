// Attention of a few queries to a head's keys and values, which are kept in float16. One table a set of instructions.
#pragma once

#include <cstdint>

#include "cpu.h"

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

struct Attention {
    void (*keep)(const Head&, long position, const float* key, const float* value);
    // softmax(scale * x keys) values; with a cap, of cap * tanh(scale * x keys / cap)
    void (*attend)(const Head&, const Query* queries, int count, float scale, float cap);
};

FEWBITS_TABLE(Attention, attention)

}  // namespace fewbits
