// fewbits._native: what Python sees. Arguments are checked in the files that bind them, before any work.
#include "bind.h"

#include <nanobind/stl/pair.h>

#include "cpu.h"

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
    bind_products(m);
    bind_encoders(m);
}
