// The encoders for Python: shapes are checked here, then units are shared out among threads.
#include "bind.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "encoders.h"

namespace fewbits {
namespace {

constexpr long PART = 1 << 13;  // weights that a thread takes at a time, about: results don't depend on it
constexpr int MOST_SUBS = 16, MOST_KEPT = 8, MOST_MINIMA = 4;

using Any3 = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;
using Floats = Array<const float, 1>;
using Matrix = Array<const float, 2>;
template <class T>
using Out = Array<T, 2>;
using Maybe = std::optional<Any3>;
using Blocks = std::optional<Out<uint8_t>>;
using Lost = std::pair<double, double>;

Storage storage_of(nb::dlpack::dtype type) {
    if (type == nb::dtype<float>()) return Storage::float32;
    const bool half = type.bits == 16 && type.lanes == 1, brain = type.code == uint8_t(nb::dlpack::dtype_code::Bfloat);
    if (!half || !(brain || type.code == uint8_t(nb::dlpack::dtype_code::Float)))
        throw nb::type_error("float32, float16 or bfloat16");
    return brain ? Storage::bfloat16 : Storage::float16;
}

Source source(const Any3& a) {
    return {a.data(), ptrdiff_t(a.stride(0)), ptrdiff_t(a.stride(1)), ptrdiff_t(a.stride(2)), ptrdiff_t(a.shape(1)),
            storage_of(a.dtype())};
}

// How blocks of a codec are put together, as fewbits.codecs.native.packing finds it.
struct Packer {
    std::vector<Move> terms;
    std::vector<uint8_t> constant, order;  // order: codes by rank of their level, or none
    int raw;

    Packer(const Array<const int32_t, 2>& all, const Array<const uint8_t, 1>& flips, int raw_bytes,
           const Array<const uint8_t, 1>& ranks)
        : constant(flips.data(), flips.data() + flips.size()), order(ranks.data(), ranks.data() + ranks.size()),
          raw(raw_bytes) {
        require(all.shape(1) == 5 && raw > 0, "terms [n, 5]");
        for (const int32_t* t = all.data(); t != all.data() + all.size(); t += 5) {
            require(t[0] >= 0 && t[1] >= 0 && t[2] > 0 && t[0] <= raw - t[2] && t[1] <= int(constant.size()) - t[2] &&
                    t[3] > -8 && t[3] < 8 && t[4] > 0 && t[4] < 256, "a term beyond the bytes");
            terms.push_back({t[0], t[1], t[2], t[3], uint8_t(t[4])});
        }
    }
    Packing packing() const { return {terms.data(), constant.data(), int(terms.size()), raw, int(constant.size())}; }
};

using Packs = const Packer*;

// What every search is told: weights, importances, how scales are stored; and where blocks go, if anywhere.
struct Call {
    Source w, importance;
    bool weighted;
    ptrdiff_t total;
    int width, threads;
    Storage storage;
    const Packer* packer;
    uint8_t* blocks;

    Call(const Any3& from, const Maybe& known, int stored, int thread_count, const Packer* how,
         const std::optional<Out<uint8_t>>& to)
        : w(source(from)), importance(known ? source(*known) : Source{}), weighted(known),
          total(ptrdiff_t(from.shape(0) * from.shape(1))), width(int(from.shape(2))), threads(thread_count),
          storage(Storage(stored)), packer(how), blocks(to ? to->data() : nullptr) {
        check_threads(threads);
        require(stored >= 0 && stored <= 2, "storage: 0 float32, 1 float16, 2 bfloat16");
        require(from.shape(2) > 0 && from.shape(2) < (1u << 30), "units of 1 to 2^30 columns");
        for (int i = 0; known && i < 3; ++i) require(known->shape(i) == from.shape(i), "importance: the shape of w");
        require(bool(how) == bool(to), "a packer and blocks, or neither");
        if (!how) return;
        require(storage == Storage::float16, "blocks have float16 scales");
        require(ptrdiff_t(to->shape(0)) == total && to->shape(1) == how->constant.size(), "blocks: [units, bytes]");
    }

