// The search for a scale: values s * level. Many starts, each improved by least squares, the best few go on.
//
// For values s * q let r = x/s - q, the error in steps. With R = sum(r^2), C = sum(r * q) and B = sum(q^2) (all
// weighted) the best scale for these q is s * (1 + C/B), and its error s^2 * (R - C^2/B): small numbers are subtracted
// from small ones, so float32 does.
#pragma once

#include "encode_unit.h"

namespace fewbits::FEWBITS_ISA {
namespace {

// Integers low … high.
struct Even {
    V low, high;
    explicit Even(const Levels& levels) : low(all(levels.low)), high(all(levels.high)) {}
    Even(V low, V high) : low(low), high(high) {}
    V operator()(V u) const { return to_integer(min(max(u, low), high)); }
};

struct Table {
    Levels levels;
    explicit Table(const Levels& levels) : levels(levels) {}
    V operator()(V u) const {
        V level = all(levels.low);
        for (int i = 0; i < levels.count; ++i) level += u > all(levels.bounds[i]) ? all(levels.rises[i]) : V{};
        return level;
    }
};

// Values s * (level - offset), or s * code + offset.
struct Line {
    V s, offset, error;
};

inline Line better(const Line& a, const Line& b) {
    const I good = b.error < a.error;
    return {choose(good, b.s, a.s), choose(good, b.offset, a.offset), choose(good, b.error, a.error)};
}

constexpr int BATCH = 4;      // starts at once, so that sums don't wait for each other
constexpr int MOST_KEPT = 8;  // of them all

// Starts compete in `count` heats, start n in heat n modulo `count`; the best of each goes on.
struct Heats {
    int count;
    Line line[MOST_KEPT];

