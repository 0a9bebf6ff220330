#include "floats.h"

#include "simd.h"

namespace fewbits::FEWBITS_ISA {

// Sums of ROWS rows of the weight and WIDTH of activations stay in registers.
#if defined(__AVX512F__)
constexpr int ROWS = 4, WIDTH = 4;
#else
constexpr int ROWS = 2, WIDTH = 2;
#endif
constexpr long AHEAD = 2048;  // bytes that are fetched before they are needed

template <Scale KIND>
INLINE F32 values(const uint8_t* at) {
    if constexpr (KIND == Scale::f16) return from_f16(at);
    else if constexpr (KIND == Scale::bf16) return from_bf16(at);
    else return load<F32>(at);
}

INLINE float sum_of(F32 v) {
    float lanes[LANES];
    store(lanes, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// y[p][r] += 16 columns
template <Scale KIND, int P>
INLINE void step(const uint8_t* const* w, const float* const* x, F32 (*y)[ROWS]) {
    F32 weight[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) weight[r] = values<KIND>(w[r]);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
        const F32 in = load<F32>(x[p]);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) y[p][r] = fma(weight[r], in, y[p][r]);
    }
}

// sums[p][r] = product of P rows of activations with ROWS rows of the weight
template <Scale KIND, int P>
static void panel(const uint8_t* const* rows, const float* x, long columns, float (*sums)[ROWS]) {
    constexpr long SIZE = KIND == Scale::f32 ? 4 : 2;
    const long bytes = columns * SIZE, whole = columns / LANES * LANES;
    F32 y[P][ROWS] = {};
    const uint8_t* w[ROWS];
    const float* in[P];
    for (long c = 0; c < whole; c += LANES) {
        const long at = c * SIZE;
        const long next = at + AHEAD < bytes ? at + AHEAD : at + AHEAD + (ROWS - 1) * bytes;  // of the next rows
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            w[r] = rows[r] + at;
            __builtin_prefetch((const void*)((uintptr_t)rows[r] + next));
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) in[p] = x + p * columns + c;
        step<KIND, P>(w, in, y);
    }
    if (whole < columns) {
        uint8_t ends[ROWS][LANES * SIZE] = {};
        float input[P][LANES] = {};
        for (int r = 0; r < ROWS; ++r) w[r] = ends[r], memcpy(ends[r], rows[r] + whole * SIZE, bytes - whole * SIZE);
        for (int p = 0; p < P; ++p)
            in[p] = input[p], memcpy(input[p], x + p * columns + whole, (columns - whole) * sizeof(float));
        step<KIND, P>(w, in, y);
    }
    for (int p = 0; p < P; ++p)
        for (int r = 0; r < ROWS; ++r) sums[p][r] = sum_of(y[p][r]);
}

using Panel = void (*)(const uint8_t* const*, const float*, long, float (*)[ROWS]);

template <Scale KIND>
static Panel panel_of(long rows) {
    switch (rows) {
        case 1: return panel<KIND, 1>;
#if defined(__AVX512F__)
        case 2: return panel<KIND, 2>;
        case 3: return panel<KIND, 3>;
#endif
    }
    return panel<KIND, WIDTH>;
}

static void multiply(const FloatWeight& w, const float* x, long count, long first, float* out, const float* bias) {
    const long left = w.rows - first < ROWS ? w.rows - first : ROWS, bytes = w.columns * (w.kind == Scale::f32 ? 4 : 2);
    const uint8_t* rows[ROWS];  // past the last one, that again
    for (long r = 0; r < ROWS; ++r) rows[r] = w.values + (first + (r < left ? r : left - 1)) * bytes;
    for (long p = 0; p < count; p += WIDTH) {
        const long some = count - p < WIDTH ? count - p : WIDTH;
        const Panel multiply = w.kind == Scale::f16    ? panel_of<Scale::f16>(some)
                               : w.kind == Scale::bf16 ? panel_of<Scale::bf16>(some)
                                                       : panel_of<Scale::f32>(some);
        float sums[WIDTH][ROWS];
        multiply(rows, x + p * w.columns, w.columns, sums);
        for (long i = 0; i < some; ++i)
            for (long r = 0; r < left; ++r)
                out[(p + i) * w.rows + first + r] = sums[i][r] + (bias ? bias[first + r] : 0);
    }
}

extern const FloatProducts float_products = {ROWS, multiply};

}  // namespace fewbits::FEWBITS_ISA
