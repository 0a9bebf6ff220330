// What the files that bind functions to Python share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

#include "floats.h"
#include "pool.h"
#include "weight.h"

namespace nb = nanobind;

namespace fewbits {

// An array in the machine's memory, rows one after the other; read-only ones are taken too where T is const.
template <class T, int DIMENSIONS>
using Array = nb::ndarray<T, nb::ndim<DIMENSIONS>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;

// An argument that holds arrays: never a converted copy of them, into which results would vanish.
inline auto array(const char* name) { return nb::arg(name).noconvert(); }

inline void require(bool right, const std::string& message) {
    if (!right) throw nb::value_error(message.c_str());
}

inline void check_threads(int threads) {
    require(1 <= threads && threads <= MOST_THREADS,
            std::to_string(threads) + " threads: 1 to " + std::to_string(MOST_THREADS));
}

// A weight and the arrays that it points into.
struct Held {
    Weight weight;
    Bytes codes, scales;
    std::optional<Bytes> mins, subscales, submins;
    std::optional<Array<const int32_t, 1>> order;
};
struct HeldFloats {
    FloatWeight weight;
    Bytes values;
};

void bind_columns(nb::module_& m);
void bind_products(nb::module_& m);
void bind_prepare(nb::module_& m);
void bind_encoders(nb::module_& m);
void bind_decoder(nb::module_& m);
void bind_text(nb::module_& m);
void bind_scores(nb::module_& m);

}  // namespace fewbits
