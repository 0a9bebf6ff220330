#include "floats.h"

#include "lanes.h"

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

// Half as many lanes of `a`, then of `b`: in runs of 2 * HALF lanes, the first HALF plus the others.
template <int HALF>
INLINE F32 folded(F32 a, F32 b) {
    I32 first;
    for (int i = 0; i < LANES; ++i) first[i] = i / HALF * 2 * HALF + i % HALF;
    return __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, first + HALF);
}

// The sums of 16 vectors, each added up as in `sum_of`.
INLINE F32 sums_of(const F32* v) {
    F32 w[LANES / 2];
    for (int i = 0; i < 8; ++i) w[i] = folded<8>(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; ++i) w[i] = folded<4>(w[2 * i], w[2 * i + 1]);
    for (int i = 0; i < 2; ++i) w[i] = folded<2>(w[2 * i], w[2 * i + 1]);
    return folded<1>(w[0], w[1]);
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
    if constexpr (P * ROWS == LANES) store(sums, sums_of(y[0]));
    else
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

static void few(const FloatWeight& w, const float* x, long count, long first, float* out, const float* bias) {
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

// Many rows of activations: blocks of both stay in the caches, as sums do, whose lanes are those of `panel`.
constexpr long DEEP = 576, WIDE = 64, TALL = 8;  // columns, activations, rows of the weight

template <Scale KIND>
static void widen(const uint8_t* from, long some, float* to) {
    constexpr long SIZE = KIND == Scale::f32 ? 4 : 2;
    long c = 0;
    for (; c + LANES <= some; c += LANES) store(to + c, values<KIND>(from + c * SIZE));
    if (c == some) return;
    uint8_t end[LANES * SIZE] = {};
    memcpy(end, from + c * SIZE, (some - c) * SIZE);
    store(to + c, values<KIND>(end));
}

// y[p][r] += so many columns; a function of its own, so that all sums have registers
__attribute__((noinline)) static void more(const float* weight, const float* const* x, long columns, F32 (*y)[ROWS]) {
    const uint8_t* w[ROWS];
    const float* in[WIDTH];
    F32 sums[WIDTH][ROWS];
    memcpy(sums, y, sizeof sums);
    for (long c = 0; c < columns; c += LANES) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) w[r] = (const uint8_t*)(weight + r * DEEP + c);
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i) in[i] = x[i] + c;
        step<Scale::f32, WIDTH>(w, in, sums);
    }
    memcpy(y, sums, sizeof sums);
}

// out[i][r] = a sum of lanes + bias
INLINE void write(F32 (*sums)[ROWS], long count, long rows, const float* bias, float* out, long stride) {
    float found[WIDTH][ROWS];
    if constexpr (WIDTH * ROWS == LANES) store(found, sums_of(sums[0]));
    else
        for (int i = 0; i < WIDTH; ++i)
            for (int r = 0; r < ROWS; ++r) found[i][r] = sum_of(sums[i][r]);
    for (long i = 0; i < WIDTH && i < count; ++i)
        for (long r = 0; r < rows && r < ROWS; ++r) out[i * stride + r] = found[i][r] + (bias ? bias[r] : 0);
}

template <Scale KIND>
static void block(const FloatWeight& w, const float* x, long count, long first, long rows, float* out,
                  const float* bias) {
    constexpr long SIZE = KIND == Scale::f32 ? 4 : 2, PANELS = WIDE / WIDTH, GROUPS = TALL / ROWS;
    alignas(64) float weight[TALL][DEEP], ends[WIDTH][LANES] = {};
    alignas(64) F32 y[PANELS][GROUPS][WIDTH][ROWS];  // a row of up to DEEP columns needs one at a time
    for (long at = 0; at < w.columns; at += DEEP) {
        const long some = w.columns - at < DEEP ? w.columns - at : DEEP, whole = some / LANES * LANES;
        for (long r = 0; r < TALL; ++r)
            widen<KIND>(w.values + ((first + (r < rows ? r : rows - 1)) * w.columns + at) * SIZE, some, weight[r]);
        for (long p = 0; p < count; p += WIDTH)
            for (long g = 0; g < GROUPS; ++g) {
                F32(*sums)[ROWS] = y[w.columns > DEEP ? p / WIDTH : 0][g];
                if (!at) memset(sums, 0, sizeof y[0][0]);
                const float* in[WIDTH];
                for (long i = 0; i < WIDTH; ++i) in[i] = x + (p + i < count ? p + i : count - 1) * w.columns + at;
                more(weight[g * ROWS], in, whole, sums);
                if (whole < some) {
                    for (int i = 0; i < WIDTH; ++i)
                        memcpy(ends[i], in[i] + whole, (some - whole) * sizeof(float)), in[i] = ends[i];
                    more(weight[g * ROWS] + whole, in, LANES, sums);
                }
                const long row = first + g * ROWS;
                if (at + some == w.columns)
                    write(sums, count - p, rows - g * ROWS, bias ? bias + row : nullptr, out + p * w.rows + row, w.rows);
            }
    }
}

static void many(const FloatWeight& w, const float* x, long count, long first, long rows, float* out,
                 const float* bias) {
    const auto multiply = w.kind == Scale::f16    ? block<Scale::f16>
                          : w.kind == Scale::bf16 ? block<Scale::bf16>
                                                  : block<Scale::f32>;
    for (long p = 0; p < count; p += WIDE)
        for (long r = 0; r < rows; r += TALL)
            multiply(w, x + p * w.columns, count - p < WIDE ? count - p : WIDE, first + r,
                     rows - r < TALL ? rows - r : TALL, out + p * w.rows, bias);
}

// for more rows of activations than this the weight is worth converting
constexpr long FEW = 16;

static void multiply(const FloatWeight& w, const float* x, long count, long first, long rows, float* out,
                     const float* bias) {
    if (count > FEW) return many(w, x, count, first, rows, out, bias);
    for (long r = 0; r < rows; r += ROWS) few(w, x, count, first + r, out, bias);
}

extern const FloatProducts float_products = {multiply};

}  // namespace fewbits::FEWBITS_ISA
