// Compiled without contraction to fused operations: codes must be the same on every machine.
#include "encode_codes.h"

#include "encode_lanes.h"

namespace fewbits::FEWBITS_ISA {
namespace {

// The code nearest to u, or the rank of its level; and that level.
struct Even {
    V low, high;
    explicit Even(const Levels& levels) : low(all(levels.low)), high(all(levels.high)) {}
    V code(V u) const { return to_integer(min(max(u, low), high)); }
    V level(V code, V, float zero) const { return code - zero; }
};

struct Ranked {
    const Levels& levels;
    explicit Ranked(const Levels& levels) : levels(levels) {}
    V code(V u) const {
        V rank{};
        for (int n = 0; n < levels.count; ++n) rank += u > all(levels.bounds[n]) ? all(1.0f) : V{};
        return rank;
    }
    V level(V, V u, float) const {
        V level = all(levels.low);
        for (int n = 0; n < levels.count; ++n) level += u > all(levels.bounds[n]) ? all(levels.rises[n]) : V{};
        return level;
    }
};

double sum(V a) {
    double total = 0;
    for (int l = 0; l < LANES; ++l) total += a[l];
    return total;
}

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
        to_bytes(rank.code((x - offset) / step + zero), to);
    });
}

// The same for whole vectors, and what is lost.
template <class Rank>
Squares measured(const Grid& grid, const Levels& levels, const float* w, const float* importance, ptrdiff_t count,
                 uint8_t* codes) {
    const Rank rank(levels);
    const int run = grid.width / grid.subs;
    Squares total{0, 0};
    for (ptrdiff_t unit = 0, at = 0; unit < count; ++unit) {
        V off{}, whole{};
        for (const ptrdiff_t end = at + grid.subs; at < end; ++at) {
            const float scale = grid.scale[at], step = scale == 0.0f ? INF : scale;
            const float offset = grid.offset ? grid.offset[at] : 0.0f, zero = grid.middle;
            for (ptrdiff_t i = at * run; i < (at + 1) * run; i += LANES) {
                V x, weight = all(1.0f);
                std::memcpy(&x, w + i, sizeof x);
                if (importance) std::memcpy(&weight, importance + i, sizeof weight);
                const V u = (x - offset) / step + zero, code = rank.code(u);
                to_bytes(code, codes + i);
                off += square(x - (rank.level(code, u, zero) * scale + offset)) * weight;
                whole += square(x) * weight;
            }
        }
        total.off += sum(off);
        total.whole += sum(whole);
    }
    return total;
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
            codes_of(w + at * run, run, scale, offset, zero, Even(levels), out);
            continue;
        }
        codes_of(w + at * run, run, scale, offset, zero, Ranked(levels), out);
        for (int i = 0; i < run; ++i) out[i] = order[out[i]];
    }
}

Squares measured_codes(const Grid& grid, const Levels& levels, const uint8_t* order, const float* w,
                       const float* importance, ptrdiff_t count, uint8_t* codes) {
    if (!levels.count) return measured<Even>(grid, levels, w, importance, count, codes);
    const Squares found = measured<Ranked>(grid, levels, w, importance, count, codes);
    for (ptrdiff_t i = 0; i < count * grid.width; ++i) codes[i] = order[codes[i]];
    return found;
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
