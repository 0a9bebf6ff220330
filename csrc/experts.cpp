#include "experts.h"

#include <math.h>

namespace fewbits {

Choice::Choice(const float* scores, long tokens, long experts, int chosen, bool normalised)
    : first(experts + 1), row(tokens * chosen), weight(tokens * chosen) {
    std::vector<long> expert(tokens * chosen);
    std::vector<bool> taken(experts);
    for (long i = 0; i < tokens; ++i) {
        const float* score = scores + i * experts;
        long* best = &expert[i * chosen];
        float* part = &weight[i * chosen];
        taken.assign(experts, false);
        float total = 0;
        for (int k = 0; k < chosen; ++k) {
            long found = -1;  // the highest of those left; anyone where they are no numbers
            for (long e = 0; e < experts; ++e)
                if (!taken[e] && (found < 0 || score[e] > score[found])) found = e;
            taken[found] = true;
            best[k] = found;
            part[k] = expf(score[found] - score[best[0]]);
            if (normalised) total += part[k];
        }
        for (long e = 0; !normalised && e < experts; ++e) total += expf(score[e] - score[best[0]]);
        for (int k = 0; k < chosen; ++k) part[k] /= total;
    }
    for (long e : expert) ++first[e + 1];
    for (long e = 0; e < experts; ++e) first[e + 1] += first[e];
    std::vector<long> next(first);
    for (size_t k = 0; k < expert.size(); ++k) row[k] = next[expert[k]]++;
}

}  // namespace fewbits
