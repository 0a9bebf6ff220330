// Whole products on many threads.
#pragma once

#include <memory>
#include <vector>

#include "cpu.h"
#include "weight.h"

namespace fewbits {

// Activations that were rounded to bytes, for the set of kernels that was in use then.
class Rounded {
public:
    Rounded(const float* x, long rows, long columns, int threads);
    const Activations& get() const { return acts_; }
    Set set() const { return set_; }

private:
    Set set_;
    Activations acts_;
    std::unique_ptr<char, void (*)(void*)> memory_;
};

struct Term {
    const Weight* weight;
    float* out;          // [rows of the activations, rows of the weight]
    const float* bias;   // [rows of the weight], or null
};

// out = activations times weight transposed, plus bias, for several weights that read the same activations.
void product(const std::vector<Term>& terms, const Rounded& x, int threads);

// Rows of activations `first` … first + count - 1, and the weight that they meet.
struct Share {
    const Weight* weight;
    long first, count;
};

// out[i] = x[i] times the transposed weight of row i, for weights of one shape: experts of a layer.
void grouped(const std::vector<Share>& shares, const float* x, float* out, int threads);

// Values of the rows `ids`: out [count, columns].
void rows(const Weight& weight, const int64_t* ids, long count, float* out, int threads);
// Values of the columns `ids`: out [count, rows].
void columns(const Weight& weight, const int64_t* ids, long count, float* out, int threads);
// Values of `tiles` tiles from `first` on, columns in the place of rows: out [columns, tiles * 16].
void turned(const Weight& weight, long first, long tiles, float* out, int threads);

}  // namespace fewbits
