#include "prepare.h"

#include <cstring>

namespace fewbits::FEWBITS_ISA {

// A word of 16 rows, side by side, and so many rows of it as a register holds.
using Word = uint32_t[TILE];
#if defined(__AVX512F__)
typedef uint32_t V __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef uint32_t V __attribute__((vector_size(32)));
#else
typedef uint32_t V __attribute__((vector_size(16)));
#endif
constexpr int LANES = sizeof(V) / 4;

#define INLINE static inline __attribute__((always_inline))

INLINE V load(const uint32_t* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

// The words of a block.
static void gather(const std::vector<int>& words, const uint8_t* const (&rows)[TILE], long offset, Word* to) {
    for (int r = 0; r < TILE; ++r) {
        const uint8_t* from = rows[r] + offset;
        for (size_t w = 0; w < words.size(); ++w) memcpy(&to[w][r], from + words[w], 4);
    }
}

INLINE V stream(V word, const Unpacking::Step& s) {
    V found = word >> s.right & s.mask;
    for (uint32_t i = 1; i < 4; ++i) found |= (word >> (s.right + i * s.bits) & s.mask) << (8 * i);
    return found << s.left;
}

// Of numbers in base 3, in bytes that are the number times 256 / 243.
INLINE V digits(V word, uint32_t power) {
    V found{};
    for (uint32_t i = 0; i < 4; ++i) found |= (((word >> (8 * i)) * power & 255) * 3 >> 8) << (8 * i);
    return found;
}

// Four values of each row; of values that are less than what they are stored as, that is taken from every byte.
INLINE V quad(const Unpacking& u, const Unpacking::Quad& q, const Word* words, uint32_t minus, int row) {
    constexpr uint32_t HIGH = 0x80808080;
    V found{};
    for (int i = q.begin; i < q.end; ++i) {
        const Unpacking::Step& s = u.steps[i];
        const V word = load(words[s.word] + row);
        switch (s.kind) {
            case Unpacking::Kind::four: found |= (word >> s.right << s.left) & s.mask; break;
            case Unpacking::Kind::stream: found |= stream(word, s); break;
            case Unpacking::Kind::swapped:
                found |= stream((word >> 4 & 0x0F0F0F0F) | (word & 0x0F0F0F0F) << 4, s);
                break;
            case Unpacking::Kind::digits: found |= digits(word, s.power); break;
        }
    }
    return minus ? ((found | HIGH) - (minus & ~HIGH)) ^ ((found ^ ~minus) & HIGH) : found;
}

// PLANE bits of 8 quads, from bit AT of the codes.
template <int PLANE, int AT>
INLINE void join(const V* quads, uint8_t* to) {
    constexpr int PER = 8 / PLANE;
#pragma GCC unroll 4
    for (int i = 0; i < PLANE; ++i) {
        V found{};
#pragma GCC unroll 8
        for (int j = 0; j < PER; ++j)
            found |= (quads[i * PER + j] >> AT & ((1 << PLANE) - 1) * 0x01010101u) << j * PLANE;
        memcpy(to + 64 * i, &found, sizeof found);
    }
}

template <int BITS>
INLINE void join(const V* quads, uint8_t* record) {
    if constexpr (BITS == 8)
        for (int i = 0; i < 8; ++i) memcpy(record + 64 * i, &quads[i], sizeof(V));
    if constexpr (BITS < 8 && (BITS & 4) != 0) join<4, 0>(quads, record);
    if constexpr ((BITS & 2) != 0) join<2, BITS & 4>(quads, record + 64 * (BITS & 4));
    if constexpr ((BITS & 1) != 0) join<1, BITS & 6>(quads, record + 64 * (BITS & 6));
}

template <class T>
INLINE void narrow(V words, uint8_t* to) {
    typedef T Narrow __attribute__((vector_size(LANES * sizeof(T))));
    const Narrow found = __builtin_convertvector(words, Narrow);
    memcpy(to, &found, sizeof found);
}

static void lane(const Unpacking::Lane& l, int bytes, const Word* words, const Word& there, uint8_t* to) {
    for (int row = 0; row < TILE; row += LANES) {
        const V found = (load(words[l.word] + row) & load(there + row)) >> (uint32_t)l.shift;
        if (bytes == 1) narrow<uint8_t>(found, to + row);
        else if (bytes == 2) narrow<uint16_t>(found, to + 2 * row);
        else narrow<uint32_t>(found, to + 4 * row);
    }
}

// A row of the plane each.
static void values(const Unpacking& u, const std::vector<Unpacking::Quad>& quads, int minus, const Word* words,
                   const Word& there, uint8_t* to) {
    for (const Unpacking::Quad& q : quads) {
        for (int row = 0; row < TILE; row += LANES) {
            const V found = quad(u, q, words, minus * 0x01010101u, row) & load(there + row);
            for (int i = 0; i < 4; ++i) narrow<uint8_t>(found >> (uint32_t)(8 * i), to + i * TILE + row);
        }
        to += 4 * TILE;
    }
}

template <int BITS>
static void tile(const Unpacking& u, const uint8_t* const (&rows)[TILE], int count, long blocks, const Planes& p) {
    const BlockLayout& l = u.layout;
    alignas(64) Word words[MOST_WORDS], there;
    for (int r = 0; r < TILE; ++r) there[r] = r < count ? ~0u : 0;
    const uint32_t minus = l.codes.minus * 0x01010101u;
    const long entry = TILE * l.scale_bytes;
    uint8_t* record = p.codes;
    for (long b = 0; b < blocks; ++b) {
        gather(u.words, rows, b * l.bytes, words);
        for (size_t q = 0; q < u.codes.size(); q += 8, record += 64 * BITS) {
            for (int row = 0; row < TILE; row += LANES) {
                V quads[8];
                for (int i = 0; i < 8; ++i) quads[i] = quad(u, u.codes[q + i], words, minus, row) & load(there + row);
                join<BITS>(quads, record + 4 * row);
            }
        }
        if (p.scales) lane(u.scale, l.scale_bytes, words, there, p.scales + b * entry);
        if (p.mins) lane(u.min, l.scale_bytes, words, there, p.mins + b * entry);
        values(u, u.subscales, l.subscales.minus, words, there, p.subscales + b * 4 * TILE * u.subscales.size());
        values(u, u.submins, l.submins.minus, words, there, p.submins + b * 4 * TILE * u.submins.size());
    }
}

static void tile(const Unpacking& u, const uint8_t* const (&rows)[TILE], int count, long blocks, const Planes& p) {
    switch (u.layout.bits) {
        case 1: return tile<1>(u, rows, count, blocks, p);
        case 2: return tile<2>(u, rows, count, blocks, p);
        case 3: return tile<3>(u, rows, count, blocks, p);
        case 4: return tile<4>(u, rows, count, blocks, p);
        case 5: return tile<5>(u, rows, count, blocks, p);
        case 6: return tile<6>(u, rows, count, blocks, p);
        default: return tile<8>(u, rows, count, blocks, p);
    }
}

extern const Preparers preparers = {tile};

}  // namespace fewbits::FEWBITS_ISA
