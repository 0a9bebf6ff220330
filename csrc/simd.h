// 64-byte vectors in every set of instructions: plain operators where the compiler knows how, functions for the rest.
// Included by kernels only: everything here is local to the namespace of one set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

namespace fewbits::FEWBITS_ISA {

typedef uint8_t U8 __attribute__((vector_size(64)));
typedef uint16_t U16 __attribute__((vector_size(64)));
typedef int32_t I32 __attribute__((vector_size(64)));
typedef uint32_t U32 __attribute__((vector_size(64)));
typedef float F32 __attribute__((vector_size(64)));

typedef int8_t I8x16 __attribute__((vector_size(16)));

constexpr int LANES = 16;  // of 4 bytes

#define INLINE static inline __attribute__((always_inline))

template <class V>
INLINE V load(const void* from) {
    V v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
INLINE void store(void* to, V v) {
    __builtin_memcpy(to, &v, sizeof v);
}

#if defined(__AVX512F__)  // ------------------------------------------------------------------------------------------

INLINE I32 spread(int32_t x) { return (I32)_mm512_set1_epi32(x); }
INLINE F32 spread(float x) { return (F32)_mm512_set1_ps(x); }
INLINE U8 bytes(uint8_t x) { return (U8)_mm512_set1_epi8((char)x); }
INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE F32 larger(F32 a, F32 b) { return (F32)_mm512_max_ps((__m512)a, (__m512)b); }  // b where one is not a number
INLINE bool any(I32 mask) { return _mm512_movepi32_mask((__m512i)mask); }

// acc[i] + sum of four products of unsigned w and signed x
template <bool>
INLINE I32 dot(I32 acc, U8 w, I32 x) {
    return (I32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
}

// the same with one word of x for all; compilers load and spread it in an instruction of its own
template <bool>
INLINE I32 dot_word(I32 acc, U8 w, const int32_t* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*x));
    return acc;
}

INLINE U8 lookup(U8 table, U8 index) { return (U8)_mm512_shuffle_epi8((__m512i)table, (__m512i)index); }

// a | (b & mask)
INLINE U8 merge(U8 a, U8 b, U8 mask) {
    return (U8)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)mask, 0xF8);
}

