// Products and values of weights of random planes, of every row of the kernels' table.
#include <math.h>

#include <cmath>
#include <memory>

#include "product.h"
#include "random_weight.h"

namespace fewbits {
namespace {

// normalised squared errors: with activations rounded alike; and without rounding, of many columns
constexpr double ALIKE = 1e-11, TRUE = 5e-4;
constexpr Scale SCALES[] = {Scale::f16, Scale::bf16, Scale::f32, Scale::e8m0};

float scale_of(float most) {
    float scale = most * (1.0f / 127);
    uint32_t bits;
    memcpy(&bits, &scale, 4);
    bits = (bits + 0xFFF) & ~0xFFFu;  // 12 bits of mantissa, rounded up
    memcpy(&scale, &bits, 4);
    return scale;
}

// Activations as the kernels round them: 32 columns share a scale.
std::vector<double> rounded(const Buffer<float>& x, long columns) {
    std::vector<double> to(x.size());
    for (long row = 0; row < x.size(); row += columns)
        for (long first = 0; first < columns; first += BLOCK) {
            const long last = first + BLOCK < columns ? first + BLOCK : columns;
            float most = 0;
            for (long c = first; c < last; ++c) most = fmaxf(most, fabsf(x[row + c]));
            const float scale = scale_of(most), inverse = 1 / scale;
            for (long c = first; c < last; ++c) to[row + c] = most > 0 ? nearbyint(x[row + c] * inverse) * scale : 0;
        }
    return to;
}

template <class X>
double dot(const std::vector<double>& values, long row, const X& x, long at, long columns) {
    double sum = 0;
    for (long c = 0; c < columns; ++c) sum += values[row * columns + c] * x[at * columns + c];
    return sum;
}

void test_product(const RandomWeight& w, long count, int threads, const std::string& name) {
    Random random(count);
    const long rows = w.weight.rows, columns = w.weight.columns;
    const Buffer<float> x = normals(random, count * columns), bias = normals(random, rows);
    const std::vector<double> alike = rounded(x, columns);
    Buffer<float> out(count * rows), again(count * rows);
    const Rounded acts(x.data(), count, columns, threads);
    product({{&w.weight, out.fill(7).data(), bias.data()}, {&w.weight, again.fill(7).data(), nullptr}}, acts, threads);
    Error near, far;
    for (long i = 0; i < count; ++i)
        for (long r = 0; r < rows; ++r) {
            const double want = dot(w.rounded, r, alike, i, columns);
            near.add(again[i * rows + r], want);
            near.add(out[i * rows + r], want + bias[r]);
            far.add(again[i * rows + r], dot(w.rounded, r, x, i, columns));
        }
    const std::string where = name + ", " + std::to_string(rows) + " x " + std::to_string(columns) + ", " +
                              std::to_string(count) + " rows, " + std::to_string(threads) + " threads: ";
    check(near.nmse() <= ALIKE, where + "off by " + std::to_string(near.nmse() / ALIKE) + " times what is allowed");
    if (columns >= 1000) check(far.nmse() <= TRUE, where + std::to_string(far.nmse()));
}

void test_values(const RandomWeight& w, const std::string& name) {
    const long rows = w.weight.rows, columns = w.weight.columns;
    if (!rows) return;
    Random random(1);
    std::vector<int64_t> ids;
    for (long r = 0; r < rows; ++r) ids.push_back(r);
    for (int i = 0; i < 5; ++i) ids.push_back(random.below((int)rows));
    Buffer<float> out((long)ids.size() * columns);
    fewbits::rows(w.weight, ids.data(), (long)ids.size(), out.fill(7).data(), 2);
    Error by_row;
    for (long i = 0; i < out.size(); ++i) by_row.add(out[i], w.values[ids[i / columns] * columns + i % columns]);
    check(by_row.nmse() <= ALIKE, name + ": rows");

    ids = {0, columns - 1, columns / 2};
    Buffer<float> other((long)ids.size() * rows);
    fewbits::columns(w.weight, ids.data(), (long)ids.size(), other.fill(7).data(), 2);
    Error by_column;
    for (long i = 0; i < other.size(); ++i) by_column.add(other[i], w.values[i % rows * columns + ids[i / rows]]);
    check(by_column.nmse() <= ALIKE, name + ": columns");

    const long first = w.weight.tiles / 2, tiles = w.weight.tiles - first;
    Buffer<float> turned(columns * tiles * TILE);
    fewbits::turned(w.weight, first, tiles, turned.fill(7).data(), 2);
    Error by_tile;
    for (long i = 0; i < turned.size(); ++i) {
        const long row = first * TILE + i % (tiles * TILE);
        if (row < rows) by_tile.add(turned[i], w.values[row * columns + i / (tiles * TILE)]);
    }
    check(by_tile.nmse() <= ALIKE, name + ": turned");
}

// Experts: the same bits as a product of each.
void test_grouped(const Kind& kind, const std::string& name) {
    constexpr long COUNTS[] = {1, 0, 9, 2, 40}, ROWS = 21, COLUMNS = 96, ALL = 52;
    Random random(3);
    const Buffer<float> x = normals(random, ALL * COLUMNS);
    Buffer<float> out(ALL * ROWS), want(ALL * ROWS);
    std::vector<std::unique_ptr<RandomWeight>> experts;
    std::vector<Share> shares;
    long first = 0;
    for (long count : COUNTS) {
        experts.push_back(std::make_unique<RandomWeight>(kind, Scale::f16, ROWS, COLUMNS, 1, experts.size() + 1));
        const Weight* w = &experts.back()->weight;
        shares.push_back({w, first, count});
        product({{w, want.data() + first * ROWS, nullptr}}, Rounded(x.data() + first * COLUMNS, count, COLUMNS, 1), 1);
        first += count;
    }
    for (int threads : {1, 3}) {
        grouped(shares, x.data(), out.fill(7).data(), threads);
        check(!memcmp(out.data(), want.data(), ALL * ROWS * sizeof(float)), name + ": grouped");
    }
}

// What is not finite spoils its own row alone.
void test_strange(const RandomWeight& w, const std::string& name) {
    Random random(2);
    constexpr long COUNT = 7;
    Buffer<float> x = normals(random, COUNT * w.weight.columns), out(COUNT * w.weight.rows);
    x[2 * w.weight.columns] = NAN, x[5 * w.weight.columns + 1] = -INFINITY;
    product({{&w.weight, out.fill(7).data(), nullptr}}, Rounded(x.data(), COUNT, w.weight.columns, 1), 1);
    for (long i = 0; i < out.size(); ++i) {
        const long row = i / w.weight.rows;
        check(std::isnan(out[i]) == (row == 2 || row == 5), name + ": not finite, row " + std::to_string(row));
    }
}

}  // namespace

void test_products(const std::string& set) {
    const std::vector<Kind> kinds = known_kinds();
    check(kinds.size() >= 19, set + ": the table has lost rows");
    uint64_t seed = 0;
    for (const Kind& kind : kinds)
        for (Scale scale : SCALES) {
            const std::string name = set + ", " + kind.name() + ", scale " + std::to_string((int)scale);
            const bool all = scale == SCALES[seed % 4];  // every shape with one kind of scales
            const RandomWeight odd(kind, scale, 35, 1100, all ? 8 : 3, ++seed);
            test_product(odd, 1, 1, name), test_product(odd, 6, 1, name);
            test_values(odd, name);
            if (!all) continue;
            for (long count : {0, 2, 3, 4, 5, 7, 8, 11, 13, 16, 40})
                test_product(odd, count, 1 + (int)(count % 3), name);
            test_strange(odd, name);
            test_grouped(kind, name);
            const RandomWeight small(kind, scale, 17, 64, 1, ++seed), one(kind, scale, 1, 33, 2, ++seed),
                none(kind, scale, 0, 64, 1, ++seed), thin(kind, scale, 16, 1, 1, ++seed);
            for (const RandomWeight* w : {&small, &one, &none, &thin}) {
                for (long count : {0, 1, 3, 9}) test_product(*w, count, 1, name);
                test_values(*w, name);
            }
            test_product(small, 600, 2, name);  // more panels than go together
        }
}

}  // namespace fewbits
