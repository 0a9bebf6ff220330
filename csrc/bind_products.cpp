#include "bind.h"

#include <algorithm>

#include "layout.h"
#include "memory.h"
#include "product.h"
#include "products.h"

namespace fewbits {
namespace {

constexpr long MOST = 1L << 40;  // of any count: products of two still fit

template <class Kind>
Kind named(const std::vector<const char*>& names, const std::string& name, const char* what) {
    for (size_t i = 0; i < names.size(); ++i)
        if (name == names[i]) return (Kind)i;
    throw nb::value_error((std::string("no ") + what + " is called " + name).c_str());
}

const std::vector<const char*> SCALES{"f16", "bf16", "f32", "e8m0"};
const std::vector<const char*> SCALINGS{"plain", "minimum", "zeros", "small", "lines", "nibbles"};
constexpr long SCALE_BYTES[] = {2, 2, 4, 1};

const uint8_t* plane(const std::optional<Bytes>& array, long bytes, bool needed, const char* name) {
    require(array.has_value() == needed, std::string(name) + (needed ? " are missing" : " have no use here"));
    if (!needed) return nullptr;
    require((long)array->nbytes() == bytes, std::string(name) + " have " + std::to_string(array->nbytes()) +
                                                 " bytes, not " + std::to_string(bytes));
    return array->data();
}

Held hold(long rows, long columns, int bits, int zero, int sub, int group, float factor,
          const std::string& scaling, const std::string& scale, const std::vector<float>& values,
          const std::vector<int>& levels, Bytes codes, Bytes scales, std::optional<Bytes> mins,
          std::optional<Bytes> subscales, std::optional<Bytes> submins, std::optional<Array<const int32_t, 1>> order,
          bool fine) {
    require(0 <= rows && rows < MOST && 0 < columns && columns < MOST, "rows or columns out of range");
    require(sub == 16 || sub == 32, "sub-blocks have 16 or 32 columns");
    require(0 < group && group < MOST && 0 <= zero && zero < 256, "group or zero out of range");
    Weight w{};
    w.rows = rows, w.columns = columns, w.bits = bits, w.zero = zero, w.sub = sub, w.group = group, w.factor = factor;
    w.tiles = (rows + TILE - 1) / TILE, w.blocks = (columns + BLOCK - 1) / BLOCK;
    w.groups = (w.blocks + group - 1) / group;
    w.scaling = named<Scaling>(SCALINGS, scaling, "scaling"), w.scale = named<Scale>(SCALES, scale, "scale");
    w.table = !levels.empty();
    require(levels.size() == values.size() && levels.size() <= 16, "a table has at most 16 levels, each with a value");
    if (w.table) {
        require((long)levels.size() == 1L << std::min(bits, 5), "a table has a level for every code");
        for (size_t i = 0; i < levels.size(); ++i) {
            require(0 <= levels[i] && levels[i] < 256, "levels are bytes");
            w.levels[i] = (uint8_t)levels[i], w.values[i] = values[i];
        }
    }
    require(products_of(Set::portable).knows(w), "no kernel for these codes and scales");
    require(!w.offsets() || zero == 0, "a zero point beside offsets");
    const bool lines = w.scaling == Scaling::lines, nibbles = w.scaling == Scaling::nibbles;
    const long entries = w.tiles * w.groups * TILE, subs = w.tiles * w.subs() * TILE;
    const long scale_bytes = entries * SCALE_BYTES[(int)w.scale];
    w.codes = plane(codes, w.tiles * w.blocks * 64 * bits, true, "codes");
    w.scales = plane(scales, scale_bytes, true, "scales");
    w.mins = plane(mins, w.scaling == Scaling::zeros ? entries : scale_bytes, w.offsets(), "mins");
    w.subscales = plane(subscales, subs, w.scaling == Scaling::small || lines || nibbles, "subscales");
    w.submins = plane(submins, subs, lines, "submins");
    require(!order || (long)order->shape(0) == columns, "an order of as many columns");
    for (long c = 0; order && c < columns; ++c)
        require(0 <= order->data()[c] && order->data()[c] < columns,
                "column " + std::to_string(order->data()[c]) + " of " + std::to_string(columns));
    w.order = order ? order->data() : nullptr, w.fine = fine;
    return {w, codes, scales, mins, subscales, submins, order};
}

void check_ids(const Array<const int64_t, 1>& ids, long limit) {
    for (size_t i = 0; i < ids.shape(0); ++i)
        require(0 <= ids.data()[i] && ids.data()[i] < limit,
                "index " + std::to_string(ids.data()[i]) + " is not in 0 … " + std::to_string(limit - 1));
}

void check_columns(long activations, const Weight& w) {
    require(activations == w.columns, "activations have " + std::to_string(activations) + " columns, the weight " +
                                          std::to_string(w.columns));
    require(!w.order && !w.fine, "orders of columns, and fine rounding, are for plans of decoders");
}

using Out = Array<float, 2>;

void multiply(const std::vector<const Held*>& weights, const Rounded& x, const std::vector<Out>& outs,
              const std::vector<std::optional<Array<const float, 1>>>& biases, int threads) {
    check_threads(threads);
    require(weights.size() == outs.size() && weights.size() == biases.size(), "a result and a bias for every weight");
    std::vector<Term> terms;
    for (size_t i = 0; i < weights.size(); ++i) {
        const Weight& w = weights[i]->weight;
        const auto& bias = biases[i];
        check_columns(x.get().columns, w);
        require((long)outs[i].shape(0) == x.get().rows && (long)outs[i].shape(1) == w.rows, "the result's shape");
        require(!bias || (long)bias->shape(0) == w.rows, "the bias's shape");
        terms.push_back({&w, outs[i].data(), bias ? bias->data() : nullptr});
    }
    nb::gil_scoped_release release;
    product(terms, x, threads);
}

void multiply_grouped(const std::vector<const Held*>& weights, const std::vector<long>& counts,
                      Array<const float, 2> x, Out out, int threads) {
    check_threads(threads);
    require(weights.size() == counts.size(), "a count of rows for every weight");
    std::vector<Share> shares;
    long first = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
        const Weight& w = weights[i]->weight;
        check_columns((long)x.shape(1), w);
        require(w.rows == (long)out.shape(1), "the result's shape");
        require(0 <= counts[i] && counts[i] <= (long)x.shape(0) - first, "more rows than there are activations");
        if (counts[i]) shares.push_back({&w, first, counts[i]});
        first += counts[i];
    }
    require(first == (long)x.shape(0) && x.shape(0) == out.shape(0), "a weight for every row, and a row of the result");
    nb::gil_scoped_release release;
    grouped(shares, x.data(), out.data(), threads);
}

FloatWeight floats(const Bytes& values, const std::string& kind, long rows, long columns) {
    const Scale scale = named<Scale>(SCALES, kind, "scale");
    require(scale != Scale::e8m0, "weights are f16, bf16 or f32");
    require(0 <= rows && rows < MOST && 0 <= columns && columns < MOST, "rows or columns out of range");
    require((long)values.nbytes() == rows * columns * SCALE_BYTES[(int)scale],
            "the weight has " + std::to_string(values.nbytes()) + " bytes, not those of " + std::to_string(rows) +
                " x " + std::to_string(columns));
    return {rows, columns, scale, values.data()};
}

void multiply_floats(Bytes values, const std::string& kind, Array<const float, 2> x, Out out,
                     std::optional<Array<const float, 1>> bias, int threads) {
    check_threads(threads);
    const FloatWeight w = floats(values, kind, (long)out.shape(1), (long)x.shape(1));
    require(x.shape(0) == out.shape(0), "the result's shape");
    require(!bias || (long)bias->shape(0) == w.rows, "the bias's shape");
    nb::gil_scoped_release release;
    product(w, x.data(), (long)x.shape(0), out.data(), bias ? bias->data() : nullptr, threads);
}

void check_records(const Array<const uint8_t, 2>& codes, int bits, size_t records) {
    require((1 <= bits && bits <= 6) || bits == 8, "codes have 1 to 6, or 8 bits");
    const size_t tiles = (codes.shape(0) + TILE - 1) / TILE, blocks = (codes.shape(1) + BLOCK - 1) / BLOCK;
    require(records == tiles * blocks * 64 * bits, "the records' size");
}

}  // namespace

