// Super-blocks whose sub-blocks have a small signed integer scale: (d * scale) * level.
//
// Real scales first, then rounded together; for the codes of the real scales the error of other scales is a parabola
// each, so many d are compared at the cost of a few. Neighbours of the scales are then tried on the weights, and d
// fitted to the codes.
#pragma once

#include "encode_scale.h"

namespace fewbits::FEWBITS_ISA {
namespace {

constexpr int MOST_SUBS = 16;
constexpr int NEAR = 3;  // neighbours at once

struct SubScales {
    V d, error, scales[MOST_SUBS];
};

template <bool WEIGHTED, class Level>
class FitScales {
public:
    FitScales(const Units& u, int width, const Level& level, const Subs& subs)
        : u_(u), subs_(subs), run_(width / subs.count), level_(level), least_(all(subs.least)), most_(all(subs.most)) {}

    SubScales fit(const Starts& starts) const {
        V real[MOST_SUBS], bend[MOST_SUBS], total[MOST_SUBS], plain[MOST_SUBS];
        for (int j = 0; j < subs_.count; ++j) {
            const auto p = sub(j);
            const V peak = extreme(p);
            total[j] = energy(p);
            plain[j] = peak * starts.scale[0];
            const Real best = first_scale(p, level_, starts, peak, total[j]);
            real[j] = best.s;
            bend[j] = best.squares;
        }
        SubScales best = round_plain(plain, total);
        descend(best, round_real(real, bend), total);
        return best;
    }

private:
    Columns<WEIGHTED> sub(int j) const { return u_.template columns<WEIGHTED>(j * run_, run_); }
    V integer(V s, V by_d) const { return to_integer(min(max(s * by_d, least_), most_)); }

    // The scale of largest magnitude on the lowest level.
    SubScales round_plain(const V* scales, const V* total) const {
        SubScales found{};
        V widest{};
        for (int j = 0; j < subs_.count; ++j) widest = choose(abs(scales[j]) > abs(widest), scales[j], widest);
        found.d = u_.kept(widest / least_);
        for (int j = 0; j < subs_.count; ++j) {
            found.scales[j] = integer(scales[j], invert(found.d));
            const V s = found.d * found.scales[j];
            V error;
            scale_errors<1>(sub(j), &s, level_, total[j], &error);
            found.error += error;
        }
        return found;
    }

    // The best of many d of both signs, by the parabolas.
    SubScales round_real(const V* real, const V* bend) const {
        SubScales found{};
        V widest{}, least = all(INF);
        for (int j = 0; j < subs_.count; ++j) widest = max(widest, abs(real[j]));
        for (int n = 0; n < subs_.step_count; ++n)
            for (float sign : {1.0f, -1.0f}) {
                const V d = u_.kept(widest * (sign / subs_.steps[n])), by_d = invert(d);
                V lost{};
                for (int j = 0; j < subs_.count; ++j) lost += bend[j] * square(integer(real[j], by_d) * d - real[j]);
                found.d = choose(lost < least, d, found.d);
                least = min(lost, least);
            }
        for (int j = 0; j < subs_.count; ++j) found.scales[j] = integer(real[j], invert(found.d));
        return found;
    }

    void descend(SubScales& best, SubScales now, const V* total) const {
        for (int left = subs_.descents - 1; left >= 0; --left) {
            V dx{}, dd{};
            now.error = V{};
            for (int j = 0; j < subs_.count; ++j) {
                const auto p = sub(j);
                now.error += nearby(p, now.d, total[j], now.scales[j]);
                if (!left) continue;
                const V inverse = invert(now.d * now.scales[j]);
                V qx{}, qq{};
                for (int i = 0; i < run_; ++i) {
                    const V q = level_(p.x[i] * inverse), v = p.weighted(q, i);
                    qx += v * p.x[i];
                    qq += v * q;
                }
                dx += now.scales[j] * qx;
                dd += square(now.scales[j]) * qq;
            }
            const I good = now.error < best.error;
            best.d = choose(good, now.d, best.d);
            best.error = choose(good, now.error, best.error);
            for (int j = 0; j < subs_.count; ++j) best.scales[j] = choose(good, now.scales[j], best.scales[j]);
            if (left) now.d = u_.kept(dx / max(dd, all(TINY)));
        }
    }

    // The best neighbour of a scale, and its error.
    V nearby(const Columns<WEIGHTED>& p, V d, V total, V& scale) const {
        V least = all(INF), chosen{};
        for (int n = 0; n < subs_.near_count; n += NEAR) {
            V s[NEAR], scales[NEAR], error[NEAR];
            for (int k = 0; k < NEAR; ++k) {
                scales[k] = min(max(scale + subs_.near[2 * std::min(n + k, subs_.near_count - 1)], least_), most_);
                s[k] = d * scales[k];
            }
            scale_errors<NEAR>(p, s, level_, total, error);
            for (int k = 0; k < NEAR; ++k) {
                chosen = choose(error[k] < least, scales[k], chosen);
                least = min(error[k], least);
            }
        }
        scale = chosen;
        return least;
    }

    const Units& u_;
    const Subs& subs_;
    const int run_;
    const Level level_;
    const V least_, most_;
};

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
