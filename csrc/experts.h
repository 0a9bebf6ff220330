// Which experts of a mixture each token goes to.
#pragma once

#include <vector>

namespace fewbits {

// Rows of tokens are sorted by expert: those of expert e are `first[e]` … `first[e + 1]` - 1.
struct Choice {
    std::vector<long> first;
    std::vector<long> row;      // [tokens, chosen], best first
    std::vector<float> weight;  // [tokens, chosen]: the scores' softmax over those chosen if `normalised`, or over all

    Choice(const float* scores, long tokens, long experts, int chosen, bool normalised);
};

}  // namespace fewbits
