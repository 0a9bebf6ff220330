// How a type's blocks lie, and weights made of them.
#include "bind.h"
#include "memory.h"
#include "prepare.h"

#include <nanobind/stl/tuple.h>

#include <algorithm>

namespace fewbits {
namespace {

constexpr long MOST = 1L << 40;  // of any count: products of two still fit

// first, count, at, bits, run, each, shift, to, digits, swapped
using Field = std::tuple<int, int, int, int, int, int, int, int, bool, bool>;

Values values(const std::vector<Field>& fields, int minus) {
    Values found{{}, minus};
    for (const Field& f : fields)
        std::apply([&](auto... number) { found.bits.push_back(Bits{number...}); }, f);
    return found;
}

using Index = std::optional<Array<const int64_t, 1>>;
using Plane = std::optional<Array<uint8_t, 1>>;

// Rows of several arrays, one after the other.
struct Rows {
    std::vector<const uint8_t*> begins;
    std::vector<long> ends;  // rows of this array and of those before it
    long stride;             // from a row to the next one
    const int64_t* index;    // null: as they lie

    const uint8_t* at(long row) const {
        const long r = index ? index[row] : row;
        const size_t i = std::upper_bound(ends.begin(), ends.end(), r) - ends.begin();
        return begins[i] + (r - (i ? ends[i - 1] : 0)) * stride;
    }
};

Rows rows_of(const std::vector<Bytes>& data, const Index& index, long row_bytes, long rows) {
    Rows found{{}, {}, row_bytes, index ? index->data() : nullptr};
    long total = 0;
    for (const Bytes& part : data) {
        require(part.nbytes() % row_bytes == 0, std::to_string(part.nbytes()) + " bytes are no rows of " +
                                                    std::to_string(row_bytes));
        total += (long)part.nbytes() / row_bytes;
        found.begins.push_back(part.data()), found.ends.push_back(total);
    }
    require((index ? (long)index->shape(0) : total) == rows, "not as many rows as the weight has");
    for (long r = 0; index && r < rows; ++r)
        require(0 <= found.index[r] && found.index[r] < total,
                "row " + std::to_string(found.index[r]) + " of " + std::to_string(total));
    return found;
}

// Rows that lie in each other, blocks of all of them one after the other.
Rows columns_of(const std::vector<Bytes>& data, const Index& index, const Unpacking& u, long stride, long rows,
                long blocks) {
    int reach = 0;
    for (int word : u.words) reach = std::max(reach, word + 4);
    require(data.size() == 1 && !index, "one array, without an index");
    require(0 < stride && rows > 0 && rows <= (long)data[0].nbytes() / stride &&
                (rows - 1) * stride + (blocks - 1) * u.layout.bytes + reach <= (long)data[0].nbytes(),
            "rows lie beyond the array");
    return {{data[0].data()}, {rows}, stride, nullptr};
}

uint8_t* plane(const Plane& array, long bytes, bool needed, const char* name) {
    require(array.has_value() == needed, std::string(name) + (needed ? " are missing" : " have no use here"));
    if (!needed) return nullptr;
    require((long)array->nbytes() == bytes, std::string(name) + " have " + std::to_string(array->nbytes()) +
                                                 " bytes, not " + std::to_string(bytes));
    return array->data();
}

void prepare_planes(const Unpacking& u, const std::vector<Bytes>& data, const Index& index, long rows, long columns,
                    const Plane& codes, const Plane& scales, const Plane& mins, const Plane& subscales,
                    const Plane& submins, int threads, std::optional<long> stride) {
    const BlockLayout& l = u.layout;
    check_threads(threads);
    require(0 <= rows && rows < MOST && 0 < columns && columns < MOST, "rows or columns out of range");
    require(columns % l.columns == 0,
            std::to_string(columns) + " columns are no blocks of " + std::to_string(l.columns));
    const long blocks = columns / l.columns, entries = (rows + TILE - 1) / TILE * TILE * blocks;
    const Planes planes{plane(codes, entries * l.columns / 8 * l.bits, true, "codes"),
                        plane(scales, entries * l.scale_bytes, l.scale_bytes > 0, "scales"),
                        plane(mins, entries * l.scale_bytes, l.min_at >= 0, "mins"),
                        plane(subscales, entries * 4 * (long)u.subscales.size(), !u.subscales.empty(), "subscales"),
                        plane(submins, entries * 4 * (long)u.submins.size(), !u.submins.empty(), "submins")};
    const Rows from = stride ? columns_of(data, index, u, *stride, rows, blocks)
                             : rows_of(data, index, blocks * l.bytes, rows);
    nb::gil_scoped_release release;
    prepare(u, [](const void* context, long r) { return static_cast<const Rows*>(context)->at(r); }, &from, rows,
            blocks, planes, threads);
}

std::unique_ptr<Ready> waiting;  // memory that somebody will want

void expect(long bytes) {
    require(0 < bytes && bytes < MOST, "a number of bytes");
    waiting = Ready::make(bytes);
}

std::optional<nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>> expected() {
    Ready* ready = waiting.release();
    if (!ready) return std::nullopt;
    nb::capsule owner(ready, [](void* at) noexcept { delete static_cast<Ready*>(at); });
    return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(ready->at, {(size_t)ready->bytes}, owner);
}

}  // namespace

void bind_prepare(nb::module_& m) {
    nb::class_<Unpacking>(m, "Blocks")
        .def("__init__", [](Unpacking* self, int bytes, int columns, int bits, int scale_bytes, int scale_at,
                            int min_at, const std::vector<Field>& codes, int codes_minus,
                            const std::vector<Field>& subscales, int subscales_minus,
                            const std::vector<Field>& submins) {
            new (self) Unpacking(BlockLayout{bytes, columns, bits, scale_bytes, scale_at, min_at,
                                             values(codes, codes_minus), values(subscales, subscales_minus),
                                             values(submins, 0)});
        }, nb::kw_only(), nb::arg("bytes"), nb::arg("columns"), nb::arg("bits"), nb::arg("scale_bytes"),
           nb::arg("scale_at"), nb::arg("min_at"), nb::arg("codes"), nb::arg("codes_minus"), nb::arg("subscales"),
           nb::arg("subscales_minus"), nb::arg("submins"));
    m.def("prepare", prepare_planes, nb::arg("blocks"), array("data"), array("index").none(), nb::arg("rows"),
          nb::arg("columns"), array("codes"), array("scales").none(), array("mins").none(), array("subscales").none(),
          array("submins").none(), nb::arg("threads"), nb::arg("stride") = nb::none());
    m.def("expect", expect, nb::arg("bytes"));
    m.def("expected", expected);
}

}  // namespace fewbits
