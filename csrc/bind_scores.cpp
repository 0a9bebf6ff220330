#include "bind.h"
#include "pool.h"
#include "scores.h"

namespace fewbits {
namespace {

using Logits = Array<const float, 2>;
using Sums = Array<const double, 1>;

void log_sums(Logits x, Array<double, 1> sums, Array<int64_t, 1> tops, int threads) {
    check_threads(threads);
    require(x.shape(0) == sums.shape(0) && x.shape(0) == tops.shape(0) && x.shape(1) > 0, "a sum and a top of every row");
    nb::gil_scoped_release release;
    parallel(threads, (long)x.shape(0), [&](long i) {
        long top;
        sums.data()[i] = scores_of(current()).log_sum(x.data() + i * x.shape(1), (long)x.shape(1), &top);
        tops.data()[i] = top;
    });
}

void divergences(Logits p, Sums p_sums, Logits q, Sums q_sums, Array<double, 1> out, int threads) {
    check_threads(threads);
    require(p.shape(0) == q.shape(0) && p.shape(1) == q.shape(1), "logits of the same shape");
    require(p.shape(0) == p_sums.shape(0) && p.shape(0) == q_sums.shape(0) && p.shape(0) == out.shape(0),
            "sums and a result of every row");
    nb::gil_scoped_release release;
    parallel(threads, (long)p.shape(0), [&](long i) {
        const long width = (long)p.shape(1);
        out.data()[i] = scores_of(current()).divergence(p.data() + i * width, p_sums.data()[i], q.data() + i * width,
                                                        q_sums.data()[i], width);
    });
}

}  // namespace

void bind_scores(nb::module_& m) {
    m.def("log_sums", log_sums, array("x"), array("sums"), array("tops"), nb::arg("threads"));
    m.def("divergences", divergences, array("p"), array("p_sums"), array("q"), array("q_sums"), array("out"),
          nb::arg("threads"));
}

}  // namespace fewbits
