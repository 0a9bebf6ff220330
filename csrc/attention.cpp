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

// What is kept -------------------------------------------------------------------------------------------------------

// A factor that spreads what sticks out in single columns over all of them: Hadamard's matrix, scaled so that it is its
// own inverse, for as many columns at a time as is a power of two. Scores do not change when queries and keys are turned.
INLINE void turn(float* x, long width) {
    const long block = width & -width;
    const float factor = 1 / sqrtf((float)block);
    for (long half = 1; half < block; half *= 2)
        for (long i = 0; i < width; i += 2 * half) {
            float *a = x + i, *b = a + half;
            if (half < LANES)
                for (long k = 0; k < half; ++k) {
                    const float sum = a[k] + b[k], difference = a[k] - b[k];
                    a[k] = sum, b[k] = difference;
                }
            else
                for (long k = 0; k < half; k += LANES) {
                    const F32 p = load<F32>(a + k), q = load<F32>(b + k);
                    store(a + k, p + q), store(b + k, p - q);
                }
        }
    for (long i = 0; i < width; ++i) x[i] *= factor;
}

static uint16_t half_of(float x) {
    uint16_t halves[LANES];
    to_f16(halves, spread(x));
    return halves[0];
}

static float value_of(uint16_t half) {
    uint16_t halves[LANES] = {half};
    float lanes[LANES];
    store(lanes, from_f16(halves));
    return lanes[0];
}

// 32 values as signed bytes, or as codes 0 … 15, and their scale. One that is not finite makes the scale not a number.
INLINE uint16_t round_run(Kept kept, const float* x, int8_t* codes) {
    const F32 v[2] = {load<F32>(x), load<F32>(x + LANES)};
    const float most = largest_of(larger(v[0], v[1])), least = -largest_of(larger(-v[0], -v[1]));
    const F32 sizes = larger(choose(v[0] < 0.0f, -v[0], v[0]), choose(v[1] < 0.0f, -v[1], v[1]));
    const bool strange = any(~(sizes <= 3e38f)) || any(v[0] != v[0]);
    const float end = -least > most ? least : most, zero = kept == Kept::q8_0 ? 0 : 8;
    const float low = kept == Kept::q8_0 ? -127 : 0, high = kept == Kept::q8_0 ? 127 : 15;
    const float wanted = kept == Kept::q8_0 ? fabsf(end) / 127 : end / -8;
    const uint16_t half = half_of(strange ? NAN : wanted > 65504 ? 65504 : wanted < -65504 ? -65504 : wanted);
    const float scale = value_of(half), inverse = scale != 0 && !strange ? 1 / scale : 0;
    for (int i = 0; i < 2; ++i) {
        const F32 code = larger(spread(low), -larger(spread(-high), -(v[i] * inverse + zero)));
        const I8x16 bytes = __builtin_convertvector((I32)(code + MAGIC_VALUE) - MAGIC, I8x16);
        memcpy(codes + i * LANES, &bytes, sizeof bytes);
    }
    return half;
}

static void keep_codes(const Head& head, long position, const float* key, const float* value) {
    const long runs = (head.width + RUN - 1) / RUN, line = position / LINE, lane = position % LINE;
    const bool four = head.kept == Kept::q4_0;
    const long bytes = four ? RUN / 2 : RUN;  // of a run
    float turned[2][WIDEST_HEAD] = {};
    memcpy(turned[0], key, head.width * sizeof(float));
    memcpy(turned[1], value, head.width * sizeof(float));
    if (four) turn(turned[0], head.width), turn(turned[1], head.width);
    for (long run = 0; run < runs; ++run)
        for (int which = 0; which < 2; ++which) {
            int8_t codes[RUN];
            const uint16_t scale = round_run(head.kept, turned[which] + run * RUN, codes);
            if (four)
                for (int i = 0; i < RUN / 2; ++i) codes[i] = (int8_t)(codes[i] | codes[i + RUN / 2] << 4);
            if (which) {
                head.value_scales[position * runs + run] = scale;
                memcpy(head.values + (position * runs + run) * bytes, codes, bytes);
                continue;
            }
            head.key_scales[(line * runs + run) * LINE + lane] = scale;
            uint8_t* to = head.keys + (line * runs + run) * bytes * LINE + lane;
            for (long i = 0; i < bytes; ++i) to[i * LINE] = (uint8_t)codes[i];
        }
}

