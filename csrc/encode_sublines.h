// Super-blocks whose sub-blocks have a small integer scale and minimum: (d * scale) * q - dmin * minimum.
//
// d and dmin may be negative, both at once: then it is the upper ends of the sub-blocks that have few places to lie.
#pragma once

#include "encode_line.h"
#include "encode_subscales.h"

namespace fewbits::FEWBITS_ISA {
namespace {

constexpr int MOST_MINIMA = 4;

struct SubLines {
    V d, dmin, error;
    V scales[MOST_SUBS], mins[MOST_SUBS];

    void take(const SubLines& other, int subs) {
        const I good = other.error < error;
        d = choose(good, other.d, d);
        dmin = choose(good, other.dmin, dmin);
        error = choose(good, other.error, error);
        for (int j = 0; j < subs; ++j) {
            scales[j] = choose(good, other.scales[j], scales[j]);
            mins[j] = choose(good, other.mins[j], mins[j]);
        }
    }
};

// A sub-block whose codes stay as they are, on the line s * q - low. With the best scale for each low its error is
// floor + low * (low * bend + slant).
struct Valley {
    Moments m;
    V s, low, by_qq, bend, slant, floor;

    Valley() = default;
    Valley(const Moments& of, V scale, V lower) : m(of), s(scale), low(lower) {
        by_qq = invert(max(m.qq, all(TINY)));
        const V best = m.qx * by_qq;
        bend = m.w - m.q * m.q * by_qq;
        slant = 2.0f * (m.x - m.q * best);
        floor = m.xx - best * m.qx;
    }
};

// Of -x with codes `top` - q.
inline Moments flipped(const Moments& m, V top) {
    const V q = top * m.w - m.q;
    return {m.w, -m.x, m.xx, q, top * (q - m.q) + m.qq, m.qx - top * m.x};
}

// A minimum, the best real scale for it, and the error with that.
struct Choice {
    V minimum, free, floor;

    V scale(V by_d, V most) const { return to_integer(min(max(free * by_d, V{}), most)); }
    V error(V d, V by_d, V most, V qq) const { return floor + qq * square(scale(by_d, most) * d - free); }
};

template <bool WEIGHTED>
class FitLines {
public:
    FitLines(const Units& u, int width, float top, const Subs& subs)
        : u_(u), subs_(subs), run_(width / subs.count), top_(all(top)), most_(all(subs.most)) {}

    SubLines fit(const Starts& starts) const {
        SubLines best = plain();
        descend(best, start(starts));
        return best;
    }

private:
    Columns<WEIGHTED> sub(int j) const { return u_.template columns<WEIGHTED>(j * run_, run_); }

    // Each sub-block's line from its smallest (at most 0) to its largest value.
    SubLines plain() const {
        SubLines f{};
        V widest{}, lowest{};
        for (int j = 0; j < subs_.count; ++j) {
            const Range r = range_of(sub(j), true);
            f.scales[j] = (r.high - r.low) / top_;
            f.mins[j] = -r.low;
            widest = max(widest, f.scales[j]);
            lowest = max(lowest, f.mins[j]);
        }
        f.d = u_.kept(widest / most_);
        f.dmin = u_.kept(lowest / most_);
        const V by_d = invert(f.d), by_min = invert(f.dmin);
        for (int j = 0; j < subs_.count; ++j) {
            f.scales[j] = to_integer(min(f.scales[j] * by_d, most_));
            f.mins[j] = to_integer(min(f.mins[j] * by_min, most_));
            Line line{f.d * f.scales[j], -(f.dmin * f.mins[j]), V{}};
            line_errors<1>(sub(j), &line, top_);
            f.error += line.error;
        }
        return f;
    }

    // The best of many d and dmin of both signs, with the codes of the best real lines.
    SubLines start(const Starts& starts) const {
        Valley up[MOST_SUBS]{}, down[MOST_SUBS]{};
        for (int j = 0; j < subs_.count; ++j) {
            const auto p = sub(j);
            const Moments fixed = fixed_moments(p);
            Line line = search_line(p, fixed, top_, true, starts);
            const Moments m = lowest_first(p, fixed, line);
            line = least_squares(m, true);
            up[j] = Valley(m, line.s, -line.offset);
            down[j] = Valley(flipped(m, top_), line.s, max(line.offset + top_ * line.s, V{}));
        }
        SubLines best = round_lines(up, 1.0f);
        best.take(round_lines(down, -1.0f), subs_.count);
        return best;
    }

    // With the nearest codes, shifted so that the lowest in use is 0, as most quantizers have it; but the offset does
    // not rise above 0.
    Moments lowest_first(const Columns<WEIGHTED>& p, const Moments& fixed, const Line& line) const {
        Moments m;
        code_moments<1>(p, &line, top_, fixed, &m);
        const V inverse = invert(line.s), shift = -line.offset * inverse;
        V least = all(INF);
        for (int i = 0; i < run_; ++i) least = min(least, p.x[i] * inverse + shift);
        V unused = to_integer(min(max(least, V{}), top_));
        unused = choose(line.offset + unused * line.s <= V{}, unused, V{});
        m.qq += unused * (unused * m.w - 2.0f * m.q);
        m.q -= unused * m.w;
        m.qx -= unused * m.x;
        return m;
    }

