#include "steps.h"

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

// work(first column, whole): vectors of a row; the last one may be part of one, which goes through `load_some`
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

#if defined(__AVX512F__)
INLINE void to_f16(uint16_t* to, F32 v) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
INLINE void to_f16(uint16_t* to, F32 v) {
    const Halves h = halves(v);
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(_mm256_castsi256_ps(h.low), _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)to + 1, _mm256_cvtps_ph(_mm256_castsi256_ps(h.high), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__ARM_FEATURE_DOTPROD)
INLINE void to_f16(uint16_t* to, F32 v) {
    const auto parts = quarters<float32x4_t>(v);
    for (int i = 0; i < 4; ++i) vst1_u16(to + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(parts.at[i])));
}
#else
INLINE void to_f16(uint16_t* to, F32 v) {
    float lanes[LANES];
    store(lanes, v);
    for (int i = 0; i < LANES; ++i) {
        const float size = fabsf(lanes[i]);
        uint32_t bits;
        memcpy(&bits, &lanes[i], 4);
        const uint16_t sign = bits >> 16 & 0x8000;
        bits &= 0x7fffffff;
        if (size >= 65520) to[i] = 0x7c00;
        else if (size < 0x1p-14f) to[i] = (uint16_t)nearbyintf(size * 0x1p24f);
        else if (size == size) to[i] = (uint16_t)((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
        else to[i] = 0x7e00;
        to[i] |= sign;
    }
}
#endif

static void widen(Scale kind, const uint8_t* from, long width, float* out) {
    if (kind == Scale::f32) {
        memcpy(out, from, width * sizeof(float));
        return;
    }
    auto values = [&](const void* at) { return kind == Scale::f16 ? from_f16(at) : from_bf16(at); };
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, values(from + 2 * i));
    if (i == width) return;
    uint16_t end[LANES] = {};
    memcpy(end, from + 2 * i, 2 * (width - i));
    store_some(out + i, values(end), width - i);
}

static void norm(const float* x, const float* weight, long width, float epsilon, float* out) {
    F32 squares = {};
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        const F32 v = load<F32>(x + i);
        squares = fma(v, v, squares);
    }
    if (i < width) {
        const F32 v = load_some(x + i, width - i);
        squares = fma(v, v, squares);
    }
    const F32 factor = spread(1 / sqrtf(sum_of(squares) / (float)width + epsilon));
    over_row(x, weight, width, out, [&](F32 v, F32 w) { return v * factor * w; });
}

static void gate(const float* gate, const float* up, long width, float* out) {
    over_row(gate, up, width, out, [](F32 g, F32 u) { return g / (1.0f + exponential(-g)) * u; });
}

static void add(const float* x, long width, float* to) {
    over_row(x, to, width, to, [](F32 a, F32 b) { return a + b; });
}

static void rotate(float* x, const float* cos, const float* sin, long half) {
    for (long i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

static void keep(const Head& head, long position, const float* key, const float* value) {
    uint16_t halves[LANES];
    uint16_t* keys = head.keys + position / LINE * head.width * LINE + position % LINE;
    uint16_t* values = head.values + position * lined(head.width);
    for (long c = 0; c < head.width; c += LANES) {
        const long some = head.width - c < LANES ? head.width - c : LANES;
        to_f16(halves, load_some(key + c, some));
        for (long i = 0; i < some; ++i) keys[(c + i) * LINE] = halves[i];
        to_f16(values + c, load_some(value + c, some));
    }
}

constexpr int STRETCH = 64;     // positions whose scores are known before their values are added up
constexpr float LEAST = -1e30f;  // below every score

// For R queries: scores of a stretch, then what they change in the sums so far (softmax in one pass).
template <int R>
static void attend_some(const Head& head, const Query* queries, float scale) {
    const long wide = lined(head.width);
    long first = queries[0].first, last = queries[0].last;
    for (int r = 1; r < R; ++r) {
        if (queries[r].first < first) first = queries[r].first;
        if (queries[r].last > last) last = queries[r].last;
    }
    alignas(64) float sums[R][WIDEST_HEAD] = {};
    alignas(64) float weights[R][STRETCH];
    float most[R];
    F32 total[R] = {};
    for (float& m : most) m = LEAST;
    const I32 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (long at = first / LINE * LINE; at <= last; at += STRETCH) {
        const long count = last + 1 - at < STRETCH ? last + 1 - at : STRETCH;
        for (long p = 0; p < count; p += LINE) {
            const uint16_t* keys = head.keys + (at + p) * head.width;
            F32 s[R] = {};
            for (long c = 0; c < head.width; ++c) {
                const F32 k = from_f16(keys + c * LINE);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) s[r] = fma(spread(queries[r].x[c]), k, s[r]);
            }
            for (int r = 0; r < R; ++r) {
                const I32 position = lanes + (int32_t)(at + p);
                const I32 seen = (position >= (int32_t)queries[r].first) & (position <= (int32_t)queries[r].last);
                store(weights[r] + p, choose(seen, s[r] * scale, spread(LEAST)));
            }
        }
        for (int r = 0; r < R; ++r) {
            F32 highest = spread(most[r]);
            for (long p = 0; p < count; p += LINE) {
                const F32 s = load<F32>(weights[r] + p);
                highest = choose(s > highest, s, highest);
            }
            const float now = largest_of(highest);
            if (now > most[r]) {
                const F32 shrink = exponential(spread(most[r] - now));
                for (long c = 0; c < wide; c += LANES) store(sums[r] + c, load<F32>(sums[r] + c) * shrink);
                total[r] = total[r] * shrink;
                most[r] = now;
            }
            for (long p = 0; p < count; p += LINE) {
                const F32 s = load<F32>(weights[r] + p);
                const F32 w = choose(s == spread(LEAST), F32{}, exponential(s - spread(now)));
                store(weights[r] + p, w);
                total[r] = total[r] + w;
            }
        }
        for (long c = 0; c < wide; c += LANES) {
            F32 sum[R], odd[R] = {};
            for (int r = 0; r < R; ++r) sum[r] = load<F32>(sums[r] + c);
            const uint16_t* values = head.values + at * wide + c;
            long p = 0;
            for (; p + 2 <= count; p += 2) {
                const F32 v = from_f16(values + p * wide), w = from_f16(values + (p + 1) * wide);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    sum[r] = fma(spread(weights[r][p]), v, sum[r]);
                    odd[r] = fma(spread(weights[r][p + 1]), w, odd[r]);
                }
            }
            if (p < count)
                for (int r = 0; r < R; ++r) sum[r] = fma(spread(weights[r][p]), from_f16(values + p * wide), sum[r]);
            for (int r = 0; r < R; ++r) store(sums[r] + c, sum[r] + odd[r]);
        }
    }
    for (int r = 0; r < R; ++r) {
        const float factor = 1 / sum_of(total[r]);
        for (long c = 0; c < head.width; ++c) queries[r].out[c] = sums[r][c] * factor;
    }
}

static void attend(const Head& head, const Query* queries, int count, float scale) {
    switch (count) {
        case 1: return attend_some<1>(head, queries, scale);
        case 2: return attend_some<2>(head, queries, scale);
        case 3: return attend_some<3>(head, queries, scale);
        default: return attend_some<4>(head, queries, scale);
    }
}

extern const Steps steps = {widen, norm, gate, add, rotate, keep, attend};

}  // namespace fewbits::FEWBITS_ISA
