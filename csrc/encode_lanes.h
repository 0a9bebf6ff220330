// Vectors of the width that the instruction set has. A lane is a unit of the weight: nothing here crosses lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "encoders.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FEWBITS_LANES 16
#elif defined(__AVX2__)
#define FEWBITS_LANES 8
#else
#define FEWBITS_LANES 4
#endif

namespace fewbits::FEWBITS_ISA {
namespace {

constexpr int LANES = FEWBITS_LANES;
typedef float V __attribute__((vector_size(4 * FEWBITS_LANES)));
typedef int32_t I __attribute__((vector_size(4 * FEWBITS_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * FEWBITS_LANES)));
typedef int16_t H __attribute__((vector_size(4 * FEWBITS_LANES)));  // two to a lane

constexpr float INF = __builtin_inff();
constexpr float FLOAT16_MAX = 65504.0f;
constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: float32 has no fractions there
constexpr float TINY = 1e-30f;
constexpr int MOST_PAIRS = 128;  // of 16-bit integers: super-blocks of 256 columns

inline V all(float a) { return a - V{}; }
// where a or b is not a number: b. Compilers make two instructions of `a > b ? a : b` where b is 0
#if defined(__AVX512F__)
inline V min(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
inline V max(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
inline V min(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
inline V max(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline V min(V a, V b) { return a < b ? a : b; }
inline V max(V a, V b) { return a > b ? a : b; }
#endif
inline V abs(V a) { return a < V{} ? -a : a; }
inline V square(V a) { return a * a; }
inline V choose(I mask, V a, V b) { return mask ? a : b; }
inline V to_integer(V u) { return (u + ROUNDING) - ROUNDING; }

// Bytes, a lane each.
#if defined(__AVX512F__)
inline V from_bytes(const uint8_t* at) {
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)));
}
inline void to_bytes(V u, uint8_t* at) {
    _mm_storeu_si128((__m128i*)at, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32((__m512)u)));
}
#else
typedef uint8_t B __attribute__((vector_size(FEWBITS_LANES)));
inline V from_bytes(const uint8_t* at) {
    B bytes;
    std::memcpy(&bytes, at, sizeof bytes);
    return __builtin_convertvector(__builtin_convertvector(bytes, I), V);
}
inline void to_bytes(V u, uint8_t* at) {
    const B bytes = __builtin_convertvector(__builtin_convertvector(u, I), B);
    std::memcpy(at, &bytes, sizeof bytes);
}
#endif

inline I nearest(V u) {
    u += ROUNDING;
    I b;
    std::memcpy(&b, &u, sizeof b);
    return b - 0x4B400000;
}
// Integers of 16 bits: two to a lane, the first in its lower half; the same twice; everywhere the same.
inline H pair(V low, V high) { return (H)((nearest(low) & 0xFFFF) | (nearest(high) << 16)); }
inline H twice(V a) {
    const I b = nearest(a);
    return (H)((b & 0xFFFF) | (b << 16));
}
inline H same(int16_t a) { return a - H{}; }

// The product over 2^15, rounded; and acc plus the sums of both products of a lane.
#if defined(__AVX512F__)
inline H min(H a, H b) { return (H)_mm512_min_epi16((__m512i)a, (__m512i)b); }
inline H max(H a, H b) { return (H)_mm512_max_epi16((__m512i)a, (__m512i)b); }
inline H multiply(H a, H b) { return (H)_mm512_mulhrs_epi16((__m512i)a, (__m512i)b); }
inline I dot(I acc, H a, H b) { return (I)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b); }
#elif defined(__AVX2__)
inline H min(H a, H b) { return (H)_mm256_min_epi16((__m256i)a, (__m256i)b); }
inline H max(H a, H b) { return (H)_mm256_max_epi16((__m256i)a, (__m256i)b); }
inline H multiply(H a, H b) { return (H)_mm256_mulhrs_epi16((__m256i)a, (__m256i)b); }
inline I dot(I acc, H a, H b) { return acc + (I)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
#else
inline H min(H a, H b) { return a < b ? a : b; }
inline H max(H a, H b) { return a > b ? a : b; }
inline H multiply(H a, H b) {
    for (int i = 0; i < 2 * LANES; ++i) a[i] = int16_t((a[i] * b[i] + 0x4000) >> 15);
    return a;
}
inline I dot(I acc, H a, H b) {
    for (int i = 0; i < LANES; ++i) acc[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return acc;
}
#endif

inline U bits_of(V a) { U b; std::memcpy(&b, &a, sizeof b); return b; }
inline V from_bits(U a) { V b; std::memcpy(&b, &a, sizeof b); return b; }

// 1/s to float32 rounding, and 0 for the zero scale, which decodes everything alike. A division would wait for several
// times as long; the first guess is within an eighth, and each step cubes its error.
inline V invert(V s) {
#if defined(__AVX512F__)
    const __mmask16 some = _mm512_cmp_ps_mask((__m512)abs(s), (__m512)all(1e-36f), _CMP_GT_OQ);
    const V guess = (V)_mm512_maskz_rcp14_ps(some, (__m512)s);
    return guess + guess * (1.0f - s * guess);
#else
    V r = from_bits(0x7EF311C7u - bits_of(s));
    V e = 1.0f - s * r;
    r += r * (e + e * e);
    e = 1.0f - s * r;
    r += r * (e + e * e);
    return s == V{} ? V{} : r;
#endif
}

inline V drop_bits(V a, int count) {
    const U b = bits_of(a);
    return from_bits((b + (((1u << (count - 1)) - 1) + ((b >> count) & 1u))) & ~((1u << count) - 1));
}

// Elements of a and b in turn, from `first` on.
template <int first, int... i>
V interleave(V a, V b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * LANES)...);
#else
    return __builtin_shuffle(a, b, I{(first + i / 2 + i % 2 * LANES)...});
#endif
}

// As the file holds it; beyond float16, its largest finite value.
inline V stored(V s, Storage type) {
    if (type == Storage::float32) return s;
    if (type == Storage::bfloat16) return drop_bits(s, 16);
    s = max(min(s, all(FLOAT16_MAX)), all(-FLOAT16_MAX));
    V size = abs(s);
    V small = (size + 0.75f) - 0.75f;  // denormals of float16 are multiples of 2^-24, the last place of 0.75
    V rounded = choose(size < all(0x1p-14f), small, drop_bits(size, 13));
    return s < V{} ? -rounded : rounded;
}

// Rows to columns of LANES vectors, halves by halves.
inline void transpose(V* rows) {
    V old[LANES];
    for (int step = 1; step < LANES; step *= 2) {
        for (int i = 0; i < LANES; ++i) old[i] = rows[i];
        for (int i = 0; i < LANES / 2; ++i) {
            rows[2 * i] = interleave<0>(old[i], old[i + LANES / 2], std::make_integer_sequence<int, LANES>());
            rows[2 * i + 1] = interleave<LANES / 2>(old[i], old[i + LANES / 2], std::make_integer_sequence<int, LANES>());
        }
    }
}

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
