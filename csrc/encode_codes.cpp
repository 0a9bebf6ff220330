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

}  // namespace

void nearest_codes(const Grid& grid, const Levels& levels, const uint8_t* order, ptrdiff_t first, ptrdiff_t last,
                   uint8_t* codes) {
    const int run = grid.width / grid.subs;
    for (ptrdiff_t at = first * grid.subs; at < last * grid.subs; ++at) {
        const float offset = grid.offset ? grid.offset[at] : 0.0f, zero = grid.zero ? grid.zero[at] : grid.middle;
        const float* w = grid.w + at * run;
        uint8_t* out = codes + at * run;
        if (!levels.count) {
            codes_of(w, run, grid.scale[at], offset, zero, Even{all(levels.low), all(levels.high)}, out);
            continue;
        }
        codes_of(w, run, grid.scale[at], offset, zero, Ranked{levels}, out);
        for (int i = 0; i < run; ++i) out[i] = order[out[i]];
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

}  // namespace fewbits::FEWBITS_ISA