void bind_products(nb::module_& m) {
    nb::class_<Held>(m, "Weight")
        .def("__init__", [](Held* self, long rows, long columns, int bits, int zero, int sub, int group,
                            float factor, const std::string& scaling, const std::string& scale,
                            const std::vector<float>& values, const std::vector<int>& levels, Bytes codes,
                            Bytes scales, std::optional<Bytes> mins, std::optional<Bytes> subscales,
                            std::optional<Bytes> submins, std::optional<Array<const int32_t, 1>> order, bool fine) {
            new (self) Held(hold(rows, columns, bits, zero, sub, group, factor, scaling, scale, values, levels, codes,
                                 scales, mins, subscales, submins, order, fine));
        }, nb::kw_only(), nb::arg("rows"), nb::arg("columns"), nb::arg("bits"), nb::arg("zero"), nb::arg("sub"),
           nb::arg("group"), nb::arg("factor"), nb::arg("scaling"), nb::arg("scale"), nb::arg("values"),
           nb::arg("levels"), array("codes"), array("scales"), array("mins").none(), array("subscales").none(),
           array("submins").none(), array("order").none() = nb::none(), nb::arg("fine") = false)
        .def("rows", [](const Held& w, Array<const int64_t, 1> ids, Out out, int threads) {
            check_threads(threads);
            check_ids(ids, w.weight.rows);
            require(out.shape(0) == ids.shape(0) && (long)out.shape(1) == w.weight.columns, "the result's shape");
            nb::gil_scoped_release release;
            rows(w.weight, ids.data(), (long)ids.shape(0), out.data(), threads);
        }, array("ids"), array("out"), nb::arg("threads"))
        .def("columns", [](const Held& w, Array<const int64_t, 1> ids, Out out, int threads) {
            check_threads(threads);
            check_ids(ids, w.weight.columns);
            require(out.shape(0) == ids.shape(0) && (long)out.shape(1) == w.weight.rows, "the result's shape");
            nb::gil_scoped_release release;
            columns(w.weight, ids.data(), (long)ids.shape(0), out.data(), threads);
        }, array("ids"), array("out"), nb::arg("threads"))
        .def("turned", [](const Held& w, long first, Out out, int threads) {
            check_threads(threads);
            const long tiles = (long)out.shape(1) / TILE;
            require(out.shape(1) % TILE == 0 && (long)out.shape(0) == w.weight.columns, "the result's shape");
            require(0 <= first && first <= w.weight.tiles - tiles, "tiles beyond the last");
            nb::gil_scoped_release release;
            turned(w.weight, first, tiles, out.data(), threads);
        }, nb::arg("first"), array("out"), nb::arg("threads"));
    nb::class_<HeldFloats>(m, "Floats")
        .def("__init__", [](HeldFloats* self, Bytes values, const std::string& kind, long rows, long columns) {
            new (self) HeldFloats{floats(values, kind, rows, columns), values};
        }, array("values"), nb::arg("kind"), nb::arg("rows"), nb::arg("columns"));
    nb::class_<Rounded>(m, "Rounded")
        .def("__init__", [](Rounded* self, Array<const float, 2> x, int threads) {
            check_threads(threads);
            nb::gil_scoped_release release;
            new (self) Rounded(x.data(), (long)x.shape(0), (long)x.shape(1), threads);
        }, array("x"), nb::arg("threads"));
    m.def("multiply", multiply, nb::arg("weights"), nb::arg("x"), array("outs"), array("biases"),
          nb::arg("threads"));
    m.def("grouped", multiply_grouped, nb::arg("weights"), nb::arg("counts"), array("x"), array("out"),
          nb::arg("threads"));
    m.def("multiply_floats", multiply_floats, array("values"), nb::arg("kind"), array("x"), array("out"),
          array("bias").none(), nb::arg("threads"));
    m.def("interleave", [](Array<const uint8_t, 2> codes, int bits, Array<uint8_t, 1> records) {
        check_records(codes, bits, records.shape(0));
        nb::gil_scoped_release release;
        interleave(codes.data(), (long)codes.shape(0), (long)codes.shape(1), bits, records.data());
    }, array("codes"), nb::arg("bits"), array("records"));
    m.def("deinterleave", [](Array<const uint8_t, 1> records, int bits, Array<uint8_t, 2> codes) {
        check_records(Array<const uint8_t, 2>(codes), bits, records.shape(0));
        nb::gil_scoped_release release;
        deinterleave(records.data(), (long)codes.shape(0), (long)codes.shape(1), bits, codes.data());
    }, array("records"), nb::arg("bits"), array("codes"));
    m.def("advise", [](Array<uint8_t, 1> buffer) { advise(buffer.data(), (long)buffer.shape(0)); }, array("buffer"));
}

}  // namespace fewbits
