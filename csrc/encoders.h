// Fits of scales to units of weights, and their nearest codes: one table a set of instructions.
//
// All counts, levels and starts come from Python. Nothing is checked here: bind_encoders.cpp does that.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu.h"

namespace fewbits {

enum class Storage { float32, float16, bfloat16 };  // of scales in the file

// [rows, units, columns] of any of these types; strides in elements, 0 where a dimension is repeated.
struct Source {
    const void* data;
    ptrdiff_t row, unit, column, units;  // units: of a row
    Storage type;
};

// Units one after the other.
struct Weights {
    const float *w, *importance;  // importance may be null
    ptrdiff_t total;
    int width;
    Storage storage;
};

// Integers low … high; or with `count` > 0 a table: its lowest level, then what is added beyond each bound.
struct Levels {
    float low, high;
    int count;
    const float *bounds, *rises;
};

// Scales: parts of the extreme element, the plain choice first. Zero points: parts of the range. Lines: both, the
// scale in parts of the range and how far below its middle the offset lies. Of all starts the best `kept` (a multiple
// of 4) go on for `rounds` rounds.
struct Starts {
    const float *scale, *drop;
    int count, kept, rounds;
    bool positive;  // scales
};

// Integer scales (and minimums) of sub-blocks.
struct Subs {
    int count;
    float least, most;
    const float* steps;  // the largest real scale is put on each of these
    int step_count, minima;  // dmin that are tried with every d
    const float* near;   // neighbours that are tried, [near_count, 2]: by how much the scale and the minimum change
    int near_count, descents;
};

// What `subs` equal parts of each unit share, [total, subs]; offset and zero may be null. Values are
// (code - zero) * scale * factor + offset.
struct Grid {
    const float *scale, *offset, *zero;
    float middle, factor;  // middle: the zero point where `zero` is null
    int width, subs;
};

// How a block holds what is known of a unit, as `raw` bytes: its codes, float16 parameters, scales and minimums of
// sub-blocks. Byte to + i gets the bits `mask` of byte from + i, shifted (left where shift > 0); each bit comes from one
// place, and is flipped where `constant` has it.
struct Move {
    int from, to, run, shift;
    uint8_t mask;
};

struct Packing {
    const Move* terms;
    const uint8_t* constant;
    int count, raw, bytes;
};

// Weighted sums of squares: of what decoded values differ by from the weights, and of these.
struct Squares {
    double off, whole;
};

// Outputs of fits are [total, …]; what has a range treats only the units first … last - 1.
struct Encoders {
    void (*scale)(const Weights&, const Levels&, const Starts&, float* scale);
    void (*zero)(const Weights&, float top, const Starts&, float* scale, uint8_t* zero);
    void (*line)(const Weights&, float top, const Starts&, float* d, float* m);
    void (*scales)(const Weights&, const Levels&, const Starts&, const Subs&, float* d, int8_t* scales);
    void (*lines)(const Weights&, float top, const Starts&, const Subs&, float* d, float* dmin,
                  uint8_t* scales, uint8_t* mins);
    // nearest codes of units w [total, width]: (w - offset) / scale + zero rounded to an integer; or the level's code,
    // by `order` of levels
    void (*codes)(const Grid&, const Levels&, const uint8_t* order, const float* w, ptrdiff_t first, ptrdiff_t last,
                  uint8_t* codes);
    // the same for sub-blocks of 16 n columns without `zero` and factors, and what is lost; `rises` are needed
    Squares (*measured)(const Grid&, const Levels&, const uint8_t* order, const float* w, const float* importance,
                        ptrdiff_t count, uint8_t* codes);
    // and values of codes; with a table [256] its entries times the scale
    void (*values)(const Grid&, const float* table, const uint8_t* codes, ptrdiff_t first, ptrdiff_t last, float* w);
    // `bits` of each code: of every `parts * run` codes byte j holds those of j, j + run, j + 2 run …, lowest first
    void (*planes)(const uint8_t* codes, int bits, int parts, int run, ptrdiff_t first, ptrdiff_t last, uint8_t* bytes);
    void (*unplanes)(const uint8_t* bytes, int bits, int parts, int run, ptrdiff_t first, ptrdiff_t last,
                     uint8_t* codes);  // the inverse
    void (*widen)(const Source&, int width, ptrdiff_t first, ptrdiff_t last, float* to);
    void (*join)(const Packing&, const uint8_t* raw, ptrdiff_t count, uint8_t* blocks);
};

FEWBITS_TABLE(Encoders, encoders)

}  // namespace fewbits
