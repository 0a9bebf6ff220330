#include "prepare.h"

#include "unpack.h"

namespace fewbits::FEWBITS_ISA {

typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));

using Words = uint32_t[MOST_WORDS][TILE];

// The same word of 16 rows side by side.
static void gather(const std::vector<int>& words, const uint8_t* const (&rows)[TILE], long offset, Words& to) {
    for (int r = 0; r < TILE; ++r) {
        const uint8_t* from = rows[r] + offset;
        for (size_t w = 0; w < words.size(); ++w) memcpy(&to[w][r], from + words[w], 4);
    }
}

// Digits of numbers in base 3, of bytes that are the number times 256 / 243.
INLINE U32 digits(U32 bytes, uint16_t power) {
    auto one = [=](U32 apart) {  // two of the four
        const U16 rest = (U16)apart * power & 255;
        return (U32)(rest * 3 >> 8);
    };
    return one(bytes & 0x00FF00FF) | one(bytes >> 8 & 0x00FF00FF) << 8;
}

INLINE U32 stream(U32 word, const Unpacking::Step& s) {
    U32 found = word >> s.right & s.mask;
    for (uint32_t i = 1; i < 4; ++i) found |= (word >> (s.right + i * s.bits) & s.mask) << (8 * i);
    return found << s.left;
}

// Four values of 16 rows.
INLINE U8 quad(const Unpacking& s, const Unpacking::Quad& q, const Words& words, U8 minus, U8 there) {
    U32 found{};
    for (int i = q.begin; i < q.end; ++i) {
        const Unpacking::Step& step = s.steps[i];
        const U32 word = load<U32>(words[step.word]);
        switch (step.kind) {
            case Unpacking::Kind::four: found |= (word >> step.right << step.left) & step.mask; break;
            case Unpacking::Kind::stream: found |= stream(word, step); break;
            case Unpacking::Kind::digits: found |= digits(word, step.power); break;
        }
    }
    return ((U8)found - minus) & there;
}

// PLANE bits of 8 quads, from bit AT of the codes.
template <int PLANE, int AT>
INLINE void join(const U8* quads, uint8_t* to) {
    constexpr int PER = 8 / PLANE;
#pragma GCC unroll 4
    for (int i = 0; i < PLANE; ++i) {
        U8 found{};
#pragma GCC unroll 8
        for (int j = 0; j < PER; ++j) {
            const U32 codes = (U32)quads[i * PER + j];
            const U32 moved = j * PLANE < AT ? codes >> (AT - j * PLANE) : codes << (j * PLANE - AT);
            found |= (U8)moved & bytes((uint8_t)(((1 << PLANE) - 1) << j * PLANE));
        }
        store(to + 64 * i, found);
    }
}

template <int BITS>
INLINE void join(const U8* quads, uint8_t* record) {
    if constexpr (BITS == 8) {
        for (int i = 0; i < 8; ++i) store(record + 64 * i, quads[i]);
        return;
    }
    if constexpr ((BITS & 4) != 0) join<4, 0>(quads, record);
    if constexpr ((BITS & 2) != 0) join<2, BITS & 4>(quads, record + 64 * (BITS & 4));
    if constexpr ((BITS & 1) != 0) join<1, BITS & 6>(quads, record + 64 * (BITS & 6));
}

INLINE void lane(const Unpacking::Lane& l, int bytes, const Words& words, U32 there, uint8_t* to) {
    const U32 found = (load<U32>(words[l.word]) & there) >> (uint32_t)l.shift;
    if (bytes == 1) store(to, __builtin_convertvector(found, U8x16));
    else if (bytes == 2) store(to, __builtin_convertvector(found, U16x16));
    else store(to, found);
}

// Values of 16 rows, one row of the plane each.
static void values(const Unpacking& s, const std::vector<Unpacking::Quad>& quads, int minus, const Words& words, U8 there,
                   uint8_t* to) {
    for (const Unpacking::Quad& q : quads) {
        const U32 four = (U32)quad(s, q, words, bytes((uint8_t)minus), there);
        for (int i = 0; i < 4; ++i, to += TILE) store(to, __builtin_convertvector(four >> (uint32_t)(8 * i), U8x16));
    }
}

template <int BITS>
static void tile(const Unpacking& s, const uint8_t* const (&rows)[TILE], int count, long blocks, const Planes& p) {
    const BlockLayout& l = s.layout;
    alignas(64) Words words;
    uint32_t mask[TILE] = {};
    for (int r = 0; r < count; ++r) mask[r] = ~0u;
    const U32 there = load<U32>(mask);
    const U8 minus = bytes((uint8_t)l.codes.minus);
    const long entry = TILE * l.scale_bytes;
    uint8_t* record = p.codes;
    for (long b = 0; b < blocks; ++b) {
        gather(s.words, rows, b * l.bytes, words);
        for (size_t q = 0; q < s.codes.size(); q += 8, record += 64 * BITS) {
            U8 quads[8];
            for (int i = 0; i < 8; ++i) quads[i] = quad(s, s.codes[q + i], words, minus, (U8)there);
            join<BITS>(quads, record);
        }
        lane(s.scale, l.scale_bytes, words, there, p.scales + b * entry);
        if (p.mins) lane(s.min, l.scale_bytes, words, there, p.mins + b * entry);
        values(s, s.subscales, l.subscales.minus, words, (U8)there, p.subscales + b * 4 * TILE * s.subscales.size());
        values(s, s.submins, l.submins.minus, words, (U8)there, p.submins + b * 4 * TILE * s.submins.size());
    }
}

static void tile(const Unpacking& s, const uint8_t* const (&rows)[TILE], int count, long blocks, const Planes& p) {
    switch (s.layout.bits) {
        case 1: return tile<1>(s, rows, count, blocks, p);
        case 2: return tile<2>(s, rows, count, blocks, p);
        case 3: return tile<3>(s, rows, count, blocks, p);
        case 4: return tile<4>(s, rows, count, blocks, p);
        case 5: return tile<5>(s, rows, count, blocks, p);
        case 6: return tile<6>(s, rows, count, blocks, p);
        default: return tile<8>(s, rows, count, blocks, p);
    }
}

extern const Preparers preparers = {tile};

}  // namespace fewbits::FEWBITS_ISA
