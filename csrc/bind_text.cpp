// Tokenizers: arrays are checked once, and live as long as what was made of them.
#include "bind.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string_view.h>

#include "bpe.h"

using namespace fewbits;

namespace {

using Starts = Array<const int64_t, 1>;

Texts checked(const Bytes& data, const Starts& starts, const char* name) {
    const long count = long(starts.shape(0)) - 1;
    require(count >= 0 && count < (1L << 31), std::string(name) + ": no list of texts");
    const int64_t* s = starts.data();
    bool right = s[0] >= 0 && s[count] - 8 <= int64_t(data.size());
    for (long i = 0; i < count; ++i) right = right && s[i] + 8 <= s[i + 1];
    require(right, std::string(name) + ": texts outside of their buffer");
    return {(const char*)data.data(), s, count};
}

struct HeldBpe {
    Bytes data;
    Starts starts;
    Array<const uint8_t, 1> kinds;
    std::optional<Bytes> merge_data;
    std::optional<Starts> merge_starts;
    std::optional<Array<const float, 1>> scores;
    Bpe bpe;
};

void make(HeldBpe* at, Bytes data, Starts starts, Array<const uint8_t, 1> kinds, std::optional<Bytes> merge_data,
          std::optional<Starts> merge_starts, std::optional<Array<const float, 1>> scores, bool byte_fallback,
          bool whole_words, int32_t unknown) {
    const Texts tokens = checked(data, starts, "tokens");
    require(long(kinds.shape(0)) == tokens.count, "kinds: one for each token");
    require(bool(merge_data) == bool(merge_starts) && bool(merge_data) != bool(scores), "either merges or scores");
    require(!scores || long(scores->shape(0)) == tokens.count, "scores: one for each token");
    require(-1 <= unknown && unknown < tokens.count, "unknown: no token");
    const Texts merges = merge_data ? checked(*merge_data, *merge_starts, "merges") : Texts{nullptr, nullptr, 0};
    new (at) HeldBpe{data, starts, kinds, merge_data, merge_starts, scores,
                     Bpe(tokens, kinds.data(), merge_data ? &merges : nullptr, scores ? scores->data() : nullptr,
                         byte_fallback, whole_words, unknown)};
}

}  // namespace

void fewbits::bind_text(nb::module_& m) {
    nb::class_<HeldBpe>(m, "Bpe")
        .def("__init__", make, nb::kw_only(), array("data"), array("starts"), array("kinds"),
             nb::arg("merge_data").noconvert().none(), nb::arg("merge_starts").noconvert().none(),
             nb::arg("scores").noconvert().none(), nb::arg("byte_fallback"), nb::arg("whole_words"), nb::arg("unknown"))
        .def_prop_ro("repeated", [](const HeldBpe& h) { return h.bpe.tokens.repeated; })
        .def("find", [](const HeldBpe& h, std::string_view text) { return h.bpe.tokens.find(text); }, nb::arg("text"))
        .def("split", [](const HeldBpe& h, std::string_view text) {
            std::vector<std::pair<int32_t, std::string>> found;
            for (const Bpe::Part& part : h.bpe.split(text)) found.emplace_back(part.token, std::string(part.text));
            return found;
        }, nb::arg("text"))
        .def("encode", [](const HeldBpe& h, const std::vector<std::string>& words) {
            std::vector<int32_t> tokens;
            {
                nb::gil_scoped_release release;
                for (const std::string& word : words) h.bpe.encode(word, tokens);
            }
            return tokens;
        }, nb::arg("words"));
}
