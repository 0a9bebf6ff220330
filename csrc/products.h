// Products of quantized weights, one table a set of instructions.
#pragma once

#include "cpu.h"

namespace fewbits {

struct Products {
    const char* name;
};

FEWBITS_TABLE(Products, products)

}  // namespace fewbits
