// The encoders for Python: shapes are checked here, then units are shared out among threads.
#include "bind.h"

#include <nanobind/stl/optional.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <optional>
#include <type_traits>

#include "encoders.h"

namespace fewbits {
namespace {

constexpr long PART = 1 << 14;  // weights that a thread takes at a time, about: results don't depend on it
constexpr int MOST_SUBS = 16, MOST_KEPT = 8, MOST_MINIMA = 4;

using Any3 = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Floats = Array<const float, 1>;
using Matrix = Array<const float, 2>;
template <class T>
using Out = Array<T, 2>;

Cube cube(const Any3& a) {
    return {a.data(), ptrdiff_t(a.stride(0)), ptrdiff_t(a.stride(1)), ptrdiff_t(a.stride(2))};
}

Weights weights(const Any3& w, const std::optional<Any3>& importance, int storage, int threads) {
    check_threads(threads);
    require(storage >= 0 && storage <= 2, "storage: 0 float32, 1 float16, 2 bfloat16");
    require(w.shape(2) > 0 && w.shape(2) < (1u << 30), "units of 1 to 2^30 columns");
    if (importance)
        for (int i = 0; i < 3; ++i) require(importance->shape(i) == w.shape(i), "importance: the shape of w");
    const Cube known = importance ? cube(*importance) : Cube{nullptr, 0, 0, 0};
    return {cube(w), known, ptrdiff_t(w.shape(0) * w.shape(1)), ptrdiff_t(w.shape(1)), int(w.shape(2)), Storage(storage)};
}

Levels levels(float low, float high, const Floats& bounds, const Floats& rises) {
    require(bounds.shape(0) == rises.shape(0) && bounds.shape(0) < 256, "a rise for each of up to 255 bounds");
    require(low < high, "levels: low < high");
    return {low, high, int(bounds.shape(0)), bounds.data(), rises.data()};
}

Starts starts(const Floats& scale, const Floats* drop, int kept, int rounds, bool positive = false) {
    require(scale.shape(0) > 0 && scale.shape(0) < 4096, "1 to 4095 starts");
    require(!drop || drop->shape(0) == scale.shape(0), "a drop for each start");
    require((kept == 4 || kept == MOST_KEPT) && rounds > 0 && rounds < 64, "kept: 4 or 8; rounds: 1 to 63");
    return {scale.data(), drop ? drop->data() : nullptr, int(scale.shape(0)), kept, rounds, positive};
}

Subs subs(const Weights& w, int count, float least, float most, const Floats& steps, int minima, const Matrix& near,
          int descents) {
    require(count > 0 && count <= MOST_SUBS && w.width % count == 0, "1 to 16 equal sub-blocks");
    require(least < most && most <= 255 && least >= -128 && most - least < 256, "integers of a byte");
    require(steps.shape(0) > 0 && steps.shape(0) < 4096 && minima > 0 && minima <= MOST_MINIMA, "steps; 1 to 4 minima");
    require(near.shape(0) > 0 && near.shape(0) < 4096 && near.shape(1) == 2, "neighbours [n, 2]");
    require(descents > 0 && descents < 64, "descents: 1 to 63");
    return {count, least, most, steps.data(), int(steps.shape(0)), minima, near.data(), int(near.shape(0)), descents};
}

template <class T>
T* out(const Out<T>& to, const Weights& w, int each = 1) {
    require(ptrdiff_t(to.shape(0)) == w.total && int(to.shape(1)) == each, "output: [units, parameters]");
    return to.data();
}

// Calls work(first, last) for all units, in parts of whole vectors.
template <class Work>
void share(ptrdiff_t total, int width, int threads, Work&& work) {
    const ptrdiff_t step = std::max<ptrdiff_t>(1, PART / width / 16) * 16;
    std::atomic<bool> full{false};
    nb::gil_scoped_release free;
    parallel(threads, long((total + step - 1) / step), [&](long part) {
        try {
            work(part * step, std::min(total, (part + 1) * step));
        } catch (const std::bad_alloc&) {
            full = true;
        }
    });
    if (full) throw std::bad_alloc();
}

using Maybe = std::optional<Any3>;

void fit_scale(Any3 w, Maybe importance, int storage, int threads, float low, float high, Floats bounds, Floats rises,
               Floats parts, int kept, int rounds, bool positive, Out<float> scale) {
    const Weights all = weights(w, importance, storage, threads);
    const Levels table = levels(low, high, bounds, rises);
    const Starts from = starts(parts, nullptr, kept, rounds, positive);
    float* to = out(scale, all);
    const Encoders& use = encoders_of(current());
    share(all.total, all.width, threads, [&](ptrdiff_t a, ptrdiff_t b) { use.scale(all, table, from, a, b, to); });
}

void fit_zero(Any3 w, Maybe importance, int storage, int threads, float top, Floats parts, int kept, int rounds,
              Out<float> scale, Out<uint8_t> zero) {
    const Weights all = weights(w, importance, storage, threads);
    require(top >= 1 && top <= 255, "top: 1 to 255");
    const Starts from = starts(parts, nullptr, kept, rounds);
    float* to = out(scale, all);
    uint8_t* zeros = out(zero, all);
    const Encoders& use = encoders_of(current());
    share(all.total, all.width, threads, [&](ptrdiff_t a, ptrdiff_t b) { use.zero(all, top, from, a, b, to, zeros); });
}

void fit_line(Any3 w, Maybe importance, int storage, int threads, float top, Floats parts, Floats drops, int kept,
              int rounds, Out<float> d, Out<float> m) {
    const Weights all = weights(w, importance, storage, threads);
    require(top >= 1 && top <= 255, "top: 1 to 255");
    const Starts from = starts(parts, &drops, kept, rounds);
    float *scale = out(d, all), *offset = out(m, all);
    const Encoders& use = encoders_of(current());
    share(all.total, all.width, threads,
          [&](ptrdiff_t a, ptrdiff_t b) { use.line(all, top, from, a, b, scale, offset); });
}

void fit_scales(Any3 w, Maybe importance, int storage, int threads, float low, float high, Floats bounds, Floats rises,
                Floats parts, int kept, int rounds, int count, float least, float most, Floats steps, Matrix near,
                int descents, Out<float> d, Out<int8_t> scales) {
    const Weights all = weights(w, importance, storage, threads);
    const Levels table = levels(low, high, bounds, rises);
    const Starts from = starts(parts, nullptr, kept, rounds);
    const Subs blocks = subs(all, count, least, most, steps, 1, near, descents);
    require(most <= 127, "signed bytes");
    float* to = out(d, all);
    int8_t* integers = out(scales, all, count);
    const Encoders& use = encoders_of(current());
    share(all.total, all.width, threads,
          [&](ptrdiff_t a, ptrdiff_t b) { use.scales(all, table, from, blocks, a, b, to, integers); });
}

void fit_lines(Any3 w, Maybe importance, int storage, int threads, float top, Floats parts, Floats drops, int kept,
               int rounds, int count, float most, Floats steps, int minima, Matrix near, int descents, Out<float> d,
               Out<float> dmin, Out<uint8_t> scales, Out<uint8_t> mins) {
    const Weights all = weights(w, importance, storage, threads);
    require(top >= 1 && top <= 255, "top: 1 to 255");
    const Starts from = starts(parts, &drops, kept, rounds);
    const Subs blocks = subs(all, count, 0, most, steps, minima, near, descents);
    float *to = out(d, all), *to_min = out(dmin, all);
    uint8_t *integers = out(scales, all, count), *minimums = out(mins, all, count);
    const Encoders& use = encoders_of(current());
    share(all.total, all.width, threads, [&](ptrdiff_t a, ptrdiff_t b) {
        use.lines(all, top, from, blocks, a, b, to, to_min, integers, minimums);
    });
}

// Grids of `count` units, and how many columns these have.
Grid grid(size_t count, size_t width, int threads, const Matrix& scale, const std::optional<Matrix>& offset,
          const std::optional<Matrix>& zero, float middle, float factor) {
    check_threads(threads);
    require(scale.shape(1) > 0 && width > 0 && width < (1u << 30) && width % scale.shape(1) == 0, "equal sub-blocks");
    require(scale.shape(0) == count, "a row of scales for each unit");
    for (const auto* a : {&offset, &zero})
        require(!*a || ((*a)->shape(0) == count && (*a)->shape(1) == scale.shape(1)), "as many as scales");
    return {scale.data(), offset ? offset->data() : nullptr, zero ? zero->data() : nullptr, middle, factor, int(width),
            int(scale.shape(1))};
}

void codes(Matrix w, int threads, Matrix scale, std::optional<Matrix> offset, std::optional<Matrix> zero, float middle,
           float factor, float low, float high, Floats bounds, Array<const uint8_t, 1> order, Out<uint8_t> to) {
    require(low >= 0 && high <= 255 && low < high && bounds.shape(0) < 256, "codes of a byte");
    require(bounds.shape(0) == 0 || order.shape(0) == bounds.shape(0) + 1, "a code for each level");
    require(to.shape(0) == w.shape(0) && to.shape(1) == w.shape(1), "as many codes as weights");
    const Grid known = grid(w.shape(0), w.shape(1), threads, scale, offset, zero, middle, factor);
    const Levels table{low, high, int(bounds.shape(0)), bounds.data(), nullptr};
    const float* from = w.data();
    uint8_t* out = to.data();
    const uint8_t* ranks = order.data();
    const Encoders& use = encoders_of(current());
    share(ptrdiff_t(w.shape(0)), known.width, threads,
          [&](ptrdiff_t a, ptrdiff_t b) { use.codes(known, table, ranks, from, a, b, out); });
}

void values(Array<const uint8_t, 2> codes, int threads, Matrix scale, std::optional<Matrix> offset,
            std::optional<Matrix> zero, float middle, float factor, Floats table, Out<float> to) {
    require(table.shape(0) == 0 || table.shape(0) == 256, "a table of 256 values, or none");
    require(to.shape(0) == codes.shape(0) && to.shape(1) == codes.shape(1), "as many values as codes");
    const Grid known = grid(codes.shape(0), codes.shape(1), threads, scale, offset, zero, middle, factor);
    const float* levels = table.shape(0) ? table.data() : nullptr;
    const uint8_t* from = codes.data();
    float* out = to.data();
    const Encoders& use = encoders_of(current());
    share(ptrdiff_t(codes.shape(0)), known.width, threads,
          [&](ptrdiff_t a, ptrdiff_t b) { use.values(known, levels, from, a, b, out); });
}

using Packed = Array<const uint8_t, 1>;

// How many runs of bytes there are.
ptrdiff_t runs(int threads, int bits, int parts, int run, size_t packed, size_t codes) {
    check_threads(threads);
    require(bits >= 1 && parts >= 1 && bits * parts <= 8 && run >= 1 && run <= 4096, "parts of a byte");
    require(packed % run == 0 && packed * parts == codes, "as many codes as bytes hold");
    return ptrdiff_t(packed / run);
}

void planes(Packed codes, int threads, int bits, int parts, int run, Array<uint8_t, 1> packed) {
    const ptrdiff_t count = runs(threads, bits, parts, run, packed.shape(0), codes.shape(0));
    const uint8_t* from = codes.data();
    uint8_t* to = packed.data();
    const Encoders& use = encoders_of(current());
    share(count, parts * run, threads, [&](ptrdiff_t a, ptrdiff_t b) { use.planes(from, bits, parts, run, a, b, to); });
}

void unplanes(Packed packed, int threads, int bits, int parts, int run, Array<uint8_t, 1> codes) {
    const ptrdiff_t count = runs(threads, bits, parts, run, packed.shape(0), codes.shape(0));
    const uint8_t* from = packed.data();
    uint8_t* to = codes.data();
    const Encoders& use = encoders_of(current());
    share(count, parts * run, threads,
          [&](ptrdiff_t a, ptrdiff_t b) { use.unplanes(from, bits, parts, run, a, b, to); });
}

}  // namespace

// Arrays are not converted: an output would be a copy.
template <class A>
constexpr bool optional = std::is_same_v<A, Maybe> || std::is_same_v<A, std::optional<Matrix>>;

template <class A>
auto how() {
    if constexpr (std::is_arithmetic_v<A>) return nb::arg();
    else if constexpr (optional<A>) return nb::arg().noconvert().none();
    else return nb::arg().noconvert();
}

template <class... A>
void define(nb::module_& m, const char* name, void (*function)(A...)) {
    m.def(name, function, how<A>()...);
}

void bind_encoders(nb::module_& m) {
    define(m, "fit_scale", fit_scale);
    define(m, "fit_zero", fit_zero);
    define(m, "fit_line", fit_line);
    define(m, "fit_scales", fit_scales);
    define(m, "fit_lines", fit_lines);
    define(m, "codes", codes);
    define(m, "values", values);
    define(m, "planes", planes);
    define(m, "unplanes", unplanes);
}

}  // namespace fewbits
