#include "columns.h"

#include <algorithm>
#include <vector>

namespace fewbits::FEWBITS_ISA {
namespace {

constexpr long LANES = 64;  // rows that go together: four registers of sixteen
constexpr long BLOCK = 32;  // columns whose errors reach those after the block together

using Strip = float[LANES];

// Sums of this size have no digits behind the point left: adding and taking it away rounds to even.
constexpr float ROUNDER = 12582912.0f;

void nearest(const Rounding& how, const float* __restrict x, const float* __restrict scale, const float* __restrict inverse,
             const float* __restrict shift, const float* __restrict base, float* __restrict value) {
    if (how.levels == 0) {
        for (long r = 0; r < LANES; ++r) {
            float code = shift[r] + x[r] * inverse[r];
            code = code > how.low ? code : how.low;
            code = code < how.high ? code : how.high;
            code = (code + ROUNDER) - ROUNDER;
            value[r] = base[r] + code * scale[r];
        }
        return;
    }
    Strip u;
    for (long r = 0; r < LANES; ++r) u[r] = x[r] * inverse[r];
    for (long r = 0; r < LANES; ++r) value[r] = how.table[0];
    for (int k = 1; k < how.levels; ++k) {
        const float bound = how.bounds[k - 1], level = how.table[k];
        for (long r = 0; r < LANES; ++r) value[r] = u[r] > bound ? level : value[r];
    }
    for (long r = 0; r < LANES; ++r) value[r] *= scale[r];
}

void copy(const float* from, float* to, long count, float rest) {
    for (long r = 0; r < count; ++r) to[r] = from[r];
    for (long r = count; r < LANES; ++r) to[r] = rest;
}

// Rows strip * LANES … of all columns.
void sweep(const Sweep& s, long strip) {
    const long n = s.columns, first = strip * LANES, count = std::min(LANES, s.rows - first);
    static thread_local std::vector<float> space;
    space.resize((2 * n) * LANES);
    Strip* x = reinterpret_cast<Strip*>(space.data());
    Strip* errors = x + n;
    for (long j = 0; j < n; ++j) copy(s.x + j * s.rows + first, x[j], count, 0);

    for (long start = 0; start < n; start += BLOCK) {
        const long stop = std::min(start + BLOCK, n);
        for (long j = start; j < stop; ++j) {
            const long group = s.position[j] / s.rounding.run * s.rows + first;
            Strip scale, inverse, shift, base, value, old;
            copy(s.rounding.scale + group, scale, count, 0);
            copy(s.rounding.inverse + group, inverse, count, 0);
            if (s.rounding.levels == 0) {
                copy(s.rounding.shift + group, shift, count, 0);
                copy(s.rounding.base + group, base, count, 0);
            }
            nearest(s.rounding, x[j], scale, inverse, shift, base, value);
            if (s.old) {
                copy(s.old + j * s.rows + first, old, count, 0);
                for (long r = 0; r < LANES; ++r) errors[j][r] = value[r] - old[r];
            } else {
                for (long r = 0; r < LANES; ++r) errors[j][r] = x[j][r] - value[r];
            }
            for (long r = 0; r < count; ++r) s.values[j * s.rows + first + r] = value[r];
            for (long r = 0; r < count; ++r) s.errors[j * s.rows + first + r] = errors[j][r];
            for (long i = j + 1; i < stop; ++i) {
                const float share = s.mix[j * n + i];
                for (long r = 0; r < LANES; ++r) x[i][r] -= share * errors[j][r];
            }
        }
        for (long i = stop; i < n; ++i) {
            Strip sum;
            for (long r = 0; r < LANES; ++r) sum[r] = x[i][r];
            for (long j = start; j < stop; ++j) {
                const float share = s.mix[j * n + i];
                for (long r = 0; r < LANES; ++r) sum[r] -= share * errors[j][r];
            }
            for (long r = 0; r < LANES; ++r) x[i][r] = sum[r];
        }
    }
}

}  // namespace

extern const Sweeps sweeps = {LANES, sweep};

}  // namespace fewbits::FEWBITS_ISA
