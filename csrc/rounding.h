// Products with activations in float32, rounded as each weight wants it.
#pragma once

#include <vector>

#include "product.h"

namespace fewbits {

// out = x times weight transposed, plus bias, for several weights of as many columns as x `[rows, columns]` has.
void multiply(const std::vector<Term>& terms, const float* x, long rows, int threads);

}  // namespace fewbits
