#include "encode_blocks.h"

#include "encode_lanes.h"

namespace fewbits::FEWBITS_ISA {
namespace {

typedef uint16_t Half __attribute__((vector_size(2 * FEWBITS_LANES)));
typedef uint64_t Long __attribute__((vector_size(32)));

inline V wide(const Half& h, Storage type) {
    if (type == Storage::bfloat16) return from_bits(__builtin_convertvector(h, U) << 16);
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
    return (V)_mm256_cvtph_ps((__m128i)h);
#else
    const U bits = __builtin_convertvector(h, U), size = bits & 0x7FFFu;
    V a = from_bits(size << 13) * 0x1p112f;  // exponents of float32 lie 112 higher; denormals come out right
    a = choose(size >= 0x7C00u, from_bits(bits_of(a) | 0x7F800000u), a);
    return from_bits(bits_of(a) | (bits & 0x8000u) << 16);
#endif
}

inline float wide(uint16_t h, Storage type) {
    Half all{};
    all[0] = h;
    return wide(all, type)[0];
}

template <class T>
float one(const T* at, Storage type) {
    if constexpr (sizeof(T) == 4) return *at;
    else return wide(*at, type);
}

template <class T>
void widen(const Source& from, const T* at, int width, float* to) {
    int i = 0;
    if (from.column == 1)
        for (; i + LANES <= width; i += LANES) {
            if constexpr (sizeof(T) == 4) std::memcpy(to + i, at + i, sizeof(V));
            else {
                Half h;
                std::memcpy(&h, at + i, sizeof h);
                const V v = wide(h, from.type);
                std::memcpy(to + i, &v, sizeof v);
            }
        }
    for (; i < width; ++i) to[i] = one(at + i * from.column, from.type);
}

// The next bytes of a term's run, for all blocks. The mask drops what shifts bring in from other bytes.
template <class T>
int move_bits(const Packing& how, const Move& t, const uint8_t* from, ptrdiff_t count, uint8_t* to, int done) {
    T mask;
    std::memset(&mask, t.mask, sizeof mask);
    const int left = t.shift > 0 ? t.shift : 0, right = t.shift < 0 ? -t.shift : 0;
    for (; done + int(sizeof(T)) <= t.run; done += sizeof(T))
        for (ptrdiff_t u = 0; u < count; ++u) {
            T x, y;
            std::memcpy(&x, from + u * how.raw + t.from + done, sizeof x);
            std::memcpy(&y, to + u * how.bytes + t.to + done, sizeof y);
            y ^= ((x << left) >> right) & mask;
            std::memcpy(to + u * how.bytes + t.to + done, &y, sizeof y);
        }
    return done;
}

}  // namespace

void widen(const Source& from, int width, ptrdiff_t first, ptrdiff_t last, float* to) {
    for (ptrdiff_t u = first; u < last; ++u, to += width) {
        const ptrdiff_t at = (u / from.units) * from.row + (u % from.units) * from.unit;
        if (from.type == Storage::float32) widen(from, static_cast<const float*>(from.data) + at, width, to);
        else widen(from, static_cast<const uint16_t*>(from.data) + at, width, to);
    }
}

void join(const Packing& how, const uint8_t* raw, ptrdiff_t count, uint8_t* blocks) {
    for (ptrdiff_t u = 0; u < count; ++u) std::memcpy(blocks + u * how.bytes, how.constant, how.bytes);
    for (int i = 0; i < how.count; ++i) {
        const Move& t = how.terms[i];
        int done = move_bits<Long>(how, t, raw, count, blocks, 0);
        done = move_bits<uint64_t>(how, t, raw, count, blocks, done);
        done = move_bits<uint32_t>(how, t, raw, count, blocks, done);
        move_bits<uint8_t>(how, t, raw, count, blocks, done);
    }
}

}  // namespace fewbits::FEWBITS_ISA
