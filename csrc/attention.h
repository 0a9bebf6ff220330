// Attention of some queries to a head's keys and values, which are kept in 16, 8 or 4 bits. One table a set of
// instructions. docs/concepts/decoder.md has the layout.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fewbits {

constexpr int LINE = 16;           // positions whose keys lie side by side
constexpr int RUN = 32;            // columns that share a scale, in 8 and 4 bits
constexpr int SEGMENT = 1024;      // positions that are added up by themselves
constexpr int QUERIES = 48;        // that meet a head's keys and values together, at most
constexpr long WIDEST_HEAD = 256;  // columns of a head

inline long lined(long n) { return (n + LINE - 1) / LINE * LINE; }
inline long segments(long positions) { return (positions + SEGMENT - 1) / SEGMENT; }

enum class Kept { f16, q8_0, q4_0 };  // what keys and values are rounded to

// Bytes that a line of positions takes: of a head's codes (or halves) and of their scales, float16.
struct Planes {
    long keys, key_scales, values, value_scales;
    long all() const { return keys + key_scales + values + value_scales; }
};

inline Planes planes_of(Kept kept, long width) {
    const long runs = (width + RUN - 1) / RUN, scales = runs * 2 * LINE;
    if (kept == Kept::f16) return {width * 2 * LINE, 0, lined(width) * 2 * LINE, 0};
    const long codes = runs * RUN * LINE / (kept == Kept::q4_0 ? 2 : 1);
    return {codes, scales, codes, scales};
}

// Keys and values of a layer's head, lines of positions one after the other.
//   f16   keys [width][16], values [16][lined(width)]
//   q8_0  signed bytes: keys [runs][32][16], values [16][runs][32]; scales of keys [runs][16], of values [16][runs]
//   q4_0  the same with two columns i, i + 16 of a run in a byte, code - 8; what is kept was turned (see attention.cpp)
struct Head {
    Kept kept;
    long width;
    uint8_t *keys, *values;
    uint16_t *key_scales, *value_scales;
};

// A row of a head: what it asks, which positions it sees, where the result goes.
struct Query {
    const float* x;
    long first, last;
    float* out;
};

struct Scores {
    float scale;
    float cap;  // cap * tanh(score / cap); 0: as they are
};

// Sums of a query over some positions: values times weights [lined(width)], weights by lane, the largest score.
inline long sums_of(long width) { return lined((width + RUN - 1) / RUN * RUN) + 2 * LINE; }

struct Attention {
    void (*keep)(const Head&, long position, const float* key, const float* value);
    // softmax(scores) values, of at most QUERIES queries
    void (*attend)(const Head&, const Query* queries, int count, const Scores&);
    // The same in two steps: sums [count][sums_of] over one segment, and results from sums [segments][count][sums_of].
    void (*gather)(const Head&, const Query* queries, int count, const Scores&, long segment, float* sums);
    void (*finish)(const Head&, const Query* queries, int count, long segments, float* sums);
};

FEWBITS_TABLE(Attention, attention)

}  // namespace fewbits
