#include "encoders.h"

#include <type_traits>

#include "encode_codes.h"
#include "encode_sublines.h"

namespace fewbits::FEWBITS_ISA {
namespace {

// Calls fit(units, at) for every LANES units; WEIGHTED and not are different code.
template <class Fit>
void each(const Weights& w, ptrdiff_t first, ptrdiff_t last, Fit&& fit) {
    Units u(w);
    for (ptrdiff_t at = first; at < last; at += LANES) {
        u.load(at);
        if (w.importance.data) fit(u, u.columns<true>(0, w.width), at);
        else fit(u, u.columns<false>(0, w.width), at);
    }
}

// Lanes to every `stride`-th place.
template <class T>
void store(V values, T* to, ptrdiff_t at, ptrdiff_t last, int stride = 1, int offset = 0) {
    for (int l = 0; l < LANES && at + l < last; ++l) to[(at + l) * stride + offset] = T(values[l]);
}

template <class Level>
void fit_scale(const Weights& w, const Level& level, const Starts& starts, ptrdiff_t first, ptrdiff_t last,
               float* scale) {
    each(w, first, last, [&](const Units& u, const auto& p, ptrdiff_t at) {
        V most = extreme(p);
        if (starts.positive) most = abs(most);
        const V s = search_scale(p, level, starts, most, energy(p), [&](V value) { return u.kept(value); });
        store(u.stored(s), scale, at, last);
    });
}

void scale(const Weights& w, const Levels& levels, const Starts& starts, ptrdiff_t first, ptrdiff_t last, float* to) {
    if (levels.count) fit_scale(w, Table(levels), starts, first, last, to);
    else fit_scale(w, Even(levels), starts, first, last, to);
}

void zero(const Weights& w, float top, const Starts& starts, ptrdiff_t first, ptrdiff_t last, float* scale,
          uint8_t* zero) {
    each(w, first, last, [&](const Units& u, const auto& p, ptrdiff_t at) {
        const Line found = search_zero(p, all(top), starts, u);
        store(u.stored(found.s), scale, at, last);
        store(found.offset, zero, at, last);
    });
}

void line(const Weights& w, float top, const Starts& starts, ptrdiff_t first, ptrdiff_t last, float* d, float* m) {
    each(w, first, last, [&](const Units& u, const auto& p, ptrdiff_t at) {
        const Line found = fit_line(p, all(top), starts, u);
        store(u.stored(found.s), d, at, last);
        store(u.stored(found.offset), m, at, last);
    });
}

template <class Level>
void fit_scales(const Weights& w, const Level& level, const Starts& starts, const Subs& subs, ptrdiff_t first,
                ptrdiff_t last, float* d, int8_t* scales) {
    each(w, first, last, [&](const Units& u, const auto& p, ptrdiff_t at) {
        const SubScales found = FitScales<std::decay_t<decltype(p)>::weighs, Level>(u, w.width, level, subs).fit(starts);
        store(u.stored(found.d), d, at, last);
        for (int j = 0; j < subs.count; ++j) store(found.scales[j], scales, at, last, subs.count, j);
    });
}

void scales(const Weights& w, const Levels& levels, const Starts& starts, const Subs& subs, ptrdiff_t first,
            ptrdiff_t last, float* d, int8_t* to) {
    if (levels.count) fit_scales(w, Table(levels), starts, subs, first, last, d, to);
    else fit_scales(w, Even(levels), starts, subs, first, last, d, to);
}

void lines(const Weights& w, float top, const Starts& starts, const Subs& subs, ptrdiff_t first, ptrdiff_t last,
           float* d, float* dmin, uint8_t* scales, uint8_t* mins) {
    each(w, first, last, [&](const Units& u, const auto& p, ptrdiff_t at) {
        const SubLines found = FitLines<std::decay_t<decltype(p)>::weighs>(u, w.width, top, subs).fit(starts);
        store(u.stored(found.d), d, at, last);
        store(u.stored(found.dmin), dmin, at, last);
        for (int j = 0; j < subs.count; ++j) {
            store(found.scales[j], scales, at, last, subs.count, j);
            store(found.mins[j], mins, at, last, subs.count, j);
        }
    });
}

}  // namespace

extern const Encoders encoders = {scale, zero, line, scales, lines, nearest_codes, values_of, join_planes, split_planes};

}  // namespace fewbits::FEWBITS_ISA
