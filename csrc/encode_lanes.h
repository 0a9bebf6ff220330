// Vectors of the width that the instruction set has. A lane is a unit of the weight: nothing here crosses lanes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "encoders.h"

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

constexpr float INF = __builtin_inff();
constexpr float FLOAT16_MAX = 65504.0f;
constexpr float ROUNDING = 12582912.0f;  // 1.5 * 2^23: float32 has no fractions there
constexpr float TINY = 1e-30f;

inline V all(float a) { return a - V{}; }
inline V min(V a, V b) { return a < b ? a : b; }
inline V max(V a, V b) { return a > b ? a : b; }
inline V abs(V a) { return a < V{} ? -a : a; }
inline V square(V a) { return a * a; }
inline V choose(I mask, V a, V b) { return mask ? a : b; }
inline V to_integer(V u) { return (u + ROUNDING) - ROUNDING; }

inline I bits_of(V a) { I b; std::memcpy(&b, &a, sizeof b); return b; }
inline V from_bits(I a) { V b; std::memcpy(&b, &a, sizeof b); return b; }

// 1/s to float32 rounding, and 0 for the zero scale, which decodes everything alike. A division would wait for several
// times as long; the first guess is within an eighth, and each step cubes its error.
inline V invert(V s) {
    V r = from_bits(0x7EF311C7 - bits_of(s));
    V e = 1.0f - s * r;
    r += r * (e + e * e);
    e = 1.0f - s * r;
    r += r * (e + e * e);
    return s == V{} ? V{} : r;
}

inline V drop_bits(V a, int count) {
    I b = bits_of(a);
    return from_bits((b + (((1 << (count - 1)) - 1) + ((b >> count) & 1))) & ~((1 << count) - 1));
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

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
