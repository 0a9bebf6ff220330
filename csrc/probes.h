// What a machine can do at most: for benchmarks to compare with.
#pragma once

#include <cstdint>

#include "cpu.h"

namespace fewbits {

struct Probes {
    uint64_t (*read)(const uint8_t* from, long bytes);  // touches every byte; bytes a multiple of 1024
    uint64_t (*dots)(long rounds);                      // 16 independent sums; OPERATIONS a round
};

constexpr long OPERATIONS = 16L * 64 * 2;  // multiplications and additions

FEWBITS_TABLE(Probes, probes)

}  // namespace fewbits