static void keep(const Head& head, long position, const float* key, const float* value) {
    if (head.kept != Kept::f16) return keep_codes(head, position, key, value);
    uint16_t halves[LANES];
    uint16_t* keys = (uint16_t*)head.keys + position / LINE * head.width * LINE + position % LINE;
    uint16_t* values = (uint16_t*)head.values + position * lined(head.width);
    for (long c = 0; c < head.width; c += LANES) {
        const long some = head.width - c < LANES ? head.width - c : LANES;
        to_f16(halves, load_some(key + c, some));
        for (long i = 0; i < some; ++i) keys[(c + i) * LINE] = halves[i];
        to_f16(values + c, load_some(value + c, some));
    }
}

// What was kept, in float32 -------------------------------------------------------------------------------------------

constexpr int STRETCH = 64;                // positions whose scores are known before their values are added up

// Bytes of two columns, or of one.
INLINE F32 low_of(const uint8_t* p) { return floats((widen_u8(p) & 15) - 8); }
INLINE F32 high_of(const uint8_t* p) { return floats((I32)((U32)widen_u8(p) >> 4) - 8); }
INLINE F32 byte_of(const uint8_t* p) { return floats(widen_i8(p)); }

namespace reg {
INLINE void widen_halves(const uint16_t* from, float* to) {
    for (int i = 0; i < LINE; i += LANES) store(to + i, from_f16(from + i));
}
}  // namespace reg

// to [columns][STRETCH], from position `at` on, as many lines as hold `count` positions
static void widen_keys(const Head& head, long at, long count, float* to) {
    const long runs = (head.width + RUN - 1) / RUN;
    for (long p = 0; p < count; p += LINE) {
        const long line = (at + p) / LINE;
        if (head.kept == Kept::f16) {
            const uint16_t* from = (const uint16_t*)head.keys + line * head.width * LINE;
            for (long c = 0; c < head.width; ++c) reg::widen_halves(from + c * LINE, to + c * STRETCH + p);
            continue;
        }
        for (long run = 0; run < runs; ++run) {
            const F32 scale = from_f16(head.key_scales + (line * runs + run) * LINE);
            float* out = to + run * RUN * STRETCH + p;
            if (head.kept == Kept::q8_0) {
                const uint8_t* from = head.keys + (line * runs + run) * RUN * LINE;
                for (int c = 0; c < RUN; ++c) store(out + c * STRETCH, byte_of(from + c * LINE) * scale);
            } else {
                const uint8_t* from = head.keys + (line * runs + run) * RUN / 2 * LINE;
                for (int c = 0; c < RUN / 2; ++c) {
                    store(out + c * STRETCH, low_of(from + c * LINE) * scale);
                    store(out + (c + RUN / 2) * STRETCH, high_of(from + c * LINE) * scale);
                }
            }
        }
    }
}

// to [count][wide]
static void widen_values(const Head& head, long at, long count, long wide, float* to) {
    if (head.kept == Kept::f16) {
        const uint16_t* from = (const uint16_t*)head.values + at * wide;
        for (long i = 0; i < count * wide; i += LANES) reg::widen_halves(from + i, to + i);
        return;
    }
    const long runs = wide / RUN, first = at * runs;
    float scales[STRETCH * WIDEST_HEAD / RUN];
    for (long i = 0; i < lined(count * runs); i += LANES) store(scales + i, from_f16(head.value_scales + first + i));
    for (long i = first; i < first + count * runs; ++i, to += RUN) {
        const F32 scale = spread(scales[i - first]);
        if (head.kept == Kept::q8_0) {
            store(to, byte_of(head.values + i * RUN) * scale);
            store(to + LANES, byte_of(head.values + i * RUN + LANES) * scale);
        } else {
            store(to, low_of(head.values + i * RUN / 2) * scale);
            store(to + LANES, high_of(head.values + i * RUN / 2) * scale);
        }
    }
}

