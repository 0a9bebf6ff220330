// fewbits._native: what Python sees. Arguments are checked here, before any work.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu.h"
#include "encode_bind.h"
#include "pool.h"

namespace nb = nanobind;
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
    m.def("use", [](const std::string& name) {
        if (!use(name)) throw nb::value_error(("no usable set of kernels is called " + name).c_str());
    });
    bind_encoders(m);
}
