#include "rounding.h"

#include <string.h>

#include <algorithm>

#include "pool.h"

namespace fewbits {
namespace {

constexpr long TOGETHER = 64;  // rows whose rounding is made good at a time
constexpr long FEW = 16384;    // values that are not worth sharing out

template <class Work>
void each_row(long rows, long columns, int threads, Work&& work) {
    parallel(rows * columns > FEW ? threads : 1, rows, [&](long i) { work(i); });
}

bool alike(const Weight& a, const Weight& b) {
    if (a.fine != b.fine || !a.order != !b.order) return false;
    return !a.order || !memcmp(a.order, b.order, a.columns * sizeof *a.order);
}

std::vector<float> ordered(const int32_t* order, const float* x, long rows, long columns, int threads) {
    std::vector<float> found(rows * columns);
    each_row(rows, columns, threads, [&](long i) {
        for (long c = 0; c < columns; ++c) found[i * columns + c] = x[i * columns + order[c]];
    });
    return found;
}

// What rounding took from row `i`.
void lost(const Activations& a, const float* x, long i, float* out) {
    const long panel = i / a.width, lane = i % a.width;
    for (long c = 0; c < a.columns; ++c) {
        const long block = panel * a.blocks + c / BLOCK, quad = block * 8 + c % BLOCK / 4;
        out[c] = x[c] - a.codes[(quad * a.width + lane) * 4 + c % 4] * a.scales[block * a.width + lane];
    }
}

// What rounding took is rounded as well, and multiplied at the same time: as many rows again.
void finely(const std::vector<Term>& terms, const float* x, long rows, long columns, int threads) {
    std::vector<float> both(2 * rows * columns);
    memcpy(both.data(), x, rows * columns * sizeof(float));
    const Rounded once(x, rows, columns, threads);
    each_row(rows, columns, threads,
             [&](long i) { lost(once.get(), x + i * columns, i, both.data() + (rows + i) * columns); });
    std::vector<std::vector<float>> found;
    std::vector<Term> twice;
    for (const Term& t : terms) {
        found.emplace_back(2 * rows * t.weight->rows);
        twice.push_back({t.weight, found.back().data(), nullptr});
    }
    product(twice, Rounded(both.data(), 2 * rows, columns, threads), threads);
    for (size_t k = 0; k < terms.size(); ++k) {
        const Term& t = terms[k];
        const long width = t.weight->rows;
        each_row(rows, width, threads, [&](long i) {
            const float *near = twice[k].out + i * width, *rest = near + rows * width;
            for (long c = 0; c < width; ++c) t.out[i * width + c] = near[c] + rest[c] + (t.bias ? t.bias[c] : 0);
        });
    }
}

}  // namespace

void multiply(const std::vector<Term>& terms, const float* x, long rows, int threads) {
    std::vector<Term> left = terms;
    while (!left.empty()) {
        const Weight& w = *left[0].weight;
        const auto others = std::stable_partition(left.begin(), left.end(),
                                                  [&](const Term& t) { return alike(*t.weight, w); });
        std::vector<Term> mine(left.begin(), others);
        left.erase(left.begin(), others);
        std::vector<float> moved;
        if (w.order) moved = ordered(w.order, x, rows, w.columns, threads);
        const float* from = w.order ? moved.data() : x;
        if (!w.fine) {
            product(mine, Rounded(from, rows, w.columns, threads), threads);
            continue;
        }
        for (long at = 0; at < rows; at += TOGETHER) {
            const long count = std::min(TOGETHER, rows - at);
            finely(mine, from + at * w.columns, count, w.columns, threads);
            for (Term& t : mine) t.out += count * t.weight->rows;
        }
    }
}

}  // namespace fewbits