    // d and dmin so that all sub-blocks come near to their lines: dmin as if scales were free, then d for the best few
    // of those.
    SubLines round_lines(const Valley* at, float sign) const {
        V widest{}, lowest{}, dmins[MOST_MINIMA], cost[MOST_MINIMA];
        for (int j = 0; j < subs_.count; ++j) widest = max(widest, at[j].s), lowest = max(lowest, at[j].low);
        for (int k = 0; k < subs_.minima; ++k) dmins[k] = V{}, cost[k] = all(INF);
        for (int n = 0; n < subs_.step_count; ++n) {
            V dmin = lowest / subs_.steps[n], lost{};
            const V inverse = invert(dmin);
            for (int j = 0; j < subs_.count; ++j) {
                const V low = to_integer(min(at[j].low * inverse, most_)) * dmin;
                lost += low * (low * at[j].bend + at[j].slant);
            }
            for (int k = 0; k < subs_.minima; ++k) {
                const I good = lost < cost[k];
                const V old = dmins[k], price = cost[k];
                dmins[k] = choose(good, dmin, old), cost[k] = choose(good, lost, price);
                dmin = choose(good, old, dmin), lost = choose(good, price, lost);
            }
        }
        SubLines best{};
        best.error = all(INF);
        for (int k = 0; k < subs_.minima; ++k) best.take(with_minimum(at, dmins[k], widest), subs_.count);
        best.d = u_.kept(sign * best.d);
        best.dmin = u_.kept(sign * best.dmin);
        return best;
    }

    // The best d for a dmin; of every sub-block's minimums the two nearest are tried.
    SubLines with_minimum(const Valley* at, V dmin, V widest) const {
        const V inverse = invert(dmin);
        Choice near[MOST_SUBS], far[MOST_SUBS];
        for (int j = 0; j < subs_.count; ++j) {
            const V wanted = at[j].low * inverse, first = to_integer(min(wanted, most_));
            const V second = first + choose(wanted < first, all(-1.0f), all(1.0f));
            near[j] = choice(at[j], first, dmin);
            far[j] = choice(at[j], min(max(second, V{}), most_), dmin);
        }
        SubLines f{};
        f.dmin = dmin;
        f.error = all(INF);
        for (int n = 0; n < subs_.step_count; ++n) {
            const V d = widest / subs_.steps[n], by_d = invert(d);
            V error{};
            for (int j = 0; j < subs_.count; ++j) {
                const V qq = at[j].m.qq;
                error += min(near[j].error(d, by_d, most_, qq), far[j].error(d, by_d, most_, qq));
            }
            f.d = choose(error < f.error, d, f.d);
            f.error = min(error, f.error);
        }
        const V by_d = invert(f.d);
        for (int j = 0; j < subs_.count; ++j) {
            const V qq = at[j].m.qq;
            const I first = near[j].error(f.d, by_d, most_, qq) <= far[j].error(f.d, by_d, most_, qq);
            f.scales[j] = choose(first, near[j].scale(by_d, most_), far[j].scale(by_d, most_));
            f.mins[j] = choose(first, near[j].minimum, far[j].minimum);
        }
        return f;
    }

    static Choice choice(const Valley& at, V minimum, V dmin) {
        const V low = minimum * dmin;
        return {minimum, (at.m.qx + low * at.m.q) * at.by_qq, at.floor + low * (low * at.bend + at.slant)};
    }

    // The neighbours of every scale and minimum, then d and dmin for the new codes, and so on.
    void descend(SubLines& best, SubLines now) const {
        for (int left = subs_.descents - 1; left >= 0; --left) {
            now.error = V{};
            V dd{}, mm{}, dm{}, dx{}, mx{};
            for (int j = 0; j < subs_.count; ++j) {
                const auto p = sub(j);
                V &scale = now.scales[j], &minimum = now.mins[j];
                now.error += nearby(p, now.d, now.dmin, scale, minimum);
                if (!left) continue;
                const Line line{now.d * scale, -(now.dmin * minimum), V{}};
                Moments m;
                code_moments<1>(p, &line, top_, fixed_moments(p), &m);
                dd += scale * scale * m.qq;
                mm += minimum * minimum * m.w;
                dm += minimum * scale * m.q;
                dx += scale * m.qx;
                mx += minimum * m.x;
            }
            best.take(now, subs_.count);
            if (!left) return;
            V det = dd * mm - dm * dm;
            const I ok = det > 1e-6f * dd * mm;
            det = choose(ok, det, all(1.0f));
            now.d = u_.kept(choose(ok, (mm * dx - dm * mx) / det, dx / max(dd, all(TINY))));
            now.dmin = u_.kept(choose(ok, (dm * dx - dd * mx) / det, V{}));
        }
    }

    // The best neighbour of a scale and a minimum, and its error.
    V nearby(const Columns<WEIGHTED>& p, V d, V dmin, V& scale, V& minimum) const {
        V least = all(INF), chosen{}, lowest{};
        for (int n = 0; n < subs_.near_count; n += NEAR) {
            Line lines[NEAR];
            V scales[NEAR], mins[NEAR];
            for (int k = 0; k < NEAR; ++k) {
                const float* by = subs_.near + 2 * std::min(n + k, subs_.near_count - 1);
                scales[k] = min(max(scale + by[0], V{}), most_);
                mins[k] = min(max(minimum + by[1], V{}), most_);
                lines[k] = {d * scales[k], -(dmin * mins[k]), V{}};
            }
            line_errors<NEAR>(p, lines, top_);
            for (int k = 0; k < NEAR; ++k) {
                const I good = lines[k].error < least;
                chosen = choose(good, scales[k], chosen);
                lowest = choose(good, mins[k], lowest);
                least = choose(good, lines[k].error, least);
            }
        }
        scale = chosen;
        minimum = lowest;
        return least;
    }

    const Units& u_;
    const Subs& subs_;
    const int run_;
    const V top_, most_;
};

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
