// Sums that tell how good a scale is: of codes times values, and of squared codes, for the nearest codes at that scale.
//
// Two ways: in floats, for any levels; and for integers in 16 bits, two columns to a lane and three times as fast.
#pragma once

#include "encode_scale.h"

namespace fewbits::FEWBITS_ISA {
namespace {

constexpr int MOST_SUBS = 16;

// Weighted, of q x and q^2. The error of a scale s is that of zeros less its gain.
struct Sums {
    V qx, qq;

    V gain(V s) const { return s * (2.0f * qx - s * qq); }
    V best() const { return qx * invert(max(qq, all(TINY))); }
};

template <bool WEIGHTED, class Level>
class FloatSums {
public:
    FloatSums(const Units& u, int width, int subs, const Level& level, float) : u_(u), run_(width / subs), level_(level) {
        for (int j = 0; j < subs; ++j) peaks_[j] = extreme(sub(j));
    }

    V peak(int j) const { return peaks_[j]; }

    // At scales that put the largest on these levels; and with `inverse` at any.
    template <int K>
    void sums(int j, const float* levels, Sums* out) const {
        V inverse[K];
        for (int k = 0; k < K; ++k) inverse[k] = levels[k] / peaks_[j];
        sums<K>(j, inverse, out);
    }
    template <int K>
    void sums(int j, const V* inverse, Sums* out) const {
        const Columns<WEIGHTED> p = sub(j);
        for (int k = 0; k < K; ++k) out[k] = {V{}, V{}};
        for (int i = 0; i < run_; ++i) {
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                const V q = level_(p.x[i] * inverse[k]), v = p.weighted(q, i);
                out[k].qx += v * p.x[i];
                out[k].qq += v * q;
            }
        }
    }

private:
    Columns<WEIGHTED> sub(int j) const { return u_.template columns<WEIGHTED>(j * run_, run_); }

    const Units& u_;
    const int run_;
    const Level level_;
    V peaks_[MOST_SUBS];
};

// Values are in parts of the largest of their sub-block, weights likewise: 2^15 - 1 is 1. Codes are products with
// `bits_` bits behind the point, rounded; run * low^2 must be less than 2^16.
template <bool WEIGHTED>
class PairSums {
public:
    PairSums(const Units& u, int width, int subs, const Even& level, float farthest)
        : half_(width / subs / 2), low_(twice(level.low)), high_(twice(level.high)) {
        while (bits_ > 1 && farthest * float(1 << (bits_ + 1)) > ONE) --bits_;  // twice the farthest level still fits
        rounding_ = same(int16_t(1 << (15 - bits_)));
        for (int j = 0; j < subs; ++j) load(u.columns<WEIGHTED>(j * 2 * half_, 2 * half_), j);
    }

    V peak(int j) const { return peaks_[j]; }

    template <int K>
    void sums(int j, const float* levels, Sums* out) const {
        H by[K];
        for (int k = 0; k < K; ++k) by[k] = same(int16_t(std::lrint(levels[k] * float(1 << bits_))));
        sums<K>(j, by, out);
    }
    template <int K>
    void sums(int j, const V* inverse, Sums* out) const {
        const V scale = peaks_[j] * float(1 << bits_);
        H by[K];
        for (int k = 0; k < K; ++k) by[k] = twice(min(max(inverse[k] * scale, all(-ONE)), all(ONE)));
        sums<K>(j, by, out);
    }

private:
    static constexpr float ONE = 32767.0f;

    template <int K>
    void sums(int j, const H* by, Sums* out) const {
        const H* x = x_ + j * half_;
        I qx[K], qq[K];
        for (int k = 0; k < K; ++k) qx[k] = qq[k] = I{};
        for (int i = 0; i < half_; ++i) {
#pragma GCC unroll 8
            for (int k = 0; k < K; ++k) {
                const H q = min(max(multiply(multiply(x[i], by[k]), rounding_), low_), high_);
                qx[k] = dot(qx[k], q, WEIGHTED ? wx_[j * half_ + i] : x[i]);
                qq[k] = WEIGHTED ? dot(qq[k], q * q, w_[j * half_ + i]) : dot(qq[k], q, q);
            }
        }
        const V unit = peaks_[j] * (1.0f / ONE);
        for (int k = 0; k < K; ++k) {
            out[k] = {__builtin_convertvector(qx[k], V) * unit, __builtin_convertvector(qq[k], V)};
            if (WEIGHTED) out[k] = {out[k].qx * tops_[j] * (32768.0f / ONE), out[k].qq * tops_[j] * (1.0f / ONE)};
        }
    }

    void load(const Columns<WEIGHTED>& p, int j) {
        peaks_[j] = extreme(p);
        const V by = choose(abs(peaks_[j]) > all(TINY), ONE / peaks_[j], V{});
        H* x = x_ + j * half_;
        for (int i = 0; i < half_; ++i) x[i] = pair(p.x[2 * i] * by, p.x[2 * i + 1] * by);
        if (!WEIGHTED) return;
        V top{};
        for (int i = 0; i < p.count; ++i) top = max(top, p.weight[i]);
        tops_[j] = top;
        const V scale = ONE / top;
        for (int i = 0; i < half_; ++i) {  // none vanishes
            const H w = max(pair(p.weight[2 * i] * scale, p.weight[2 * i + 1] * scale), same(1));
            w_[j * half_ + i] = w;
            wx_[j * half_ + i] = multiply(x[i], w);
        }
    }

    const int half_;  // of the columns of a sub-block
    const H low_, high_;
    int bits_ = 14;
    H rounding_;
    V peaks_[MOST_SUBS], tops_[MOST_SUBS];
    H x_[MOST_PAIRS], w_[WEIGHTED ? MOST_PAIRS : 1], wx_[WEIGHTED ? MOST_PAIRS : 1];
};

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