    ptrdiff_t step() const { return std::max<ptrdiff_t>(1, PART / width / 16) * 16; }
    ptrdiff_t parts() const { return (total + step() - 1) / step(); }
};

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

Subs subs(const Call& w, int count, float least, float most, const Floats& steps, int minima, const Matrix& near,
          int descents) {
    require(count > 0 && count <= MOST_SUBS && w.width % count == 0, "1 to 16 equal sub-blocks");
    require(least < most && most <= 255 && least >= -128 && most - least < 256, "integers of a byte");
    require(steps.shape(0) > 0 && steps.shape(0) < 4096 && minima > 0 && minima <= MOST_MINIMA, "steps; 1 to 4 minima");
    require(near.shape(0) > 0 && near.shape(0) < 4096 && near.shape(1) == 2, "neighbours [n, 2]");
    require(descents > 0 && descents < 64, "descents: 1 to 63");
    return {count, least, most, steps.data(), int(steps.shape(0)), minima, near.data(), int(near.shape(0)), descents};
}

// Calls work(first, last) for all units, in parts of whole vectors.
template <class Work>
void share(ptrdiff_t total, ptrdiff_t step, int threads, Work&& work) {
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

ptrdiff_t step_of(size_t width) { return std::max<ptrdiff_t>(1, PART / ptrdiff_t(width)); }

// Where what is found goes: [units, 1], and [units, subs] for sub-blocks; what a search does not give is null.
struct Found {
    float *d = nullptr, *m = nullptr;
    uint8_t *scales = nullptr, *mins = nullptr;
    int subs = 1;
    float least = 0;  // scale; those below 0 are signed bytes

    Found from(ptrdiff_t at) const {
        return {d + at, m ? m + at : m, scales ? scales + at * subs : scales, mins ? mins + at * subs : mins, subs, least};
    }
    int8_t* signed_scales() const { return reinterpret_cast<int8_t*>(scales); }
    float scale(ptrdiff_t i) const { return least < 0 ? signed_scales()[i] : scales[i]; }
};

template <class T, class To>
T* out(const Out<To>& to, const Call& call, int each = 1) {
    require(ptrdiff_t(to.shape(0)) == call.total && int(to.shape(1)) == each, "output: [units, parameters]");
    return reinterpret_cast<T*>(to.data());
}

uint16_t float16_bits(float a) {  // of a number that float16 holds
    uint32_t bits;
    std::memcpy(&bits, &a, sizeof bits);
    const float size = std::fabs(a);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (!(size < 65536.0f)) return 0x7E00;
    return sign | uint16_t(size < 0x1p-14f ? uint32_t(size * 0x1p24f) : (bits >> 13 & 0x3FFFF) - (112u << 10));
}

// Codes and blocks of units that were fitted; and what is lost.
Squares pack(const Encoders& use, const Call& call, const Weights& w, const Levels& levels, const Found& f,
             uint8_t* blocks) {
    const ptrdiff_t subs = f.subs, count = w.total * subs;
    std::vector<float> scale(count), offset(f.m ? count : 0);
    for (ptrdiff_t u = 0, i = 0; u < w.total; ++u)
        for (const ptrdiff_t end = i + subs; i < end; ++i) {
            scale[i] = f.d[u] * (f.scales ? f.scale(i) : 1.0f);
            if (f.m) offset[i] = f.mins ? -(f.m[u] * f.mins[i]) : f.m[u];
        }
    const Packer& packer = *call.packer;
    const Grid grid{scale.data(), f.m ? offset.data() : nullptr, nullptr, levels.count ? 0.0f : -levels.low, 1.0f, w.width,
                    int(subs)};
    const Levels codes_of = levels.count ? levels : Levels{0.0f, levels.high - levels.low, 0, nullptr, nullptr};
    const std::unique_ptr<uint8_t[]> codes(new uint8_t[w.total * w.width]), raw(new uint8_t[w.total * packer.raw]);
    const Squares lost =
        use.measured(grid, codes_of, packer.order.data(), w.w, w.importance, w.total, codes.get());
    uint8_t* to = raw.get();
    for (ptrdiff_t u = 0; u < w.total; ++u) {
        to = std::copy_n(codes.get() + u * w.width, w.width, to);
        for (const float* p : {f.d, f.m})
            if (p) {
                const uint16_t half = float16_bits(p[u]);
                *to++ = uint8_t(half), *to++ = uint8_t(half >> 8);
            }
        for (ptrdiff_t i = u * subs; f.scales && i < (u + 1) * subs; ++i) *to++ = uint8_t(f.scales[i] - int(f.least));
        if (f.mins) to = std::copy_n(f.mins + u * subs, subs, to);
    }
    use.join(packer.packing(), raw.get(), w.total, blocks);
    return lost;
}

// Calls fit(encoders, weights, found) for parts of the weights. Where these are packed: the squares of what is lost, and
// of the weights.
template <class Fit>
Lost search(const Call& call, const Levels& levels, const Found& found, Fit&& fit) {
    const Encoders& use = encoders_of(current());
    if (call.packer) {
        const int bytes = call.width + (found.m ? 4 : 2) + found.subs * (bool(found.scales) + bool(found.mins));
        require(call.packer->raw == bytes, "a packing of other parameters");
        require(call.width % (16 * found.subs) == 0, "sub-blocks of 16 n columns");
        require(levels.count == 0 || int(call.packer->order.size()) == levels.count + 1, "a code for each level");
    }
    std::vector<Squares> squares(call.parts());
    share(call.total, call.step(), call.threads, [&](ptrdiff_t a, ptrdiff_t b) {
        const size_t size = size_t(b - a) * call.width;
        const std::unique_ptr<float[]> w(new float[size]), known(call.weighted ? new float[size] : nullptr);
        use.widen(call.w, call.width, a, b, w.get());
        if (known) use.widen(call.importance, call.width, a, b, known.get());
        const Weights part{w.get(), known.get(), b - a, call.width, call.storage};
        const Found to = found.from(a);
        fit(use, part, to);
        if (call.packer)
            squares[a / call.step()] =
                pack(use, call, part, levels, to, call.blocks + a * call.packer->constant.size());
    });
    Lost sum{0, 0};  // in the same order for any number of threads
    for (const Squares& s : squares) sum.first += s.off, sum.second += s.whole;
    return sum;
}

Lost fit_scale(Any3 w, Maybe importance, int storage, int threads, Packs packer, Blocks blocks, float low,
               float high, Floats bounds, Floats rises, Floats parts, int kept, int rounds, bool positive,
               Out<float> scale) {
    const Call call(w, importance, storage, threads, packer, blocks);
    const Levels table = levels(low, high, bounds, rises);
    const Starts from = starts(parts, nullptr, kept, rounds, positive);
    return search(call, table, {out<float>(scale, call)}, [&](const Encoders& use, const Weights& part, const Found& to) {
        use.scale(part, table, from, to.d);
    });
}

Lost fit_zero(Any3 w, Maybe importance, int storage, int threads, float top, Floats parts, int kept, int rounds,
              Out<float> scale, Out<uint8_t> zero) {
    const Call call(w, importance, storage, threads, nullptr, {});
    require(top >= 1 && top <= 255, "top: 1 to 255");
    const Starts from = starts(parts, nullptr, kept, rounds);
    return search(call, {}, {out<float>(scale, call), nullptr, out<uint8_t>(zero, call)},
           [&](const Encoders& use, const Weights& part, const Found& to) {
               use.zero(part, top, from, to.d, to.scales);
           });
}

Lost fit_line(Any3 w, Maybe importance, int storage, int threads, Packs packer, Blocks blocks, float top,
              Floats parts, Floats drops, int kept, int rounds, Out<float> d, Out<float> m) {
    const Call call(w, importance, storage, threads, packer, blocks);
    require(top >= 1 && top <= 255, "top: 1 to 255");
    const Starts from = starts(parts, &drops, kept, rounds);
    return search(call, {0.0f, top, 0, nullptr, nullptr}, {out<float>(d, call), out<float>(m, call)},
           [&](const Encoders& use, const Weights& part, const Found& to) { use.line(part, top, from, to.d, to.m); });
}

Lost fit_scales(Any3 w, Maybe importance, int storage, int threads, Packs packer, Blocks blocks, float low,
                float high, Floats bounds, Floats rises, Floats parts, int kept, int rounds, int count, float least,
                float most, Floats steps, Matrix near, int descents, Out<float> d, Out<int8_t> scales) {
    const Call call(w, importance, storage, threads, packer, blocks);
    const Levels table = levels(low, high, bounds, rises);
    const Starts from = starts(parts, nullptr, kept, rounds);
    const Subs parts_of = subs(call, count, least, most, steps, 1, near, descents);
    require(most <= 127, "signed bytes");
    const int run = call.width / count;
    require(table.count || (call.width <= 256 && run % 2 == 0 && run * std::max(low * low, high * high) < 65536),
            "integers of 16 bits: up to 256 columns, sub-blocks of an even number");
    return search(call, table, {out<float>(d, call), nullptr, out<uint8_t>(scales, call, count), nullptr, count, least},
           [&](const Encoders& use, const Weights& part, const Found& to) {
               use.scales(part, table, from, parts_of, to.d, to.signed_scales());
           });
}

Lost fit_lines(Any3 w, Maybe importance, int storage, int threads, Packs packer, Blocks blocks, float top,
               Floats parts, Floats drops, int kept, int rounds, int count, float most, Floats steps, int minima,
               Matrix near, int descents, Out<float> d, Out<float> dmin, Out<uint8_t> scales, Out<uint8_t> mins) {
    const Call call(w, importance, storage, threads, packer, blocks);
    require(top >= 1 && top <= 255, "top: 1 to 255");
    const Starts from = starts(parts, &drops, kept, rounds);
    const Subs parts_of = subs(call, count, 0, most, steps, minima, near, descents);
    return search(call, {0.0f, top, 0, nullptr, nullptr},
           {out<float>(d, call), out<float>(dmin, call), out<uint8_t>(scales, call, count),
            out<uint8_t>(mins, call, count), count},
           [&](const Encoders& use, const Weights& part, const Found& to) {
               use.lines(part, top, from, parts_of, to.d, to.m, to.scales, to.mins);
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
    share(ptrdiff_t(w.shape(0)), step_of(known.width), threads,
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
    share(ptrdiff_t(codes.shape(0)), step_of(known.width), threads,
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
    share(count, step_of(parts * run), threads,
          [&](ptrdiff_t a, ptrdiff_t b) { use.planes(from, bits, parts, run, a, b, to); });
}

void unplanes(Packed packed, int threads, int bits, int parts, int run, Array<uint8_t, 1> codes) {
    const ptrdiff_t count = runs(threads, bits, parts, run, packed.shape(0), codes.shape(0));
    const uint8_t* from = packed.data();
    uint8_t* to = codes.data();
    const Encoders& use = encoders_of(current());
    share(count, step_of(parts * run), threads,
          [&](ptrdiff_t a, ptrdiff_t b) { use.unplanes(from, bits, parts, run, a, b, to); });
}

// How many of the bits patterns in x are NaN or infinite: their exponents have only ones.
template <class T>
size_t nonfinite_of(const T* x, size_t count, T exponent) {
    size_t found = 0;
    for (size_t at = 0; at < count; at += 1 << 12) {
        T some = 0;
        for (size_t i = at, end = std::min(count, at + (1 << 12)); i < end; ++i) some += (x[i] & exponent) == exponent;
        found += some;
    }
    return found;
}

size_t nonfinite(nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu> x, int threads) {
    check_threads(threads);
    const Storage type = storage_of(x.dtype());
    const void* data = x.data();
    const ptrdiff_t count = ptrdiff_t(x.shape(0));
    std::atomic<size_t> found{0};
    share(count, 1 << 20, threads, [&](ptrdiff_t a, ptrdiff_t b) {
        const uint16_t* half = static_cast<const uint16_t*>(data) + a;
        found += type == Storage::float32
                     ? nonfinite_of(static_cast<const uint32_t*>(data) + a, size_t(b - a), 0x7F800000u)
                     : nonfinite_of(half, size_t(b - a), uint16_t(type == Storage::float16 ? 0x7C00 : 0x7F80));
    });
    return found;
}

}  // namespace

// Arrays are not converted: an output would be a copy.
template <class A>
constexpr bool optional = std::is_same_v<A, Maybe> || std::is_same_v<A, std::optional<Matrix>> ||
                          std::is_same_v<A, Blocks> || std::is_same_v<A, Packs>;

template <class A>
auto how() {
    if constexpr (std::is_arithmetic_v<A>) return nb::arg();
    else if constexpr (optional<A>) return nb::arg().noconvert().none();
    else return nb::arg().noconvert();
}

template <class R, class... A>
void define(nb::module_& m, const char* name, R (*function)(A...)) {
    m.def(name, function, how<A>()...);
}

void bind_encoders(nb::module_& m) {
    nb::class_<Packer>(m, "Packer").def(
        nb::init<const Array<const int32_t, 2>&, const Array<const uint8_t, 1>&, int, const Array<const uint8_t, 1>&>(),
        array("terms"), array("constant"), nb::arg("raw"), array("order"));
    define(m, "fit_scale", fit_scale);
    define(m, "fit_zero", fit_zero);
    define(m, "fit_line", fit_line);
    define(m, "fit_scales", fit_scales);
    define(m, "fit_lines", fit_lines);
    define(m, "codes", codes);
    define(m, "values", values);
    define(m, "nonfinite", nonfinite);
    define(m, "planes", planes);
    define(m, "unplanes", unplanes);
}

}  // namespace fewbits
