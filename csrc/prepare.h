// From rows of blocks, as files hold them, to the planes of a weight. How the blocks of a type lie is data: Python has
// the table of all types.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu.h"
#include "weight.h"

namespace fewbits {

// Some bits of values first … first + count - 1 of a block. Those of value first + i are in the byte
// at + i / (run * each) * run + i % run, from bit shift + i / run % each * bits up; they are the value's bits from `to`
// up. Or that byte holds `each` digits of a number in base 3, as TQ1_0 does, and digit i / run % each is the value; or
// two values, `swapped`: the first one in the upper half.
struct Bits {
    int first, count, at, bits, run, each, shift, to;
    bool digits, swapped;
};

struct Values {
    std::vector<Bits> bits;
    int minus;  // is taken from every value; they are bytes
};

// A block of `columns` in so many bytes. A scale, and a minimum, are `scale_bytes` wide and stored as they are; 0: they
// lie elsewhere.
struct BlockLayout {
    int bytes, columns;
    int bits;  // of a code
    int scale_bytes, scale_at, min_at;  // min_at < 0: no minimum
    Values codes, subscales, submins;   // without bits: there are none
};

// A layout as steps on words. Word w of 16 rows side by side is a vector; four values of every row, a quad, become
// another one, in steps that are or'ed.
struct Unpacking {
    // four bytes; bits beside each other; the same with the halves of bytes swapped; digits of four bytes
    enum class Kind : uint8_t { four, stream, swapped, digits };
    struct Step {
        Kind kind;
        int word;          // number in `words`
        uint32_t right, left, mask;
        uint32_t bits;     // stream: of a value
        uint16_t power;    // digits: 3 to the digit
    };
    struct Quad {
        int begin, end;  // in `steps`
    };
    struct Lane {
        int word, shift;
    };

    explicit Unpacking(const BlockLayout& layout);  // throws std::invalid_argument: it does not fit into its block

    BlockLayout layout;
    std::vector<int> words;  // where in a block they begin
    std::vector<Step> steps;
    std::vector<Quad> codes, subscales, submins;
    Lane scale{}, min{};

private:
    int word(int at);
    Lane lane(int at);
    std::vector<Quad> quads(const Values& values, int count);
    void add(const Bits& bits, int i);
};

constexpr int MOST_WORDS = 64;  // of a block

// Planes of a tile.
struct Planes {
    uint8_t *codes, *scales, *mins, *subscales, *submins;
};

struct Preparers {
    // `blocks` blocks of `count` rows of a tile; what lies beyond them becomes 0. All of `rows` can be read.
    void (*tile)(const Unpacking&, const uint8_t* const (&rows)[TILE], int count, long blocks, const Planes&);
};

FEWBITS_TABLE(Preparers, preparers)

// Rows, `row(context, r)` each, of so many blocks, to planes of whole tiles.
void prepare(const Unpacking& steps, const uint8_t* (*row)(const void* context, long r), const void* context, long rows,
             long blocks, const Planes& planes, int threads);

}  // namespace fewbits
