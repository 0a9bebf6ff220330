// The search for a scale and a real offset: values s * q + offset, codes q from 0 to `top`.
#pragma once

#include "encode_scale.h"

namespace fewbits::FEWBITS_ISA {
namespace {

// Weighted sums: of nothing, x, x^2, q, q^2, q x.
struct Moments {
    V w, x, xx, q, qq, qx;
};

template <bool WEIGHTED>
Moments fixed_moments(const Columns<WEIGHTED>& p) {
    Moments m{};
    if (!WEIGHTED) m.w = all(float(p.count));
    for (int i = 0; i < p.count; ++i) {
        const V v = p.weighted(p.x[i], i);
        if (WEIGHTED) m.w += p.weight[i];
        m.x += v;
        m.xx += v * p.x[i];
    }
    return m;
}

// With the nearest codes on each of K lines.
template <int K, bool WEIGHTED>
void code_moments(const Columns<WEIGHTED>& p, const Line* lines, V top, const Moments& fixed, Moments* out) {
    V inverse[K], shift[K], q1[K], qq[K], qx[K];
    for (int k = 0; k < K; ++k) {
        inverse[k] = invert(lines[k].s), shift[k] = -lines[k].offset * inverse[k];
        q1[k] = qq[k] = qx[k] = V{};
    }
    for (int i = 0; i < p.count; ++i) {
        const V x = p.x[i];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const V q = to_integer(min(max(x * inverse[k] + shift[k], V{}), top)), v = p.weighted(q, i);
            q1[k] += v;
            qq[k] += v * q;
            qx[k] += v * x;
        }
    }
    for (int k = 0; k < K; ++k) out[k] = {fixed.w, fixed.x, fixed.xx, q1[k], qq[k], qx[k]};
}

template <int K, bool WEIGHTED>
void line_errors(const Columns<WEIGHTED>& p, Line* lines, V top) {
    V inverse[K], e[K];
    for (int k = 0; k < K; ++k) inverse[k] = invert(lines[k].s), e[k] = V{};
    for (int i = 0; i < p.count; ++i) {
        const V x = p.x[i];
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
            const V y = x - lines[k].offset, r = to_integer(min(max(y * inverse[k], V{}), top)) * lines[k].s - y;
            e[k] += r * p.weighted(r, i);
        }
    }
    for (int k = 0; k < K; ++k) lines[k].error = e[k];
}

// The best line for given codes; with `below_zero` its offset is at most 0.
inline Line least_squares(const Moments& m, bool below_zero) {
    V det = m.w * m.qq - m.q * m.q;
    I alone = det <= 1e-6f * m.w * m.qq;
    det = invert(choose(alone, all(1.0f), det));
    V s = (m.w * m.qx - m.q * m.x) * det, offset = (m.qq * m.x - m.q * m.qx) * det;
    if (below_zero) alone |= offset > V{};
    s = choose(alone, m.qx * invert(max(m.qq, all(TINY))), s);
    offset = choose(alone, V{}, offset);
    return {s, offset, m.xx - s * m.qx - offset * m.x};
}

struct Range {
    V low, high;
};

template <bool WEIGHTED>
Range range_of(const Columns<WEIGHTED>& p, bool below_zero) {
    Range r{all(INF), all(-INF)};
    for (int i = 0; i < p.count; ++i) r = {min(r.low, p.x[i]), max(r.high, p.x[i])};
    if (below_zero) r.low = min(r.low, V{}), r.high = max(r.high, r.low);
    return r;
}

// The best few after one step of least squares from every start.
template <bool WEIGHTED>
Heats first_lines(const Columns<WEIGHTED>& p, const Moments& fixed, V top, bool below_zero, const Starts& starts,
                  int heats) {
    const Range r = range_of(p, below_zero);
    const V size = r.high - r.low, middle = (r.high + r.low) * 0.5f;
    Heats best(heats);
    for (int at = 0; at < starts.count; at += BATCH) {
        Line lines[BATCH];
        Moments found[BATCH];
        for (int k = 0; k < BATCH; ++k) {
            const int n = std::min(at + k, starts.count - 1);
            lines[k] = {size * starts.scale[n], middle - size * starts.drop[n], V{}};
            if (below_zero) lines[k].offset = min(lines[k].offset, V{});
        }
        code_moments<BATCH>(p, lines, top, fixed, found);
        for (int k = 0; k < BATCH; ++k) best.add(at + k, least_squares(found[k], below_zero));
    }
    return best;
}

// The best real line.
template <bool WEIGHTED>
Line search_line(const Columns<WEIGHTED>& p, const Moments& fixed, V top, bool below_zero, const Starts& starts) {
    Heats best = first_lines(p, fixed, top, below_zero, starts, starts.kept);
    Line chosen = best.line[0];
    for (int k = 1; k < best.count; ++k) chosen = better(chosen, best.line[k]);
    for (int at = 0; at < starts.kept; at += BATCH)
        for (int round = 1; round < starts.rounds; ++round) {
            Line* lines = best.line + at;
            Moments found[BATCH];
            code_moments<BATCH>(p, lines, top, fixed, found);
            for (int k = 0; k < BATCH; ++k) {
                lines[k] = least_squares(found[k], below_zero);
                chosen = better(chosen, lines[k]);
            }
        }
    return chosen;
}

// The best line as stored; never worse than that from smallest to largest value.
template <bool WEIGHTED>
Line fit_line(const Columns<WEIGHTED>& p, V top, const Starts& starts, const Units& u) {
    const Moments fixed = fixed_moments(p);
    Heats best = first_lines(p, fixed, top, false, starts, starts.kept - 1);
    const Range r = range_of(p, false);
    best.line[starts.kept - 1] = {(r.high - r.low) / top, r.low, V{}};
    Line chosen{u.kept(best.line[starts.kept - 1].s), u.kept(r.low), all(INF)};
    for (int at = 0; at < starts.kept; at += BATCH)
        for (int round = 0; round < starts.rounds; ++round) {
            Line* lines = best.line + at;
            for (int k = 0; k < BATCH; ++k) lines[k].s = u.kept(lines[k].s), lines[k].offset = u.kept(lines[k].offset);
            line_errors<BATCH>(p, lines, top);
            for (int k = 0; k < BATCH; ++k) chosen = better(chosen, lines[k]);
            if (round + 1 == starts.rounds) break;
            Moments found[BATCH];
            code_moments<BATCH>(p, lines, top, fixed, found);
            for (int k = 0; k < BATCH; ++k) lines[k] = least_squares(found[k], false);
        }
    return chosen;
}

}  // namespace
}  // namespace fewbits::FEWBITS_ISA
