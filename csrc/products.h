// Products of quantized weights with activations, one table a set of instructions.
#pragma once

#include "cpu.h"
#include "weight.h"

namespace fewbits {

struct Products {
    bool (*knows)(const Weight&);  // whether there is a kernel for its codes and scales
    // The narrowest panels for `rows` rows of activations.
    int (*width)(long rows);
    // Rounds rows `panel * width` … of x [rows, columns] to bytes, blocks `first` … `last`.
    void (*quantize)(const float* x, const Activations& to, long panel, long first, long last);
    void (*correct)(const Weight&, const Activations&, const Corrections& to, long panel, long first, long last);
    // How many tiles belong together, and of how many panels at most, in a call of `multiply`.
    int tiles;
    long panels;
    // out[row of x, row of the weight] = their product + bias, for some tiles and panels; out has `stride` columns.
    void (*multiply)(const Weight&, const Activations&, const Corrections&, long tile, long first_panel,
                     long last_panel, float* out, long stride, const float* bias);
};

FEWBITS_TABLE(Products, products)

}  // namespace fewbits
