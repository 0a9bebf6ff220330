#include "encoders.h"

#include <type_traits>

#include "encode_blocks.h"
#include "encode_codes.h"
#include "encode_sublines.h"

namespace fewbits::FEWBITS_ISA {
namespace {

// Calls fit(units, at) for every LANES units; WEIGHTED and not are different code.
template <class Fit>
void each(const Weights& w, Fit&& fit) {
    Units u(w);
    for (ptrdiff_t at = 0; at < w.total; at += LANES) {
        u.load(at);
        if (w.importance) fit(u, u.columns<true>(0, w.width), at);
        else fit(u, u.columns<false>(0, w.width), at);
    }
}

// Lanes to every `stride`-th place.
template <class T>
void store(V values, T* to, ptrdiff_t at, ptrdiff_t last, int stride = 1, int offset = 0) {
    for (int l = 0; l < LANES && at + l < last; ++l) to[(at + l) * stride + offset] = T(values[l]);
}

template <class Level>
void fit_scale(const Weights& w, const Level& level, const Starts& starts,
               float* scale) {
    each(w, [&](const Units& u, const auto& p, ptrdiff_t at) {
        V most = extreme(p);
        if (starts.positive) most = abs(most);
        const V s = search_scale(p, level, starts, most, energy(p), [&](V value) { return u.kept(value); });
        store(u.stored(s), scale, at, w.total);
    });
}

void scale(const Weights& w, const Levels& levels, const Starts& starts, float* to) {
    if (levels.count) fit_scale(w, Table(levels), starts, to);
    else fit_scale(w, Even(levels), starts, to);
}

void zero(const Weights& w, float top, const Starts& starts, float* scale,
          uint8_t* zero) {
    each(w, [&](const Units& u, const auto& p, ptrdiff_t at) {
        const Line found = search_zero(p, all(top), starts, u);
        store(u.stored(found.s), scale, at, w.total);
        store(found.offset, zero, at, w.total);
    });
}

void line(const Weights& w, float top, const Starts& starts, float* d, float* m) {
    each(w, [&](const Units& u, const auto& p, ptrdiff_t at) {
        const Line found = fit_line(p, all(top), starts, u);
        store(u.stored(found.s), d, at, w.total);
        store(u.stored(found.offset), m, at, w.total);
    });
}

bool nearer(float a, float b) { return std::abs(a) < std::abs(b); }

template <bool WEIGHTED>
using Floats = FloatSums<WEIGHTED, Table>;

template <template <bool> class How, class Level>
void fit_scales(const Weights& w, const Level& level, const Starts& starts, const Subs& subs, float* d, int8_t* scales) {
    const float farthest = 1.0f / std::abs(*std::min_element(starts.scale, starts.scale + starts.count, nearer));
    each(w, [&](const Units& u, const auto& p, ptrdiff_t at) {
        const How<std::decay_t<decltype(p)>::weighs> how(u, w.width, subs.count, level, farthest);
        const SubScales found = FitScales(u, how, subs).fit(starts);
        store(u.stored(found.d), d, at, w.total);
        for (int j = 0; j < subs.count; ++j) store(found.scales[j], scales, at, w.total, subs.count, j);
    });
}

void scales(const Weights& w, const Levels& levels, const Starts& starts, const Subs& subs, float* d, int8_t* to) {
    if (levels.count) fit_scales<Floats>(w, Table(levels), starts, subs, d, to);
    else fit_scales<PairSums>(w, Even(levels), starts, subs, d, to);
}

void lines(const Weights& w, float top, const Starts& starts, const Subs& subs,
           float* d, float* dmin, uint8_t* scales, uint8_t* mins) {
    each(w, [&](const Units& u, const auto& p, ptrdiff_t at) {
        const SubLines found = FitLines<std::decay_t<decltype(p)>::weighs>(u, w.width, top, subs).fit(starts);
        store(u.stored(found.d), d, at, w.total);
        store(u.stored(found.dmin), dmin, at, w.total);
        for (int j = 0; j < subs.count; ++j) {
            store(found.scales[j], scales, at, w.total, subs.count, j);
            store(found.mins[j], mins, at, w.total, subs.count, j);
        }
    });
}

}  // namespace

extern const Encoders encoders = {scale, zero, line, scales, lines, nearest_codes, measured_codes, values_of,
                                  join_planes, split_planes, widen, join};

}  // namespace fewbits::FEWBITS_ISA
