// A quantized weight as the products read it. docs/concepts/kernels.md draws the layout.
//
//   value = scale * (code - zero) + offset      or, with a table of levels,  scale * level[code]
//
// where a scale is what is stored times `factor`.
// Rows lie in tiles of 16, columns in blocks of 32. The codes of 16 rows and 32 columns are one record; scales and
// offsets of 16 rows lie side by side. Rows and columns beyond the last are codes 0 with scale 0.
#pragma once

#include <cstdint>

namespace fewbits {

constexpr int TILE = 16, BLOCK = 32, SUPER = 8;  // rows of a tile, columns of a block, blocks of a super-block

enum class Scale : uint8_t { f16, bf16, f32, e8m0 };  // e8m0: 2^(byte - 128)

// What scales and offsets are made of, in a group of blocks.
enum class Scaling : uint8_t {
    plain,    // scales[group]
    minimum,  // scales[group]; offset is mins[group], in the kind of the scales
    zeros,    // scales[group]; offset is -scale * mins[group], a byte
    small,    // scales[group] * subscales[sub], a signed byte
    lines,    // scales[group] * subscales[sub], a byte; offset is -mins[group] * submins[sub]
    nibbles,  // the same, scale and minimum in the low and high half of one byte of subscales
};

struct Weight {
    long rows, columns;
    long tiles, blocks, groups;
    int bits;          // of a code: 1 to 6, or 8
    bool table;        // whether codes name levels
    uint8_t levels[16];   // of the table, plus `zero`
    float values[16];     // the same before they were rounded to integers, over the same scale
    int zero;
    int sub;           // columns of a sub-block: 16 or 32
    Scaling scaling;
    Scale scale;
    int group;         // blocks that share scales[group]
    float factor;
    const uint8_t* codes;      // [tiles][blocks][64 * bits]
    const uint8_t* scales;     // [tiles][groups][16] of `scale`
    const uint8_t* mins;       // [tiles][groups][16]
    const uint8_t* subscales;  // [tiles][sub-blocks][16]
    const uint8_t* submins;    // [tiles][sub-blocks][16]
    const int32_t* order;      // [columns]: which column of the activations each one meets; null: they lie alike
    bool fine;                 // whether what rounding takes from activations is to be multiplied too

    bool offsets() const { return scaling != Scaling::plain && scaling != Scaling::small; }
    long subs() const { return blocks * (BLOCK / sub); }
};

// Activations as signed bytes: of every row, each 32 columns share a scale. Rows lie in panels of `width`, the last one
// filled up with zeros; of a panel, four columns of every row lie side by side.
struct Activations {
    long rows, columns, blocks, panels;
    int width;
    int8_t* codes;   // [panels][blocks][8][width][4]
    float* scales;   // [panels][blocks][width]
    float* shifts;   // [panels][blocks][width], scale * -MAGIC_VALUE
    int32_t* sums;   // [panels][blocks][2][width], of the codes of 16 columns
};

// [panels][sub-blocks][width] of what a weight's zero meets, where integer sums start, or its offsets, sums of
// activations.
struct Corrections {
    int32_t* starts;
    float* sums;
};

}  // namespace fewbits
