#include "probes.h"

#include "simd.h"

namespace fewbits::FEWBITS_ISA {

static uint64_t read(const uint8_t* from, long bytes) {
    U8 sums[4] = {};
    for (long i = 0; i < bytes; i += 256) {
        __builtin_prefetch(from + i + 2048);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) sums[k] += load<U8>(from + i + 64 * k);
    }
    const U8 all = sums[0] + sums[1] + sums[2] + sums[3];
    return all[0];
}

namespace reg {

static uint64_t dots(long rounds) {
    const I32 x = spread(0x01020304);
    const U8 w = bytes(3);
    I32 sums[16], all = {};
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) sums[k] = spread((int)rounds + k);  // no two of them may become one
    for (long i = 0; i < rounds * PARTS; ++i)
#pragma GCC unroll 16
        for (int k = 0; k < 16; ++k) sums[k] = dot<false>(sums[k], w, x);
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) all ^= sums[k];
    return (uint64_t)all[0];
}

}  // namespace reg

extern const Probes probes = {read, reg::dots};

}  // namespace fewbits::FEWBITS_ISA
