// Products that take columns in another order, and those that round twice: with other weights in the same call.
#include <algorithm>
#include <memory>

#include "random_weight.h"
#include "rounding.h"

namespace fewbits {
namespace {

constexpr double ONCE = 5e-4, TWICE = 1e-8;  // normalised squared errors; measured: 5e-5, 4e-10

struct Asked {
    bool ordered, fine;
};

void test(long rows, long columns, long count, int threads, const std::string& set) {
    const Asked asked[] = {{true, false}, {false, false}, {true, true}, {false, true}, {true, false}};
    Random random(count);
    const Buffer<float> x = normals(random, count * columns), bias = normals(random, rows);
    for (long i = 0; i < count; ++i) x[i * columns] *= 100;  // its neighbours suffer
    std::vector<int32_t> order(columns);
    for (long c = 0; c < columns; ++c) order[c] = (int32_t)c;
    for (long c = columns - 1; c > 0; --c) std::swap(order[c], order[random.below((int)c + 1)]);
    const std::vector<int32_t> same = order;  // elsewhere
    std::vector<std::unique_ptr<RandomWeight>> weights;
    std::vector<Buffer<float>> outs;
    std::vector<Term> terms;
    for (const Asked& a : asked) {
        weights.push_back(std::make_unique<RandomWeight>(Kind{8, false, Scaling::plain, 32}, Scale::f32, rows, columns,
                                                         (int)(columns + 31) / 32, weights.size()));
        Weight& w = weights.back()->weight;
        w.order = !a.ordered ? nullptr : weights.size() == 1 ? order.data() : same.data();
        w.fine = a.fine;
        outs.emplace_back(count * rows);
        terms.push_back({&w, outs.back().fill(7).data(), weights.size() % 2 ? bias.data() : nullptr});
    }
    multiply(terms, x.data(), count, threads);
    for (size_t k = 0; k < terms.size(); ++k) {
        Error error;
        for (long i = 0; i < count; ++i)
            for (long r = 0; r < rows; ++r) {
                double want = terms[k].bias ? bias[r] : 0;
                for (long c = 0; c < columns; ++c)
                    want += weights[k]->values[r * columns + c] *
                            x[i * columns + (asked[k].ordered ? order[c] : (int32_t)c)];
                error.add(terms[k].out[i * rows + r], want);
            }
        check(error.nmse() <= (asked[k].fine ? TWICE : ONCE),
              set + ", weight " + std::to_string(k) + " of a call, " + std::to_string(count) + " rows of " +
                  std::to_string(columns) + ": " + std::to_string(error.nmse() * 1e9) + "e-9");
    }
}

}  // namespace

void test_rounding(const std::string& set) {
    test(37, 200, 1, 1, set);
    test(16, 64, 7, 2, set);
    test(20, 333, 130, 3, set);
}

}  // namespace fewbits