// Sums -----------------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__) || defined(__ARM_FEATURE_DOTPROD)
constexpr int TOGETHER = 4;  // 24 of 32 registers hold sums of 6 rows, 4 what they meet
#else
constexpr int TOGETHER = 2;  // 12 of 16, and 2
#endif
constexpr int ROWS = 6;

namespace reg {

// to[r][v] += sum of a[r][k] * b[k][v] over k = 0 … count - 1, in this order, for R rows and V vectors. FETCH: `step`
// bytes from `next` on are asked for at each k.
template <int R, int V, bool FETCH>
INLINE void tile(const float* a, long a_row, const float* b, long b_row, long count, float* to, long to_row,
                 const uint8_t* next, long step) {
    F32 sums[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = load<F32>(to + r * to_row + v * LANES);
    long k = 0;
    do {
        if (FETCH) {
            for (long i = 0; i < step; i += 64) __builtin_prefetch(next + i);
            next += step;
        }
        F32 with[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) with[v] = load<F32>(b + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
            const F32 factor = spread(a[r * a_row + k]);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[r][v] = fma(factor, with[v], sums[r][v]);
        }
        b += b_row;
    } while (++k < count);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store(to + r * to_row + v * LANES, sums[r][v]);
}

// `wide` is a multiple of LINE
template <int R, bool FETCH>
static void tiles_of(const float* a, long a_row, const float* b, long b_row, long count, float* to, long to_row,
                     long wide, const uint8_t* next, long step) {
    long at = 0;
    for (; at + TOGETHER * LANES <= wide; at += TOGETHER * LANES, step = 0)
        tile<R, TOGETHER, FETCH>(a, a_row, b + at, b_row, count, to + at, to_row, next, step);
    for (; at < wide; at += LANES, step = 0)
        tile<R, 1, FETCH>(a, a_row, b + at, b_row, count, to + at, to_row, next, step);
}

// The same for any number of rows and `wide` columns of b; the first ones fetch `bytes` from `next` on.
static void multiply(int rows, const float* a, long a_row, const float* b, long b_row, long count, float* to,
                     long to_row, long wide, const uint8_t* next, long bytes) {
    using Tiles = void (*)(const float*, long, const float*, long, long, float*, long, long, const uint8_t*, long);
    static constexpr Tiles tiles[ROWS] = {tiles_of<1, true>, tiles_of<2, true>, tiles_of<3, true>, tiles_of<4, true>,
                                          tiles_of<5, true>, tiles_of<6, true>};
    tiles[(rows < ROWS ? rows : ROWS) - 1](a, a_row, b, b_row, count, to, to_row, wide, next, bytes / count);
    int r = ROWS;
    for (; r + ROWS <= rows; r += ROWS)
        tiles_of<ROWS, false>(a + r * a_row, a_row, b, b_row, count, to + r * to_row, to_row, wide, next, 0);
    if (r < rows)
        tiles[rows - r - 1](a + r * a_row, a_row, b, b_row, count, to + r * to_row, to_row, wide, next, 0);
}

}  // namespace reg

// Attention ------------------------------------------------------------------------------------------------------------

constexpr float LEAST = -1e30f;  // below every score
constexpr float LOG2_E = 1.44269504f;
constexpr long MOST_SUMS = WIDEST_HEAD + 2 * LINE;

// Memory of a thread.
struct alignas(64) Scratch {
    float queries[QUERIES * WIDEST_HEAD], weights[QUERIES * STRETCH], wide[STRETCH * WIDEST_HEAD],
        sums[QUERIES * MOST_SUMS], part[QUERIES * MOST_SUMS];
    static Scratch& get() {
        struct Freed {
            Scratch* at = new Scratch;
            ~Freed() { delete at; }
        };
        static thread_local Freed scratch;
        return *scratch.at;
    }
};

// A query's sums: weights by lane, and the largest score so far, lie behind those of its values.
struct Sums {
    float *values, *weights, *most;
    Sums(float* sums, long wide) : values(sums), weights(sums + wide), most(sums + wide + LINE) {}
};

static long wide_of(const Head& head) {
    return head.kept == Kept::f16 ? lined(head.width) : (head.width + RUN - 1) / RUN * RUN;
}

static void clear(float* sums, int count, long wide, long size) {
    for (int r = 0; r < count; ++r) {
        memset(sums + r * size, 0, size * sizeof(float));
        *Sums(sums + r * size, wide).most = LEAST;
    }
}

// Queries, one after the other, turned as what is kept is, so that scores are powers of 2 (those without a cap).
static void copy_queries(const Head& head, const Query* queries, int count, const Scores& how, float* to) {
    const float factor = how.cap > 0 ? how.scale : how.scale * LOG2_E;
    for (int r = 0; r < count; ++r, to += head.width) {
        for (long c = 0; c < head.width; ++c) to[c] = queries[r].x[c] * factor;
        if (head.kept == Kept::q4_0) turn(to, head.width);
    }
}

namespace reg {

// 2^x for x <= 0, and not less than 2^-126. Not a number stays that.
INLINE F32 power(F32 x) {
    x = larger(spread(-126.0f), x);
    const F32 whole = x + MAGIC_VALUE, r = x - (whole - MAGIC_VALUE);
    F32 y = spread(1.5403530e-4f);
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        y = fma(y, r, spread(c));
    return (F32)((I32)y + (((I32)whole - MAGIC) << 23));
}

INLINE float power(float x) {
    float lanes[LANES];
    store(lanes, power(spread(x)));
    return lanes[0];
}

}  // namespace reg

// What a stretch's scores are where there is a cap, and where some positions are not seen.
static void change(const Query& query, long at, float cap, float* scores) {
    const I32 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (long p = 0; p < STRETCH; p += LANES) {
        F32 s = load<F32>(scores + p);
        if (cap > 0) s = (cap - 2 * cap / (exponential(s * (2 / cap)) + 1.0f)) * LOG2_E;
        const I32 position = lanes + (int32_t)(at + p);
        const I32 seen = (position >= (int32_t)query.first) & (position <= (int32_t)query.last);
        store(scores + p, choose(seen, s, spread(LEAST)));
    }
}

namespace reg {

// A row's scores become weights; sums so far are corrected where one is the largest yet.
INLINE void weigh(const Query& query, long at, float cap, float* scores, const Sums& sums, long wide) {
    const bool edge = query.first > at || query.last < at + STRETCH - 1;
    if (edge || cap > 0) change(query, at, cap, scores);
    const F32 before = spread(*sums.most);
    F32 highest = before;
#pragma GCC unroll 16
    for (int i = 0; i < STRETCH; i += LANES) highest = larger(load<F32>(scores + i), highest);
    float now = *sums.most;
    if (any(highest > before)) {
        float lanes[LANES];
        store(lanes, highest);
        for (float s : lanes) now = s > now ? s : now;
        const F32 shrink = spread(power(*sums.most - now));
        for (long c = 0; c < wide + LINE; c += LANES)  // weights lie behind the values
            store(sums.values + c, load<F32>(sums.values + c) * shrink);
        *sums.most = now;
    }
    for (int lane = 0; lane < LINE; lane += LANES) {
        F32 total = load<F32>(sums.weights + lane);
#pragma GCC unroll 4
        for (int i = lane; i < STRETCH; i += LINE) {
            const F32 s = load<F32>(scores + i);
            F32 w = power(s - now);
            if (edge) w = (F32)((I32)w & (s > LEAST));
            store(scores + i, w);
            total = total + w;
        }
        store(sums.weights + lane, total);
    }
}

}  // namespace reg

// What queries (copied: `asked`) add to their sums in positions first … last.
static void add(const Head& head, const Query* queries, const float* asked, int count, float cap, long first, long last,
                float* sums) {
    Scratch& mine = Scratch::get();
    const Planes planes = planes_of(head.kept, head.width);
    const long wide = wide_of(head), size = sums_of(head.width);
    for (long at = first / STRETCH * STRETCH; at <= last; at += STRETCH) {
        const long positions = last + 1 - at < STRETCH ? last + 1 - at : STRETCH, line = at / LINE;
        const long lines = lined(positions) / LINE;
        widen_keys(head, at, positions, mine.wide);
        memset(mine.weights, 0, count * STRETCH * sizeof(float));
        reg::multiply(count, asked, head.width, mine.wide, STRETCH, head.width, mine.weights, STRETCH, lines * LINE,
                 head.values + line * planes.values, lines * planes.values);
        for (int r = 0; r < count; ++r)
            reg::weigh(queries[r], at, cap, mine.weights + r * STRETCH, Sums(sums + r * size, wide), wide);
        widen_values(head, at, positions, wide, mine.wide);
        reg::multiply(count, mine.weights, STRETCH, mine.wide, wide, positions, sums, size, wide,
                 head.keys + (line + lines) * planes.keys, at + STRETCH <= last ? lines * planes.keys : 0);
    }
}

struct Span {
    long first, last;
};

static Span span(const Query* queries, int count) {
    Span s{queries[0].first, queries[0].last};
    for (int r = 1; r < count; ++r) {
        if (queries[r].first < s.first) s.first = queries[r].first;
        if (queries[r].last > s.last) s.last = queries[r].last;
    }
    return s;
}

// Sums over one segment, of queries that were copied.
static void gather_copied(const Head& head, const Query* queries, const float* asked, int count, float cap, Span all,
                          long segment, float* sums) {
    const long first = segment * SEGMENT, last = first + SEGMENT - 1;
    clear(sums, count, wide_of(head), sums_of(head.width));
    add(head, queries, asked, count, cap, all.first > first ? all.first : first, all.last < last ? all.last : last, sums);
}

static void gather(const Head& head, const Query* queries, int count, const Scores& how, long segment, float* sums) {
    float* asked = Scratch::get().queries;
    copy_queries(head, queries, count, how, asked);
    gather_copied(head, queries, asked, count, how.cap, span(queries, count), segment, sums);
}

namespace reg {

// Adds a segment's sums to those of the ones before.
static void join(const Head& head, int count, const float* part, float* sums) {
    const long wide = wide_of(head), size = sums_of(head.width);
    for (int r = 0; r < count; ++r) {
        const Sums to(sums + r * size, wide), from((float*)part + r * size, wide);
        const float now = *from.most > *to.most ? *from.most : *to.most;
        const F32 keep = spread(power(*to.most - now)), take = spread(power(*from.most - now));
        for (long c = 0; c < wide + LINE; c += LANES)
            store(to.values + c, fma(load<F32>(from.values + c), take, load<F32>(to.values + c) * keep));
        *to.most = now;
    }
}

}  // namespace reg

static void write(const Head& head, const Query* queries, int count, const float* sums) {
    const long wide = wide_of(head), size = sums_of(head.width);
    for (int r = 0; r < count; ++r) {
        const Sums s((float*)sums + r * size, wide);
        const float factor = 1 / sum_of(load<F32>(s.weights));
        for (long c = 0; c < head.width; ++c) queries[r].out[c] = s.values[c] * factor;
        if (head.kept == Kept::q4_0) turn(queries[r].out, head.width);
    }
}

static void finish(const Head& head, const Query* queries, int count, long segments, float* sums) {
    const long size = count * sums_of(head.width);
    for (long i = 1; i < segments; ++i) reg::join(head, count, sums + i * size, sums);
    write(head, queries, count, sums);
}

static void attend(const Head& head, const Query* queries, int count, const Scores& how) {
    Scratch& mine = Scratch::get();
    copy_queries(head, queries, count, how, mine.queries);
    const Span all = span(queries, count);
    const long first = all.first / SEGMENT, last = all.last / SEGMENT;
    gather_copied(head, queries, mine.queries, count, how.cap, all, first, mine.sums);
    for (long i = first + 1; i <= last; ++i) {
        gather_copied(head, queries, mine.queries, count, how.cap, all, i, mine.part);
        reg::join(head, count, mine.part, mine.sums);
    }
    write(head, queries, count, mine.sums);
}

extern const Attention attention = {keep, attend, gather, finish};

}  // namespace fewbits::FEWBITS_ISA
