// Columns of one unit rounded one after the other, each after what the errors of those before it ask of it.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fewbits {

// How the columns of a unit are rounded. Arrays are [groups, rows]; a group is `run` columns side by side in the file.
struct Rounding {
    const float* scale;
    const float* inverse;  // of the scale; 0 of 0
    const float* shift;    // evenly spaced levels: code = clamp(round(shift + x * inverse)), value = base + code * scale
    const float* base;
    float low, high;
    const float* table;   // else: value = scale * the level of `table` (ascending) nearest to x * inverse
    const float* bounds;  // where one level ends and the next begins
    int levels;           // 0: evenly spaced
    long run;
};

struct Sweep {
    long columns, rows;
    const float* x;        // [columns, rows], in the order in which they are rounded
    const float* old;      // [columns, rows] or null
    const float* mix;      // [columns, columns]: column i falls by mix[j, i] times the error of column j < i
    const int64_t* position;  // of each column in the file's order
    Rounding rounding;
    float* values;  // [columns, rows]
    float* errors;  // [columns, rows]: x - value, or with `old`, value - old
};

struct Sweeps {
    long rows;  // that go together
    void (*sweep)(const Sweep&, long strip);
};

FEWBITS_TABLE(Sweeps, sweeps)

}  // namespace fewbits