    explicit Heats(int count) : count(count) {
        for (Line& l : line) l = {V{}, V{}, all(INF)};
    }
    void add(int n, const Line& found) { line[n % count] = better(line[n % count], found); }
};

template <bool WEIGHTED>
V energy(const Columns<WEIGHTED>& p) {
    V total{};
    for (int i = 0; i < p.count; ++i) total += p.weighted(square(p.x[i]), i);
    return total;
}

// The element of largest magnitude; 1 where all are zero.
template <bool WEIGHTED>
V extreme(const Columns<WEIGHTED>& p) {
    V found{}, size{};
    for (int i = 0; i < p.count; ++i) {
        const V a = abs(p.x[i]);
        found = choose(a > size, p.x[i], found);
        size = max(a, size);
    }
    return choose(found == V{}, all(1.0f), found);
}

struct Probe {
    V error, better, least, squares;  // with the nearest levels q; the best scale for those, and its error; sum(q^2)
};

template <int K, bool WEIGHTED, class Level>
void probe(const Columns<WEIGHTED>& p, const V* s, const Level* level, V total, Probe* out) {
    V inverse[K], c[K], e[K];
    for (int k = 0; k < K; ++k) inverse[k] = invert(s[k]), c[k] = e[k] = V{};
    for (int i = 0; i < p.count; ++i) {
        const V x = p.x[i];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            V r = x * inverse[k];
            const V q = level[k](r);
            r -= q;
            const V v = p.weighted(r, i);
            c[k] += q * v;
            e[k] += r * v;
        }
    }
    for (int k = 0; k < K; ++k) {
        const V b = max(square(inverse[k]) * total - 2.0f * c[k] - e[k], all(TINY)), step = c[k] * invert(b);
        const V squared = square(s[k]);
        const I zero = s[k] == V{};
        out[k] = {choose(zero, total, e[k] * squared), s[k] * (1.0f + step),
                  choose(zero, total, (e[k] - c[k] * step) * squared), b};
    }
}

// The best scale, as `keep` rounds it; never worse than the first start.
template <bool WEIGHTED, class Level, class Keep>
V search_scale(const Columns<WEIGHTED>& p, const Level& level, const Starts& starts, V most, V total, Keep keep) {
    Heats best(starts.kept - 1);  // and the plain choice
    const Level levels[BATCH] = {level, level, level, level};
    V s[BATCH];
    Probe found[BATCH];
    for (int at = 0; at < starts.count; at += BATCH) {
        for (int k = 0; k < BATCH; ++k) s[k] = most * starts.scale[std::min(at + k, starts.count - 1)];
        probe<BATCH>(p, s, levels, total, found);
        for (int k = 0; k < BATCH; ++k) best.add(at + k, {found[k].better, V{}, found[k].least});
    }
    best.line[starts.kept - 1].s = most * starts.scale[0];
    Line chosen{keep(best.line[starts.kept - 1].s), V{}, all(INF)};  // where no error is a number: scales that saturate
    for (int at = 0; at < starts.kept; at += BATCH) {
        for (int k = 0; k < BATCH; ++k) s[k] = best.line[at + k].s;
        for (int round = 0; round < starts.rounds; ++round) {
            for (int k = 0; k < BATCH; ++k) s[k] = keep(s[k]);
            probe<BATCH>(p, s, levels, total, found);
            for (int k = 0; k < BATCH; ++k) {
                chosen = better(chosen, {s[k], V{}, found[k].error});
                s[k] = found[k].better;
            }
        }
    }
    return chosen.s;
}

// Scale, as stored, and zero point of values s * (code - zero), codes 0 … top; never worse than exactly the range.
template <bool WEIGHTED>
Line search_zero(const Columns<WEIGHTED>& p, V top, const Starts& starts, const Units& u) {
    const V total = energy(p);
    V low{}, high{};
    for (int i = 0; i < p.count; ++i) low = min(low, p.x[i]), high = max(high, p.x[i]);
    V plain = (high - low) / top;
    plain = choose(plain > V{}, plain, all(1.0f));
    Heats best(starts.kept - 1);  // and the plain choice
    V s[BATCH];
    Probe found[BATCH];
    constexpr float SHIFTS[BATCH] = {0.0f, -1.0f, 1.0f, 0.0f};  // three zero points to a scale
    for (int at = 0; at < 3 * starts.count; at += BATCH) {
        V zero[BATCH];
        for (int k = 0; k < BATCH; ++k) {
            const int n = std::min(at + k, 3 * starts.count - 1);
            s[k] = plain * starts.scale[n / 3];
            zero[k] = to_integer(min(max((top - (high + low) / s[k]) * 0.5f, V{}), top)) + SHIFTS[n % 3];
            zero[k] = min(max(zero[k], V{}), top);
        }
        const Even levels[BATCH] = {{-zero[0], top - zero[0]}, {-zero[1], top - zero[1]}, {-zero[2], top - zero[2]},
                                    {-zero[3], top - zero[3]}};
        probe<BATCH>(p, s, levels, total, found);
        for (int k = 0; k < BATCH; ++k) best.add(at + k, {found[k].better, zero[k], found[k].least});
    }
    best.line[starts.kept - 1] = {plain, to_integer(min(max(-low / plain, V{}), top)), V{}};
    Line chosen{u.kept(plain), best.line[starts.kept - 1].offset, all(INF)};
    for (int at = 0; at < starts.kept; at += BATCH) {
        const Line* line = best.line + at;
        const Even levels[BATCH] = {{-line[0].offset, top - line[0].offset}, {-line[1].offset, top - line[1].offset},
                                    {-line[2].offset, top - line[2].offset}, {-line[3].offset, top - line[3].offset}};
        for (int k = 0; k < BATCH; ++k) s[k] = line[k].s;
        for (int round = 0; round < starts.rounds; ++round) {
            for (int k = 0; k < BATCH; ++k) s[k] = u.kept(s[k]);
            probe<BATCH>(p, s, levels, total, found);
            for (int k = 0; k < BATCH; ++k) {
                chosen = better(chosen, {s[k], line[k].offset, found[k].error});
                s[k] = found[k].better;
            }
        }
    }
    return chosen;
}

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
