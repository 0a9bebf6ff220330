#include "attention.h"

#include "lanes.h"

namespace fewbits::FEWBITS_ISA {

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
static void attend_some(const Head& head, const Query* queries, float scale, float cap) {
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
                F32 score = s[r] * scale;
                if (cap) score = tangent(score / spread(cap)) * spread(cap);
                store(weights[r] + p, choose(seen, score, spread(LEAST)));
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

static void attend(const Head& head, const Query* queries, int count, float scale, float cap) {
    switch (count) {
        case 1: return attend_some<1>(head, queries, scale, cap);
        case 2: return attend_some<2>(head, queries, scale, cap);
        case 3: return attend_some<3>(head, queries, scale, cap);
        default: return attend_some<4>(head, queries, scale, cap);
    }
}

extern const Attention attention = {keep, attend};

}  // namespace fewbits::FEWBITS_ISA
