// Super-blocks whose sub-blocks have a small signed integer scale: (d * scale) * level.
//
// Real scales first, then rounded together; for the codes of the real scales the error of other scales is a parabola
// each, so many d are compared at the cost of a few. Neighbours of the scales are then tried on the weights, and d
// fitted to the codes.
#pragma once

#include "encode_pairs.h"

namespace fewbits::FEWBITS_ISA {
namespace {

constexpr int NEAR = 3;  // neighbours at once

struct SubScales {
    V d, gain, scales[MOST_SUBS];
};

template <class How>
class FitScales {
public:
    FitScales(const Units& u, const How& how, const Subs& subs)
        : u_(u), how_(how), subs_(subs), least_(all(subs.least)), most_(all(subs.most)) {}

    SubScales fit(const Starts& starts) const {
        V real[MOST_SUBS], bend[MOST_SUBS], plain[MOST_SUBS];
        for (int j = 0; j < subs_.count; ++j) {
            plain[j] = how_.peak(j) * starts.scale[0];
            const Sums best = first(j, starts);
            real[j] = best.best();
            bend[j] = best.qq;
        }
        SubScales best = round_plain(plain);
        descend(best, round_real(real, bend));
        return best;
    }

private:
    V integer(V s, V by_d) const { return to_integer(min(max(s * by_d, least_), most_)); }

    // The sums of the start that gains most, once its scale is the best for its codes.
    Sums first(int j, const Starts& starts) const {
        Sums best{V{}, all(TINY)}, found[BATCH];
        float levels[BATCH];
        for (int at = 0; at < starts.count; at += BATCH) {
            for (int k = 0; k < BATCH; ++k) levels[k] = 1.0f / starts.scale[std::min(at + k, starts.count - 1)];
            how_.template sums<BATCH>(j, levels, found);
            for (const Sums& f : found) {
                const I good = square(f.qx) * best.qq > square(best.qx) * f.qq;
                best = {choose(good, f.qx, best.qx), choose(good, f.qq, best.qq)};
            }
        }
        return best;
    }

    // The scale of largest magnitude on the lowest level.
    SubScales round_plain(const V* scales) const {
        SubScales found{};
        V widest{};
        for (int j = 0; j < subs_.count; ++j) widest = choose(abs(scales[j]) > abs(widest), scales[j], widest);
        found.d = u_.kept(widest / least_);
        for (int j = 0; j < subs_.count; ++j) {
            found.scales[j] = integer(scales[j], invert(found.d));
            const V s = found.d * found.scales[j], inverse = invert(s);
            Sums sums;
            how_.template sums<1>(j, &inverse, &sums);
            found.gain += sums.gain(s);
        }
        return found;
    }

    // The best of many d, by the parabolas; the largest scale lies on the side of the lowest level.
    SubScales round_real(const V* real, const V* bend) const {
        SubScales found{};
        V widest{}, least = all(INF);
        for (int j = 0; j < subs_.count; ++j) widest = choose(abs(real[j]) > abs(widest), real[j], widest);
        for (int n = 0; n < subs_.step_count; ++n) {
            const V d = widest * (-1.0f / subs_.steps[n]), by_d = invert(d);
            V lost{};
            for (int j = 0; j < subs_.count; ++j) lost += bend[j] * square(integer(real[j], by_d) * d - real[j]);
            found.d = choose(lost < least, d, found.d);
            least = min(lost, least);
        }
        found.d = u_.kept(found.d);
        for (int j = 0; j < subs_.count; ++j) found.scales[j] = integer(real[j], invert(found.d));
        return found;
    }

    void descend(SubScales& best, SubScales now) const {
        for (int left = subs_.descents - 1; left >= 0; --left) {
            V dx{}, dd{};
            now.gain = V{};
            for (int j = 0; j < subs_.count; ++j) {
                const Sums sums = subs_.near_count < NEAR ? nearby<1>(j, now.d, now.scales[j])
                                                          : nearby<NEAR>(j, now.d, now.scales[j]);
                now.gain += sums.gain(now.d * now.scales[j]);
                dx += now.scales[j] * sums.qx;
                dd += square(now.scales[j]) * sums.qq;
            }
            const I good = now.gain > best.gain;
            best.d = choose(good, now.d, best.d);
            best.gain = choose(good, now.gain, best.gain);
            for (int j = 0; j < subs_.count; ++j) best.scales[j] = choose(good, now.scales[j], best.scales[j]);
            now.d = u_.kept(dx / max(dd, all(TINY)));
        }
    }

    // Sums of the best neighbour of a scale, which takes its place.
    template <int K>
    Sums nearby(int j, V d, V& scale) const {
        V most = all(-INF), chosen{};
        Sums best{};
        for (int n = 0; n < subs_.near_count; n += K) {
            V s[K], scales[K], inverse[K];
            Sums found[K];
            for (int k = 0; k < K; ++k) {
                scales[k] = min(max(scale + subs_.near[2 * std::min(n + k, subs_.near_count - 1)], least_), most_);
                s[k] = d * scales[k];
                inverse[k] = invert(s[k]);
            }
            how_.template sums<K>(j, inverse, found);
            for (int k = 0; k < K; ++k) {
                const V gain = found[k].gain(s[k]);
                const I good = gain > most;
                chosen = choose(good, scales[k], chosen);
                best = {choose(good, found[k].qx, best.qx), choose(good, found[k].qq, best.qq)};
                most = max(gain, most);
            }
        }
        scale = chosen;
        return best;
    }

    const Units& u_;
    const How& how_;
    const Subs& subs_;
    const V least_, most_;
};

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
