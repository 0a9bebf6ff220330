// LANES units of a weight side by side, each divided by its largest magnitude so that no square overflows or vanishes.
#pragma once

#include <algorithm>
#include <cfloat>

#include "encode_lanes.h"

namespace fewbits::FEWBITS_ISA {
namespace {

constexpr float LEAST_WEIGHT = 1e-9f;  // of the largest in the unit: what does not matter still lands near its value

// Columns of a unit or of a sub-block.
template <bool WEIGHTED>
struct Columns {
    static constexpr bool weighs = WEIGHTED;
    const V* x;
    const V* weight;
    int count;

    V weighted(V value, int i) const { return WEIGHTED ? value * weight[i] : value; }
};

class Units {
public:
    explicit Units(const Weights& weights)
        : from_(weights), x_(new V[weights.width]), weight_(weights.importance ? new V[weights.width] : nullptr) {}
    ~Units() {
        delete[] x_;
        delete[] weight_;
    }
    Units(const Units&) = delete;

    // Units from `first` on; past the last one that is repeated.
    void load(ptrdiff_t first) {
        gather(from_.w, first, x_);
        V peak{};
        for (int i = 0; i < from_.width; ++i) peak = max(peak, abs(x_[i]));
        step_ = choose(peak > V{}, max(peak, all(FLT_MIN)), all(1.0f));
        peak_ = choose(peak > V{}, step_, V{});
        const V inverse = 1.0f / step_;
        for (int i = 0; i < from_.width; ++i) x_[i] *= inverse;
        if (!weight_) return;
        gather(from_.importance, first, weight_);
        V most{};
        for (int i = 0; i < from_.width; ++i) most = max(most, weight_[i]);
        const I known = most > V{};  // units without a single positive importance count evenly
        const V share = 1.0f / choose(known, max(most, all(FLT_MIN)), all(1.0f));
        for (int i = 0; i < from_.width; ++i)
            weight_[i] = max(choose(known, weight_[i] * share, all(1.0f)), all(LEAST_WEIGHT));
    }

    template <bool WEIGHTED>
    Columns<WEIGHTED> columns(int first, int count) const {
        return {x_ + first, weight_ + first, count};
    }

    // Scales as the file holds them; and normalised again.
    V stored(V s) const { return FEWBITS_ISA::stored(s * peak_, from_.storage); }
    V kept(V s) const { return stored(s) / step_; }

private:
    void gather(const float* from, ptrdiff_t first, V* to) const {
        const float* at[LANES];
        for (int l = 0; l < LANES; ++l) at[l] = from + std::min(first + l, from_.total - 1) * from_.width;
        int c = 0;
        for (; c + LANES <= from_.width; c += LANES) {
            for (int l = 0; l < LANES; ++l) std::memcpy(to + c + l, at[l] + c, sizeof(V));
            transpose(to + c);
        }
        float* out = reinterpret_cast<float*>(to);
        for (; c < from_.width; ++c)
            for (int l = 0; l < LANES; ++l) out[c * LANES + l] = at[l][c];
    }

    Weights from_;
    V *x_, *weight_;
    V peak_, step_;  // the largest magnitude; the same, but 1 where that is 0
};

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
