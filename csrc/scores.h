// What is measured of logits, a row at a time: their sum of exponentials, and how far one distribution is from another.
#pragma once

#include "cpu.h"

namespace fewbits {

struct Scores {
    // ln of the sum of e^x, and where x is largest (the first of them)
    double (*log_sum)(const float* x, long width, long* top);
    // sum of p (ln p - ln q) over distributions given by their logits and log-sums, in nats
    double (*divergence)(const float* p, double p_log_sum, const float* q, double q_log_sum, long width);
};

FEWBITS_TABLE(Scores, scores)

}  // namespace fewbits