INLINE F32 from_f16(const void* p) { return (F32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
INLINE I32 widen16(const void* p) { return (I32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
INLINE I32 widen_u8(const void* p) { return (I32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE I32 widen_i8(const void* p) { return (I32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE F32 floats(I32 x) { return (F32)_mm512_cvtepi32_ps((__m512i)x); }

#elif defined(__AVX2__)  // -------------------------------------------------------------------------------------------

struct Halves {
    __m256i low, high;
};

template <class V>
INLINE Halves halves(V v) {
    Halves h;
    __builtin_memcpy(&h, &v, sizeof h);
    return h;
}

template <class V>
INLINE V whole(__m256i low, __m256i high) {
    const Halves h{low, high};
    V v;
    __builtin_memcpy(&v, &h, sizeof v);
    return v;
}

INLINE I32 spread(int32_t x) { return whole<I32>(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE F32 spread(float x) {
    const __m256i v = _mm256_castps_si256(_mm256_set1_ps(x));
    return whole<F32>(v, v);
}

INLINE F32 fma(F32 a, F32 b, F32 c) {
    const Halves x = halves(a), y = halves(b), z = halves(c);
    auto one = [](__m256i p, __m256i q, __m256i r) {
        return _mm256_castps_si256(
            _mm256_fmadd_ps(_mm256_castsi256_ps(p), _mm256_castsi256_ps(q), _mm256_castsi256_ps(r)));
    };
    return whole<F32>(one(x.low, y.low, z.low), one(x.high, y.high, z.high));
}

INLINE __m256i dot_eight(__m256i acc, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(w, x);  // does not saturate for w < 128, nor for w = 128
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#define TWICE(convert, Part, step, p) \
    whole<I32>(convert(_mm_loadu_si128((const Part*)(p))), convert(_mm_loadu_si128((const Part*)((p) + (step)))))
INLINE I32 widen16(const void* p) { return TWICE(_mm256_cvtepu16_epi32, __m128i, 16, (const char*)p); }
#undef TWICE
#define TWICE(convert, p) \
    whole<I32>(convert(_mm_loadl_epi64((const __m128i*)(p))), convert(_mm_loadl_epi64((const __m128i*)((p) + 8))))
INLINE I32 widen_u8(const void* p) { return TWICE(_mm256_cvtepu8_epi32, (const char*)p); }
INLINE I32 widen_i8(const void* p) { return TWICE(_mm256_cvtepi8_epi32, (const char*)p); }
#undef TWICE
INLINE F32 from_f16(const void* p) {
    const __m128i* q = (const __m128i*)p;
    return whole<F32>(_mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128(q))),
                      _mm256_castps_si256(_mm256_cvtph_ps(_mm_loadu_si128(q + 1))));
}
INLINE F32 floats(I32 x) {
    const Halves h = halves(x);
    return whole<F32>(_mm256_castps_si256(_mm256_cvtepi32_ps(h.low)),
                      _mm256_castps_si256(_mm256_cvtepi32_ps(h.high)));
}

#elif defined(__ARM_FEATURE_DOTPROD)  // -------------------------------------------------------------------------------

// A vector as four registers: `each` applies a function to those of several vectors.
template <class Part>
struct Quarters {
    Part at[4];
};

template <class Part, class V>
INLINE Quarters<Part> quarters(V v) {
    Quarters<Part> parts;
    __builtin_memcpy(&parts, &v, sizeof parts);
    return parts;
}

template <class V, class One>
INLINE V each(One one) {
    const decltype(one(0)) parts[4] = {one(0), one(1), one(2), one(3)};
    V v;
    __builtin_memcpy(&v, parts, sizeof v);
    return v;
}

INLINE I32 spread(int32_t x) { return I32{} + x; }
INLINE F32 spread(float x) {
    return each<F32>([=](int) { return vdupq_n_f32(x); });
}

INLINE F32 fma(F32 a, F32 b, F32 c) {
    const auto x = quarters<float32x4_t>(a), y = quarters<float32x4_t>(b), z = quarters<float32x4_t>(c);
    return each<F32>([&](int i) { return vfmaq_f32(z.at[i], x.at[i], y.at[i]); });
}

INLINE I32 widen16(const void* p) {
    return each<I32>([=](int i) { return vmovl_u16(vreinterpret_u16_u8(vld1_u8((const uint8_t*)p + 8 * i))); });
}
INLINE I32 widen_u8(const void* p) {
    const uint8x16_t v = vld1q_u8((const uint8_t*)p);
    const uint16x8_t halves[2] = {vmovl_u8(vget_low_u8(v)), vmovl_u8(vget_high_u8(v))};
    return each<I32>([&](int i) {
        return vmovl_u16(i % 2 ? vget_high_u16(halves[i / 2]) : vget_low_u16(halves[i / 2]));
    });
}
INLINE I32 widen_i8(const void* p) {
    const int8x16_t v = vld1q_s8((const int8_t*)p);
    const int16x8_t halves[2] = {vmovl_s8(vget_low_s8(v)), vmovl_s8(vget_high_s8(v))};
    return each<I32>([&](int i) {
        return vmovl_s16(i % 2 ? vget_high_s16(halves[i / 2]) : vget_low_s16(halves[i / 2]));
    });
}
INLINE F32 floats(I32 x) {
    const auto parts = quarters<int32x4_t>(x);
    return each<F32>([&](int i) { return vcvtq_f32_s32(parts.at[i]); });
}
INLINE F32 from_f16(const void* p) {
    return each<F32>([=](int i) {
        return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t*)p + 8 * i)));
    });
}

#else  // plain C++ ---------------------------------------------------------------------------------------------------

INLINE I32 spread(int32_t x) { return I32{} + x; }
INLINE U8 bytes(uint8_t x) { return U8{} + x; }
INLINE F32 spread(float x) { return F32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }

template <bool>
INLINE I32 dot(I32 acc, U8 w, I32 x) {
    uint8_t a[64];
    int8_t b[64];
    int32_t c[LANES];
    store(a, w), store(b, x), store(c, acc);
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < 4; ++j) c[i] += a[4 * i + j] * b[4 * i + j];
    return load<I32>(c);
}

INLINE U8 lookup(U8 table, U8 index) {
    uint8_t t[64], i[64];
    store(t, table), store(i, index);
    for (auto& one : i) one = t[one & 15];
    return load<U8>(i);
}

INLINE U8 merge(U8 a, U8 b, U8 mask) { return a | (b & mask); }

template <class T>
INLINE I32 widen(const void* p) {
    T from[LANES];
    int32_t to[LANES];
    memcpy(from, p, sizeof from);
    for (int i = 0; i < LANES; ++i) to[i] = from[i];
    return load<I32>(to);
}
INLINE I32 widen16(const void* p) { return widen<uint16_t>(p); }
INLINE I32 widen_u8(const void* p) { return widen<uint8_t>(p); }
INLINE I32 widen_i8(const void* p) { return widen<int8_t>(p); }
INLINE F32 floats(I32 x) { return __builtin_convertvector(x, F32); }

INLINE F32 from_f16(const void* p) {
    const U32 h = (U32)widen16(p), sign = (h & 0x8000) << 16, rest = h & 0x7fff;
    // exponent and mantissa in place; the product with 2^112 mends the bias, for denormals too
    const F32 x = (F32)(rest << 13) * 0x1p112f;
    const U32 special = (U32)(rest >= 0x7c00) & 0x7f800000;  // infinity, or not a number
    return (F32)((U32)x | special | sign);
}

#endif  // ------------------------------------------------------------------------------------------------------------

#if !defined(__AVX512F__)
INLINE F32 larger(F32 a, F32 b) {
    const I32 mask = a > b;
    return (F32)(((I32)a & mask) | ((I32)b & ~mask));
}
INLINE bool any(I32 mask) {
    uint64_t parts[8];
    store(parts, mask);
    return parts[0] | parts[1] | parts[2] | parts[3] | parts[4] | parts[5] | parts[6] | parts[7];
}
#endif

// Vectors of one register each, PARTS of which make 64 bytes, under the same names in a namespace of their own: loops that
// hold many of them are written there, as compilers keep wider vectors in memory.
namespace reg {

#if defined(__AVX2__) && !defined(__AVX512F__)

typedef uint8_t U8 __attribute__((vector_size(32)));
typedef uint16_t U16 __attribute__((vector_size(32)));
typedef int32_t I32 __attribute__((vector_size(32)));
typedef float F32 __attribute__((vector_size(32)));

INLINE I32 spread(int32_t x) { return (I32)_mm256_set1_epi32(x); }
INLINE F32 spread(float x) { return (F32)_mm256_set1_ps(x); }
INLINE U8 bytes(uint8_t x) { return (U8)_mm256_set1_epi8((char)x); }
INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE F32 larger(F32 a, F32 b) { return (F32)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE bool any(I32 mask) { return _mm256_movemask_epi8((__m256i)mask); }

INLINE __m256i dot_eight(__m256i acc, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(w, x);  // does not saturate for w < 128, nor for w = 128
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// acc[i] + sum of four products of unsigned w and signed x; WIDE: w may be 128 or more
template <bool WIDE>
INLINE I32 dot(I32 acc, U8 w, I32 x) {
    if (!WIDE) return (I32)dot_eight((__m256i)acc, (__m256i)w, (__m256i)x);
    const __m256i top = _mm256_set1_epi8((char)128);
    return (I32)dot_eight(dot_eight((__m256i)acc, _mm256_andnot_si256(top, (__m256i)w), (__m256i)x),
                         _mm256_and_si256(top, (__m256i)w), (__m256i)x);
}

INLINE U8 lookup(U8 table, U8 index) { return (U8)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }
INLINE U8 merge(U8 a, U8 b, U8 mask) { return a | (b & mask); }
INLINE I32 widen16(const void* p) { return (I32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE I32 widen_u8(const void* p) { return (I32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE I32 widen_i8(const void* p) { return (I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE F32 from_f16(const void* p) { return (F32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE F32 floats(I32 x) { return (F32)_mm256_cvtepi32_ps((__m256i)x); }

#elif defined(__ARM_FEATURE_DOTPROD)

typedef uint8_t U8 __attribute__((vector_size(16)));
typedef uint16_t U16 __attribute__((vector_size(16)));
typedef int32_t I32 __attribute__((vector_size(16)));
typedef float F32 __attribute__((vector_size(16)));

INLINE I32 spread(int32_t x) { return (I32)vdupq_n_s32(x); }
INLINE F32 spread(float x) { return (F32)vdupq_n_f32(x); }
INLINE U8 bytes(uint8_t x) { return (U8)vdupq_n_u8(x); }
INLINE F32 fma(F32 a, F32 b, F32 c) { return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
INLINE F32 larger(F32 a, F32 b) { return (F32)vbslq_f32((uint32x4_t)(a > b), (float32x4_t)a, (float32x4_t)b); }
INLINE bool any(I32 mask) { return vmaxvq_u32((uint32x4_t)mask); }

// acc[i] + sum of four products of unsigned w and signed x; WIDE: w may be 128 or more. The instruction takes signed
// bytes only: w - 128, and twice 64 for what that lacks.
template <bool WIDE>
INLINE I32 dot(I32 acc, U8 w, I32 x) {
    const int8x16_t half = vdupq_n_s8(64), b = (int8x16_t)x;
    const int32x4_t sum = vdotq_s32((int32x4_t)acc, (int8x16_t)(WIDE ? w ^ bytes(128) : w), b);
    return (I32)(WIDE ? vdotq_s32(vdotq_s32(sum, half, b), half, b) : sum);
}

INLINE U8 lookup(U8 table, U8 index) { return (U8)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index); }
INLINE U8 merge(U8 a, U8 b, U8 mask) { return a | (b & mask); }
INLINE I32 widen16(const void* p) { return (I32)vmovl_u16(vld1_u16((const uint16_t*)p)); }
INLINE uint8x8_t four(const void* p) {
    uint32_t bits;
    memcpy(&bits, p, sizeof bits);
    return vreinterpret_u8_u32(vdup_n_u32(bits));
}
INLINE I32 widen_u8(const void* p) { return (I32)vmovl_u16(vget_low_u16(vmovl_u8(four(p)))); }
INLINE I32 widen_i8(const void* p) {
    return (I32)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u8(four(p)))));
}
INLINE F32 from_f16(const void* p) { return (F32)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t*)p))); }
INLINE F32 floats(I32 x) { return (F32)vcvtq_f32_s32((int32x4_t)x); }

#else

using FEWBITS_ISA::U8, FEWBITS_ISA::U16, FEWBITS_ISA::I32, FEWBITS_ISA::F32;

#endif

constexpr int LANES = sizeof(F32) / sizeof(float), PARTS = 64 / sizeof(F32);

// A sum of products, four bytes of unsigned w times signed x a lane. RUN says how small w is: so many products fit into 16
// bits, after as many it is to be settled; 1: w may be 128 or more; 0: it may, and BASE is taken from it.
template <int RUN>
struct Sum {
    static constexpr int BASE = 0;
    I32 all;

    INLINE Sum from(I32 start) { return {start}; }
    __attribute__((always_inline)) void add(U8 w, I32 x) { all = dot<(RUN < 2)>(all, w, x); }
    __attribute__((always_inline)) void add(U8 w, const int32_t* x) {
#if defined(__AVX512F__)
        all = dot_word<(RUN < 2)>(all, w, x);
#else
        add(w, spread(*x));
#endif
    }
    __attribute__((always_inline)) void settle() {}
};

#if defined(__AVX2__) && !defined(__AVX512F__)
template <>
struct Sum<0> {
    static constexpr int BASE = 128;
    I32 all;

    INLINE Sum from(I32 start) { return {start}; }
    __attribute__((always_inline)) void add(U8 w, I32 x) {  // the size of w - 128, and its sign on x
        const __m256i level = (__m256i)(w ^ bytes(128)), signed_x = _mm256_sign_epi8((__m256i)x, level);
        all = (I32)dot_eight((__m256i)all, _mm256_abs_epi8(level), signed_x);
    }
    __attribute__((always_inline)) void add(U8 w, const int32_t* x) { add(w, spread(*x)); }
    __attribute__((always_inline)) void settle() {}
};

template <int RUN>
struct Pairs {
    static constexpr int BASE = 0;
    I32 all;
    __m256i pairs;

    INLINE Pairs from(I32 start) { return {start, _mm256_setzero_si256()}; }
    __attribute__((always_inline)) void add(U8 w, I32 x) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
    }
    __attribute__((always_inline)) void add(U8 w, const int32_t* x) { add(w, spread(*x)); }
    __attribute__((always_inline)) void settle() {
        all = (I32)_mm256_add_epi32((__m256i)all, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        pairs = _mm256_setzero_si256();
    }
};
template <> struct Sum<2> : Pairs<2> { INLINE Sum from(I32 start) { return {Pairs<2>::from(start)}; } };
template <> struct Sum<4> : Pairs<4> { INLINE Sum from(I32 start) { return {Pairs<4>::from(start)}; } };
template <> struct Sum<8> : Pairs<8> { INLINE Sum from(I32 start) { return {Pairs<8>::from(start)}; } };
#endif

}  // namespace reg

// table[index], indices 0 … 15
INLINE F32 pick(F32 table, I32 index) {
#if defined(__AVX512F__)
    return (F32)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    float from[LANES], to[LANES];
    int32_t at[LANES];
    store(from, table), store(at, index);
    for (int i = 0; i < LANES; ++i) to[i] = from[at[i]];
    return load<F32>(to);
#endif
}

INLINE F32 from_bf16(const void* p) { return (F32)(widen16(p) << 16); }
namespace reg {
INLINE F32 from_bf16(const void* p) { return (F32)(widen16(p) << 16); }
}

// The integers that `dot` gathers start at MAGIC: read as floats they are then 1.5 * 2^23 + sum, without a conversion.
constexpr int32_t MAGIC = 0x4B400000;
constexpr float MAGIC_VALUE = 12582912.0f;

namespace reg {

// scale times the sum in `acc`; `shift` is scale * -MAGIC_VALUE, exact as scales have 12 bits
INLINE F32 scaled(I32 acc, F32 scale, F32 shift) {
#if defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
    return fma((F32)acc, scale, shift);
#else
    (void)shift;
    return floats(acc - MAGIC) * scale;
#endif
}

}  // namespace reg
}  // namespace fewbits::FEWBITS_ISA
