#include "decode.h"

#include "unpack.h"

namespace fewbits::FEWBITS_ISA {

// A record's codes: four columns of every row side by side.
using Quads = uint32_t[8][TILE];

template <int BITS>
static void unpack(const uint8_t* record, Quads quads) {
    for (int lane = 0; lane < TILE; lane += reg::LANES) {
        reg::U8 w[8];
        reg::Codes<BITS, false>::unpack(record + 4 * lane, reg::U8{}, w);
        for (int q = 0; q < 8; ++q) store(quads[q] + lane, w[q]);
    }
}

static void unpack(const Weight& w, long tile, long block, Quads quads) {
    const uint8_t* record = w.codes + (tile * w.blocks + block) * 64 * w.bits;
    switch (w.bits) {
        case 1: return unpack<1>(record, quads);
        case 2: return unpack<2>(record, quads);
        case 3: return unpack<3>(record, quads);
        case 4: return unpack<4>(record, quads);
        case 5: return unpack<5>(record, quads);
        case 6: return unpack<6>(record, quads);
        default: return unpack<8>(record, quads);
    }
}

// Scales and offsets of a block's halves, where the sub-blocks have 32 columns twice the same.
struct Lines {
    float scale[2][TILE], offset[2][TILE];
};

template <Scaling KIND, int SUB>
static void lines(const Weight& w, long tile, long block, Lines& to) {
    using Scales = reg::Scales<KIND, SUB>;
    for (int lane = 0; lane < TILE; lane += reg::LANES) {
        const Scales group = Scales::group(w, tile, block / w.group, lane);
        for (int half = 0; half < 2; ++half) {
            reg::F32 scale, offset = {};
            Scales::part(group, w, tile, block, half * Scales::PARTS / 2, lane, scale, offset);
            store(to.scale[half] + lane, scale);
            store(to.offset[half] + lane, Scales::OFFSETS ? offset : reg::F32{});
        }
    }
}

static void lines(const Weight& w, long tile, long block, Lines& to) {
    switch (w.scaling) {
        case Scaling::plain: return lines<Scaling::plain, 32>(w, tile, block, to);
        case Scaling::minimum: return lines<Scaling::minimum, 32>(w, tile, block, to);
        case Scaling::zeros: return lines<Scaling::zeros, 32>(w, tile, block, to);
        case Scaling::lines: return lines<Scaling::lines, 32>(w, tile, block, to);
        case Scaling::nibbles: return lines<Scaling::nibbles, 16>(w, tile, block, to);
        case Scaling::small: break;
    }
    return w.sub == 16 ? lines<Scaling::small, 16>(w, tile, block, to) : lines<Scaling::small, 32>(w, tile, block, to);
}

static void rows(const Weight& w, long tile, const int* lanes, int count, float* const* out) {
    const F32 levels = load<F32>(w.values);
    Quads quads;
    Lines l;
    uint32_t codes[TILE][8];
    for (long b = 0; b < w.blocks; ++b) {
        unpack(w, tile, b, quads);
        lines(w, tile, b, l);
        for (int i = 0; i < count; ++i)
            for (int q = 0; q < 8; ++q) codes[i][q] = quads[q][lanes[i]];
        const long left = w.columns - b * BLOCK;
        for (int i = 0; i < count; ++i) {
            float values[BLOCK];
            float* to = left < BLOCK ? values : out[i] + b * BLOCK;
            for (int half = 0; half < 2; ++half) {
                const I32 code = widen_u8(codes[i] + 4 * half);
                const F32 level = w.table ? pick(levels, code) : floats(code - w.zero);
                store(to + LANES * half, level * l.scale[half][lanes[i]] + l.offset[half][lanes[i]]);
            }
            if (left < BLOCK) memcpy(out[i] + b * BLOCK, values, left * sizeof(float));
        }
    }
}

static void column(const Weight& w, long tile, long column, float* out) {
    const long block = column / BLOCK, at = column % BLOCK;
    Quads quads;
    Lines l;
    unpack(w, tile, block, quads);
    lines(w, tile, block, l);
    const uint8_t* codes = (const uint8_t*)quads[at / 4] + at % 4;
    for (int i = 0; i < TILE; ++i) {
        const int code = codes[4 * i];
        const float level = w.table ? w.values[code] : (float)(code - w.zero);
        out[i] = level * l.scale[at / LANES][i] + l.offset[at / LANES][i];
    }
}

template <bool TABLE>
static void turned(const Weight& w, long tile, float* out, long stride) {
    const F32 levels = load<F32>(w.values);
    Quads quads;
    Lines l;
    for (long b = 0; b < w.blocks; ++b) {
        unpack(w, tile, b, quads);
        lines(w, tile, b, l);
        const long left = w.columns - b * BLOCK;
        for (int half = 0; half < 2; ++half) {
            const F32 scale = load<F32>(l.scale[half]), offset = load<F32>(l.offset[half]);
            for (int c = half * LANES; c < (half + 1) * LANES && c < left; ++c, out += stride) {
                const I32 code = (I32)(load<U32>(quads[c / 4]) >> (8 * (c % 4)) & 255);
                store(out, (TABLE ? pick(levels, code) : floats(code - w.zero)) * scale + offset);
            }
        }
    }
}

static void turned(const Weight& w, long tile, float* out, long stride) {
    return w.table ? turned<true>(w, tile, out, stride) : turned<false>(w, tile, out, stride);
}

extern const Decoders decoders = {rows, column, turned};

}  // namespace fewbits::FEWBITS_ISA
