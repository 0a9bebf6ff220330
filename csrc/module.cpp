// fewbits._native: what Python sees. Arguments are checked in the files that bind them, before any work.
#include "bind.h"

#include <nanobind/stl/pair.h>

#include "cpu.h"
#include "probes.h"

using namespace fewbits;

NB_MODULE(_native, m) {
    m.attr("MOST_THREADS") = MOST_THREADS;
    m.def("features", [] {
        std::vector<std::pair<std::string, bool>> found;
        for (const Feature& f : features()) found.emplace_back(f.name, f.here);
        return found;
    });
    m.def("usable", [] {
        std::vector<std::string> names;
        for (Set set : usable()) names.emplace_back(name_of(set));
        return names;
    });
    m.def("current", [] { return std::string(name_of(current())); });
    m.def("use", [](const std::string& name) { require(use(name), "no usable set of kernels is called " + name); });
    bind_columns(m);
    m.attr("PROBE_OPERATIONS") = OPERATIONS;
    m.def("probe_read", [](Array<const uint8_t, 1> from, int threads) {
        check_threads(threads);
        const long step = 1 << 20, count = (long)from.shape(0) / step;
        const uint8_t* first = from.data();
        nb::gil_scoped_release release;
        parallel(threads, count, [&](long i) { probes_of(current()).read(first + i * step, step); });
    }, array("buffer"), nb::arg("threads"));
    m.def("probe_dots", [](long rounds, int threads) {
        check_threads(threads);
        nb::gil_scoped_release release;
        parallel(threads, threads, [&](long) { probes_of(current()).dots(rounds); });
    }, nb::arg("rounds"), nb::arg("threads"));
    bind_products(m);
    bind_prepare(m);
    bind_encoders(m);
    bind_decoder(m);
    bind_text(m);
    bind_scores(m);
}
