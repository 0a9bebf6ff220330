// Compiled without contraction to fused operations: codes must be the same on every machine.
#include "encode_codes.h"

#include "encode_lanes.h"

namespace fewbits::FEWBITS_ISA {
namespace {

typedef uint8_t B __attribute__((vector_size(FEWBITS_LANES)));

struct Even {
    V low, high;
    V operator()(V u) const { return to_integer(min(max(u, low), high)); }
};

struct Ranked {
    const Levels& levels;
    V operator()(V u) const {
        V rank{};
        for (int n = 0; n < levels.count; ++n) rank += u > all(levels.bounds[n]) ? all(1.0f) : V{};
        return rank;
    }
};

// Codes of columns that share a scale; past the last whole vector they are taken from a copy.
template <class Rank>
void codes_of(const float* w, int count, float scale, float offset, float zero, const Rank& rank, uint8_t* out) {
    const float step = scale == 0.0f ? INF : scale;  // a zero scale decodes every code alike
    for (int i = 0; i < count; i += LANES) {
        const int some = count - i < LANES ? count - i : LANES;
        V x{};
        if (some == LANES) std::memcpy(&x, w + i, sizeof x);
        else std::memcpy(&x, w + i, some * sizeof(float));
        const B codes = __builtin_convertvector(__builtin_convertvector(rank((x - offset) / step + zero), I), B);
        if (some == LANES) std::memcpy(out + i, &codes, sizeof codes);
        else std::memcpy(out + i, &codes, some);
    }
}

// Values of columns that share a scale: (code - zero) * scale * factor + offset in just this order.
template <bool FACTOR, bool OFFSET>
void values_of(const uint8_t* codes, int count, float scale, float factor, float offset, float zero, float* out) {
    for (int i = 0; i < count; i += LANES) {
        const int some = count - i < LANES ? count - i : LANES;
        B bytes{};
        if (some == LANES) std::memcpy(&bytes, codes + i, sizeof bytes);
        else std::memcpy(&bytes, codes + i, some);
        V u = (__builtin_convertvector(__builtin_convertvector(bytes, I), V) - zero) * scale;
        if (FACTOR) u *= factor;
        if (OFFSET) u += offset;
        if (some == LANES) std::memcpy(out + i, &u, sizeof u);
        else std::memcpy(out + i, &u, some * sizeof(float));
    }
}

}  // namespace

void nearest_codes(const Grid& grid, const Levels& levels, const uint8_t* order, const float* w, ptrdiff_t first,
                   ptrdiff_t last, uint8_t* codes) {
    const int run = grid.width / grid.subs;
    for (ptrdiff_t at = first * grid.subs; at < last * grid.subs; ++at) {
        const float offset = grid.offset ? grid.offset[at] : 0.0f, zero = grid.zero ? grid.zero[at] : grid.middle;
        const float scale = grid.scale[at] * grid.factor;
        uint8_t* out = codes + at * run;
        if (!levels.count) {
            codes_of(w + at * run, run, scale, offset, zero, Even{all(levels.low), all(levels.high)}, out);
            continue;
        }
        codes_of(w + at * run, run, scale, offset, zero, Ranked{levels}, out);
        for (int i = 0; i < run; ++i) out[i] = order[out[i]];
    }
}

void values_of(const Grid& grid, const float* table, const uint8_t* codes, ptrdiff_t first, ptrdiff_t last, float* w) {
    const int run = grid.width / grid.subs;
    const auto values = grid.factor == 1.0f ? (grid.offset ? values_of<false, true> : values_of<false, false>)
                                            : (grid.offset ? values_of<true, true> : values_of<true, false>);
    for (ptrdiff_t at = first * grid.subs; at < last * grid.subs; ++at) {
        const uint8_t* from = codes + at * run;
        float* to = w + at * run;
        const float scale = grid.scale[at], zero = grid.zero ? grid.zero[at] : grid.middle;
        if (table)
            for (int i = 0; i < run; ++i) to[i] = table[from[i]] * scale;
        else values(from, run, scale, grid.factor, grid.offset ? grid.offset[at] : 0.0f, zero, to);
    }
}

void join_planes(const uint8_t* codes, int bits, int parts, int run, ptrdiff_t first, ptrdiff_t last, uint8_t* bytes) {
    for (ptrdiff_t at = first; at < last; ++at) {
        const uint8_t* from = codes + at * parts * run;
        uint8_t* to = bytes + at * run;
        std::memcpy(to, from, run);
        for (int part = 1; part < parts; ++part)
            for (int j = 0; j < run; ++j) to[j] |= uint8_t(from[part * run + j] << (part * bits));
    }
}

void split_planes(const uint8_t* bytes, int bits, int parts, int run, ptrdiff_t first, ptrdiff_t last, uint8_t* codes) {
    const uint8_t mask = uint8_t((1 << bits) - 1);
    for (ptrdiff_t at = first; at < last; ++at)
        for (int part = 0; part < parts; ++part)
            for (int j = 0; j < run; ++j)
                codes[(at * parts + part) * run + j] = uint8_t(bytes[at * run + j] >> (part * bits)) & mask;
}

}  // namespace fewbits::FEWBITS_ISA
