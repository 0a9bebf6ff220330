// Rows of float32 in vectors, and what they need beside simd.h. For files that are compiled once a set of instructions.
#pragma once

#include <math.h>

#include "simd.h"

namespace fewbits::FEWBITS_ISA {

INLINE F32 choose(I32 mask, F32 yes, F32 no) { return (F32)(((I32)yes & mask) | ((I32)no & ~mask)); }

template <class One>
INLINE float over_lanes(F32 v, One one) {
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = one(lanes[i], lanes[i + half]);
    return lanes[0];
}

INLINE float sum_of(F32 v) {
    return over_lanes(v, [](float a, float b) { return a + b; });
}
INLINE float largest_of(F32 v) {
    return over_lanes(v, [](float a, float b) { return a > b ? a : b; });
}

// The last vector of a row may be part of one.
INLINE F32 load_some(const float* from, long count) {
    float lanes[LANES] = {};
    memcpy(lanes, from, count * sizeof(float));
    return load<F32>(lanes);
}
INLINE void store_some(float* to, F32 v, long count) {
    float lanes[LANES];
    store(lanes, v);
    memcpy(to, lanes, count * sizeof(float));
}

// out[i] = one(a[i], b[i])
template <class One>
INLINE void over_row(const float* a, const float* b, long width, float* out, One one) {
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, one(load<F32>(a + i), load<F32>(b + i)));
    if (i < width) store_some(out + i, one(load_some(a + i, width - i), load_some(b + i, width - i)), width - i);
}

// e^x to 2 units in the last place: 2^n times a polynomial of the rest. Not a number stays that.
INLINE F32 exponential(F32 x) {
    const F32 low = spread(-87.0f), high = spread(88.0f);
    x = choose(x < low, low, choose(x > high, high, x));
    const F32 whole = fma(x, spread(1.44269504f), spread(MAGIC_VALUE)), n = whole - MAGIC_VALUE;
    const F32 r = fma(n, spread(2.12194440e-4f), fma(n, spread(-0.693359375f), x));  // less n * ln 2, in two parts
    F32 y = spread(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, spread(c));
    return (F32)((I32)y + (((I32)whole - MAGIC) << 23));
}

// To some units of 2^-24: small results are not relatively exact.
INLINE F32 tangent(F32 x) { return 1.0f - 2.0f / (exponential(x + x) + 1.0f); }  // hyperbolic

}  // namespace fewbits::FEWBITS_ISA
