// Checks the arrays of a sweep, then shares its rows out between threads.
#include "bind.h"

#include <nanobind/stl/optional.h>

#include "columns.h"
#include "pool.h"

using namespace fewbits;

namespace {

using Matrix = Array<const float, 2>;
using Row = Array<const float, 1>;

template <class T>
void check(const Array<T, 2>& a, const char* name, long rows, long columns) {
    require(long(a.shape(0)) == rows && long(a.shape(1)) == columns,
            std::string(name) + ": not " + std::to_string(rows) + " x " + std::to_string(columns));
}

void check(const std::optional<Matrix>& a, const char* name, long rows, long columns) {
    if (a) check(*a, name, rows, columns);
}

void sweep(Matrix x, std::optional<Matrix> old, Matrix mix, Array<const int64_t, 1> position, Matrix scale,
           Matrix inverse, std::optional<Matrix> shift, std::optional<Matrix> base, float low, float high,
           std::optional<Row> table, std::optional<Row> bounds, Array<float, 2> values, Array<float, 2> errors,
           int threads) {
    const long n = x.shape(0), rows = x.shape(1), groups = scale.shape(0);
    check_threads(threads);
    check(mix, "mix", n, n);
    check(values, "values", n, rows);
    check(errors, "errors", n, rows);
    check(old, "old", n, rows);
    require(groups > 0 && n % groups == 0, "scale: as many rows as divide the columns");
    check(scale, "scale", groups, rows);
    check(inverse, "inverse", groups, rows);
    check(shift, "shift", groups, rows);
    check(base, "base", groups, rows);
    require(bool(shift) == bool(base) && bool(table) == bool(bounds) && bool(shift) != bool(table),
            "either shift and base, or table and bounds");
    require(!table || (table->shape(0) >= 1 && bounds->shape(0) + 1 == table->shape(0)), "bounds: one less than levels");
    require(long(position.shape(0)) == n, "position: one for each column");
    for (long j = 0; j < n; ++j) require(position.data()[j] >= 0 && position.data()[j] < n, "position: not a column");
    const Sweep job{n, rows, x.data(), old ? old->data() : nullptr, mix.data(),
                    position.data(),
                    {scale.data(), inverse.data(), shift ? shift->data() : nullptr, base ? base->data() : nullptr, low,
                     high, table ? table->data() : nullptr, bounds ? bounds->data() : nullptr,
                     table ? int(table->shape(0)) : 0, n / groups},
                    values.data(), errors.data()};
    nb::gil_scoped_release free;
    const Sweeps& table_of_set = sweeps_of(current());
    parallel(threads, (rows + table_of_set.rows - 1) / table_of_set.rows,
             [&](long strip) { table_of_set.sweep(job, strip); });
}

}  // namespace

void fewbits::bind_columns(nb::module_& m) {
    // an array of another type would be converted into one that nobody sees
    auto array = [](const char* name) { return nb::arg(name).noconvert(); };
    m.def("sweep", &sweep, nb::kw_only(), array("x"), array("old").none(), array("mix"), array("position"),
          array("scale"), array("inverse"), array("shift").none(), array("base").none(), nb::arg("low"),
          nb::arg("high"), array("table").none(), array("bounds").none(), array("values"), array("errors"),
          nb::arg("threads"));
}
