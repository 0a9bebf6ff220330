#include "scores.h"

#include "lanes.h"

namespace fewbits::FEWBITS_ISA {

constexpr long RUN = 64 * LANES;  // values whose sum is float32

// Sum of one(first column, how many) in double; `one` gets LANES columns, the last time fewer.
template <class One>
INLINE double sum_over(long width, One one) {
    double sum = 0;
    for (long at = 0; at < width; at += RUN) {
        const long end = at + RUN < width ? at + RUN : width;
        F32 part = {};
        long i = at;
        for (; i + LANES <= end; i += LANES) part = part + one(i, LANES);
        if (i < end) {
            float lanes[LANES];
            store(lanes, one(i, end - i));
            part = part + load_some(lanes, end - i);
        }
        sum += sum_of(part);
    }
    return sum;
}

INLINE F32 row(const float* x, long i, long count) { return count == LANES ? load<F32>(x + i) : load_some(x + i, count); }

static double log_sum(const float* x, long width, long* top) {
    float most = x[0];
    F32 large = spread(x[0]);
    long i = 0;
    for (; i + LANES <= width; i += LANES) large = larger(large, load<F32>(x + i));
    most = largest_of(large);
    for (; i < width; ++i) most = x[i] > most ? x[i] : most;
    for (*top = 0; *top < width - 1 && x[*top] != most;) ++*top;
    const F32 less = spread(most);
    return most + log(sum_over(width, [&](long at, long count) { return exponential(row(x, at, count) - less); }));
}

static double divergence(const float* p, double p_log_sum, const float* q, double q_log_sum, long width) {
    // logits differ by less than they measure: their difference is taken before anything is lost to rounding
    const F32 less = spread((float)p_log_sum), shift = spread((float)(q_log_sum - p_log_sum));
    return exp((float)p_log_sum - p_log_sum) * sum_over(width, [&](long at, long count) {
        const F32 a = row(p, at, count);
        return exponential(a - less) * (a - row(q, at, count) + shift);
    });
}

extern const Scores scores = {log_sum, divergence};

}  // namespace fewbits::FEWBITS_ISA
