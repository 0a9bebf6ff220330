// Compiled without contraction to fused operations: codes must be the same on every machine.
#include "encode_codes.h"

#include "encode_lanes.h"

namespace fewbits::FEWBITS_ISA {
namespace {

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

// Calls take(at) for every whole vector; the rest is taken from a copy, and what is put there copied back.
template <class In, class Out, class Take>
inline void each_vector(const In* in, int count, Out* out, Take&& take) {
    int i = 0;
    for (; i + LANES <= count; i += LANES) take(in + i, out + i);
    if (i == count) return;
    In from[LANES]{};
    Out to[LANES];
    std::memcpy(from, in + i, (count - i) * sizeof(In));
    take(from, to);
    std::memcpy(out + i, to, (count - i) * sizeof(Out));
}

// Codes of columns that share a scale.
template <class Rank>
void codes_of(const float* w, int count, float scale, float offset, float zero, const Rank& rank, uint8_t* out) {
    const float step = scale == 0.0f ? INF : scale;  // a zero scale decodes every code alike
    each_vector(w, count, out, [&](const float* from, uint8_t* to) {
        V x;
        std::memcpy(&x, from, sizeof x);
        to_bytes(rank((x - offset) / step + zero), to);
    });
}

// Values of columns that share a scale: (code - zero) * scale * factor + offset in just this order.
template <bool FACTOR, bool OFFSET>
void values_of(const Grid& grid, const uint8_t* codes, ptrdiff_t first, ptrdiff_t last, float* w) {
    const int run = grid.width / grid.subs;
    for (ptrdiff_t at = first; at < last; ++at) {
        const float zero = grid.zero ? grid.zero[at] : grid.middle;
        each_vector(codes + at * run, run, w + at * run, [&](const uint8_t* from, float* to) {
            V u = (from_bytes(from) - zero) * grid.scale[at];
            if (FACTOR) u *= grid.factor;
            if (OFFSET) u += grid.offset[at];
            std::memcpy(to, &u, sizeof u);
        });
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
    if (!table) {
        const auto values = grid.factor == 1.0f ? (grid.offset ? values_of<false, true> : values_of<false, false>)
                                                : (grid.offset ? values_of<true, true> : values_of<true, false>);
        return values(grid, codes, first * grid.subs, last * grid.subs, w);
    }
    for (ptrdiff_t at = first * grid.subs; at < last * grid.subs; ++at)
        for (int i = 0; i < run; ++i) w[at * run + i] = table[codes[at * run + i]] * grid.scale[at];
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
