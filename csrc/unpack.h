// From records to bytes and floats: the only place that knows how codes and scales lie. A register holds LANES rows of
// a tile: those from `lane` on, 4 * lane bytes into every 64 of a record.
#pragma once

#include "simd.h"
#include "weight.h"

namespace fewbits::FEWBITS_ISA::reg {

// Shifts bytes right by `by` bits (left if negative); bits that enter from a neighbour are left to a mask.
template <int by>
INLINE U8 shifted(U8 v) {
    if (by > 0) return (U8)((U16)v >> (by > 0 ? by : 0));
    if (by < 0) return (U8)((U16)v << (by < 0 ? -by : 0));
    return v;
}

// PLANE bits of 8 vectors of codes, 8 / PLANE vectors a byte, or'ed into w at bit AT.
template <int PLANE, int AT, bool FIRST, int... I>
INLINE void plane(const uint8_t* record, U8* w) {
    constexpr int PER = 8 / PLANE;
    const U8 mask = bytes((uint8_t)(((1 << PLANE) - 1) << AT));
#define ONE(i)                                                                        \
    {                                                                                 \
        const U8 bits = shifted<((i) % PER) * PLANE - AT>(load<U8>(record + (i) / PER * 64)); \
        w[i] = FIRST ? bits & mask : merge(w[i], bits, mask);                         \
    }
    ONE(0) ONE(1) ONE(2) ONE(3) ONE(4) ONE(5) ONE(6) ONE(7)
#undef ONE
}

// How many products of four codes with bytes fit into 16 bits. Codes that may be 128 or more have 0, but 1 with offsets,
// which are those of the codes as they are.
constexpr int run_of(int bits, bool table, bool offsets) {
    return table || bits == 8 ? offsets : bits == 6 ? 2 : bits == 5 ? 4 : 8;
}

// A record: planes of 4, 2 and 1 bits, lowest bits first, as many as BITS needs; or 8 bits.
template <int BITS, bool TABLE>
struct Codes {
    static constexpr int BYTES = 64 * BITS;
    static constexpr int run(bool offsets) { return run_of(BITS, TABLE, offsets); }

    INLINE void unpack(const uint8_t* record, U8 table, U8* w) {
        if constexpr (BITS == 8) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) w[i] = load<U8>(record + 64 * i);
            return;
        }
        if constexpr ((BITS & 4) != 0) plane<4, 0, true>(record, w);
        if constexpr ((BITS & 2) != 0) plane<2, BITS & 4, (BITS & 4) == 0>(record + 64 * (BITS & 4), w);
        if constexpr ((BITS & 1) != 0) plane<1, BITS & 6, (BITS & 6) == 0>(record + 64 * (BITS & 6), w);
        if constexpr (TABLE) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) w[i] = lookup(table, w[i]);
        }
    }
};

INLINE U8 table_of(const Weight& w) {
    uint8_t four[64];
    for (int i = 0; i < 4; ++i) memcpy(four + 16 * i, w.levels, 16);
    return load<U8>(four);
}

// scales of a plane from number `at` on
INLINE F32 scales_at(Scale kind, const uint8_t* plane, long at) {
    switch (kind) {
        case Scale::f16: return from_f16(plane + at * 2);
        case Scale::bf16: return from_bf16(plane + at * 2);
        case Scale::f32: return load<F32>(plane + at * 4);
        case Scale::e8m0: break;
    }
    const I32 e = widen_u8(plane + at);
    const I32 denormal = e < 2;  // exponents 0 and 1 stand for 2^-128 and 2^-127
    return (F32)((denormal & (spread(1 << 21) << (e & 1))) | (~denormal & ((e - 1) << 23)));
}

// Scales and offsets. A group is loaded once; of its blocks each sub-block has its own.
template <Scaling KIND, int SUB>
struct Scales {
    static constexpr bool OFFSETS = KIND != Scaling::plain && KIND != Scaling::small;
    static constexpr int PARTS = BLOCK / SUB;
    F32 scale, offset;  // of the group

    INLINE Scales group(const Weight& w, long tile, long group, int lane) {
        const long at = (tile * w.groups + group) * TILE + lane;
        Scales s;
        s.scale = scales_at(w.scale, w.scales, at) * spread(w.factor);
        if constexpr (KIND == Scaling::minimum) s.offset = scales_at(w.scale, w.mins, at);
        if constexpr (KIND == Scaling::zeros) s.offset = -(s.scale * floats(widen_u8(w.mins + at)));
        if constexpr (KIND == Scaling::lines || KIND == Scaling::nibbles) s.offset = -scales_at(w.scale, w.mins, at);
        return s;
    }

    // asks for what sub-blocks have of their own, ahead of time
    INLINE void fetch(const Weight& w, long tile, long block) {
        const long at = ((tile * w.blocks + block) * PARTS) * TILE + 768;
        if constexpr (KIND == Scaling::small || KIND == Scaling::lines || KIND == Scaling::nibbles)
            __builtin_prefetch(w.subscales + at);
        if constexpr (KIND == Scaling::lines) __builtin_prefetch(w.submins + at);
    }

    // of sub-block `part` of a block
    INLINE void part(const Scales& s, const Weight& w, long tile, long block, int part, int lane, F32& scale,
                     F32& offset) {
        const long at = ((tile * w.blocks + block) * PARTS + part) * TILE + lane;
        if constexpr (KIND == Scaling::small) {
            scale = s.scale * floats(widen_i8(w.subscales + at));
        } else if constexpr (KIND == Scaling::lines) {
            scale = s.scale * floats(widen_u8(w.subscales + at));
            offset = s.offset * floats(widen_u8(w.submins + at));
        } else if constexpr (KIND == Scaling::nibbles) {
            const I32 both = widen_u8(w.subscales + at);
            scale = s.scale * floats(both & 15);
            offset = s.offset * floats(both >> 4);
        } else {
            scale = s.scale;
            offset = s.offset;
        }
    }
};

}  // namespace fewbits::FEWBITS_ISA::reg
