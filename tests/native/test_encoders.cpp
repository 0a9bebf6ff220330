// Encoders: searches against the best of many parameters tried one by one, the rest exactly against plain loops.
// Bounds of errors are what was measured, and a little more.
#include <math.h>

#include <algorithm>

#include "check.h"
#include "columns.h"
#include "encoders.h"

namespace fewbits {
namespace {

constexpr long UNITS = 37;  // no multiple of any vector
constexpr int WIDTH = 32;

// Weights and importances of units; every second test has the latter.
struct Given {
    Buffer<float> w, importance;
    bool weighted;
    int width;

    Given(Random& random, bool weighted, int width = WIDTH)
        : w(normals(random, UNITS * width)), importance(UNITS * width), weighted(weighted), width(width) {
        for (long i = 0; i < importance.size(); ++i) importance[i] = random.uniform() + 0.1f;
    }
    Weights weights() const {
        return {w.data(), weighted ? importance.data() : nullptr, UNITS, width, Storage::float32};
    }
    // Error of `count` columns of a unit, each the nearest of scale * (low … high) + offset.
    double error(long unit, int first, int count, double scale, double offset, double low, double high) const {
        double sum = 0;
        for (int i = first; i < first + count; ++i) {
            const double x = w[unit * width + i] - offset;
            const double code = scale == 0 ? 0 : fmin(fmax(nearbyint(x / scale), low), high);
            sum += (code * scale - x) * (code * scale - x) * (weighted ? importance[unit * width + i] : 1);
        }
        return sum;
    }
};

std::vector<float> parts(float from, float to, int count) {
    std::vector<float> found(count);
    for (int i = 0; i < count; ++i) found[i] = from + (to - from) * (float)i / (float)(count - 1);
    return found;
}

std::string of(const std::string& set, const char* what, bool weighted) {
    return set + ": " + what + (weighted ? " with importances" : "");
}

void test_scale(const std::string& set, const Given& given) {
    std::vector<float> starts = parts(-0.2f, -0.1f, 12);
    starts[0] = -1.0f / 8;
    Buffer<float> scale(UNITS);
    encoders_of(current()).scale(given.weights(), {-8, 7, 0, nullptr, nullptr},
                                 {starts.data(), nullptr, (int)starts.size(), 4, 3, false}, scale.data());
    double ours = 0, best = 0;
    for (long u = 0; u < UNITS; ++u) {
        ours += given.error(u, 0, WIDTH, scale[u], 0, -8, 7);
        float most = 0;
        for (int i = 0; i < WIDTH; ++i)
            if (const float x = given.w[u * WIDTH + i]; fabsf(x) > fabsf(most)) most = x;
        double least = INFINITY;
        for (int i = 0; i < 400; ++i)
            least = fmin(least, given.error(u, 0, WIDTH, most * (-0.2 + 0.1 * i / 399), 0, -8, 7));
        best += least;
    }
    check(ours <= 1.004 * best, of(set, "scale", given.weighted));
}

void test_zero(const std::string& set, const Given& given) {
    const std::vector<float> starts = parts(0.7f, 1.05f, 12);
    Buffer<float> scale(UNITS);
    Buffer<uint8_t> zero(UNITS);
    encoders_of(current()).zero(given.weights(), 15, {starts.data(), nullptr, (int)starts.size(), 4, 3, false},
                                scale.data(), zero.data());
    double ours = 0, best = 0;
    for (long u = 0; u < UNITS; ++u) {
        ours += given.error(u, 0, WIDTH, scale[u], 0, -zero[u], 15 - zero[u]);
        const auto [low, high] = std::minmax_element(&given.w[u * WIDTH], &given.w[u * WIDTH] + WIDTH);
        double least = INFINITY;
        for (int z = 0; z < 16; ++z)
            for (int i = 0; i < 100; ++i) {
                const double s = (*high - *low) / 15 * (0.7 + 0.4 * i / 99);
                least = fmin(least, given.error(u, 0, WIDTH, s, 0, -z, 15 - z));
            }
        best += least;
    }
    check(ours <= 1.004 * best, of(set, "zero", given.weighted));
}

// Starts of lines: parts of the range as scales, and about half of the levels below its middle.
struct LineStarts {
    std::vector<float> scale, drop;
    LineStarts() {
        for (float s : parts(0.6f / 15, 1.15f / 15, 7))
            for (float shift : {0.0f, 0.33f, -0.33f}) scale.push_back(s), drop.push_back(s * (7.5f + shift));
    }
    Starts get() const { return {scale.data(), drop.data(), (int)scale.size(), 8, 3, false}; }
};

void test_line(const std::string& set, const Given& given) {
    const LineStarts starts;
    Buffer<float> d(UNITS), m(UNITS);
    encoders_of(current()).line(given.weights(), 15, starts.get(), d.data(), m.data());
    double ours = 0, best = 0;
    for (long u = 0; u < UNITS; ++u) {
        ours += given.error(u, 0, WIDTH, d[u], m[u], 0, 15);
        const auto [low, high] = std::minmax_element(&given.w[u * WIDTH], &given.w[u * WIDTH] + WIDTH);
        double least = INFINITY;
        for (int i = 0; i < 40; ++i)
            for (int j = 0; j < 40; ++j) {
                const double range = (double)*high - *low, s = range / 15 * (0.6 + 0.5 * i / 39);
                least = fmin(least, given.error(u, 0, WIDTH, s, *low + range * (0.2 * j / 39 - 0.02), 0, 15));
            }
        best += least;
    }
    check(ours <= 1.008 * best, of(set, "line", given.weighted));
}

constexpr int SUBS = 8, SUB = 16;
const std::vector<float> STEPS = {31, 28, 24}, NEAR = {0, 0, -1, 0, 1, 0, 0, -1, 0, 1};

// Beside the plain choice: every sub-block's range, on the integers that the largest one allows.
void test_scales(const std::string& set, const Given& given) {
    std::vector<float> starts = parts(-0.35f, -0.2f, 8);
    starts[0] = -1.0f / 4;
    Buffer<float> d(UNITS);
    Buffer<int8_t> scales(UNITS * SUBS);
    encoders_of(current()).scales(given.weights(), {-4, 3, 0, nullptr, nullptr},
                                  {starts.data(), nullptr, (int)starts.size(), 4, 2, false},
                                  {SUBS, -32, 31, STEPS.data(), (int)STEPS.size(), 1, NEAR.data(), 3, 2},
                                  d.data(), scales.data());
    double ours = 0, plain = 0;
    for (long u = 0; u < UNITS; ++u) {
        double real[SUBS], most = 0;
        for (int j = 0; j < SUBS; ++j) {
            float extreme = 0;
            for (int i = 0; i < SUB; ++i)
                if (const float x = given.w[u * given.width + j * SUB + i]; fabsf(x) > fabsf(extreme)) extreme = x;
            real[j] = extreme / -4, most = fmax(most, fabs(real[j]));
        }
        for (int j = 0; j < SUBS; ++j) {
            ours += given.error(u, j * SUB, SUB, (double)d[u] * scales[u * SUBS + j], 0, -4, 3);
            plain += given.error(u, j * SUB, SUB, most / 31 * nearbyint(real[j] / most * 31), 0, -4, 3);
        }
    }
    check(ours <= 0.87 * plain, of(set, "scales", given.weighted));
}

void test_lines(const std::string& set, const Given& given) {
    const LineStarts starts;
    const std::vector<float> steps = {63, 60, 56};
    Buffer<float> d(UNITS), dmin(UNITS);
    Buffer<uint8_t> scales(UNITS * SUBS), mins(UNITS * SUBS);
    encoders_of(current()).lines(given.weights(), 15, starts.get(),
                                 {SUBS, 0, 63, steps.data(), (int)steps.size(), 3, NEAR.data(), 5, 2},
                                 d.data(), dmin.data(), scales.data(), mins.data());
    double ours = 0, plain = 0;
    for (long u = 0; u < UNITS; ++u) {
        double low[SUBS], range[SUBS], most = 0, deep = 0;
        for (int j = 0; j < SUBS; ++j) {
            const float* x = &given.w[u * given.width + j * SUB];
            const auto [least, largest] = std::minmax_element(x, x + SUB);
            low[j] = fmin(*least, 0.0), range[j] = fmax(*largest, 0.0) - low[j];
            most = fmax(most, range[j]), deep = fmax(deep, -low[j]);
        }
        for (int j = 0; j < SUBS; ++j) {
            ours += given.error(u, j * SUB, SUB, (double)d[u] * scales[u * SUBS + j],
                                -(double)dmin[u] * mins[u * SUBS + j], 0, 15);
            plain += given.error(u, j * SUB, SUB, most / 15 / 63 * nearbyint(range[j] / most * 63),
                                 -deep / 63 * nearbyint(-low[j] / deep * 63), 0, 15);
        }
    }
    check(ours <= 0.72 * plain, of(set, "lines", given.weighted));
}

void test_codes(const std::string& set, Random& random, bool table) {
    constexpr int RUN = 11, GROUPS = 3, COLUMNS = RUN * GROUPS;
    const Buffer<float> w = normals(random, UNITS * COLUMNS), scale = normals(random, UNITS * GROUPS),
                        offset = normals(random, UNITS * GROUPS);
    const std::vector<float> bounds = {-1.5f, -0.4f, 0.3f, 1.1f};
    const std::vector<uint8_t> order = {2, 0, 1, 4, 3};
    std::vector<float> levels(256);
    for (float& level : levels) level = random.normal();
    const Grid grid{scale.data(), offset.data(), nullptr, 8, 0.25f, COLUMNS, GROUPS};
    Buffer<uint8_t> codes(UNITS * COLUMNS);
    Buffer<float> values(UNITS * COLUMNS);
    const Encoders& use = encoders_of(current());
    use.codes(grid, {0, 15, table ? 4 : 0, bounds.data(), nullptr}, order.data(), w.data(), 0, UNITS, codes.data());
    use.values(grid, table ? levels.data() : nullptr, codes.data(), 0, UNITS, values.data());
    for (long i = 0; i < codes.size(); ++i) {
        const long at = i / RUN;
        const float u = (w[i] - offset[at]) / (scale[at] * 0.25f) + 8;
        const long rank = std::count_if(bounds.begin(), bounds.end(), [&](float bound) { return u > bound; });
        const int want = table ? order[rank] : (int)nearbyintf(fminf(fmaxf(u, 0), 15));
        check(codes[i] == want, set + ": codes");
        const float value = table ? levels[codes[i]] * scale[at] : (codes[i] - 8.0f) * scale[at] * 0.25f + offset[at];
        check(values[i] == value, set + ": values");
    }
}

void test_planes(const std::string& set, Random& random) {
    constexpr int BITS = 2, PARTS = 4, RUN = 13, COUNT = 5;
    Buffer<uint8_t> codes(COUNT * PARTS * RUN), bytes(COUNT * RUN), back(codes.size());
    for (long i = 0; i < codes.size(); ++i) codes[i] = (uint8_t)random.below(1 << BITS);
    encoders_of(current()).planes(codes.data(), BITS, PARTS, RUN, 0, COUNT, bytes.data());
    encoders_of(current()).unplanes(bytes.data(), BITS, PARTS, RUN, 0, COUNT, back.data());
    for (long i = 0; i < codes.size(); ++i) {
        const long run = i / (PARTS * RUN), part = i / RUN % PARTS;
        check((bytes[run * RUN + i % RUN] >> (part * BITS) & 3) == codes[i], set + ": planes");
        check(back[i] == codes[i], set + ": unplanes");
    }
}

// Columns rounded one after the other, in the same order of operations: results are the same bits.
void test_sweep(const std::string& set, Random& random) {
    constexpr long COLUMNS = 71, ROWS = 70, RUN = COLUMNS;
    const Buffer<float> x = normals(random, COLUMNS * ROWS);
    Buffer<float> mix = normals(random, COLUMNS * COLUMNS), scale(ROWS), inverse(ROWS), shift(ROWS), base(ROWS);
    for (long i = 0; i < mix.size(); ++i) mix[i] *= 0.05f;
    for (long r = 0; r < ROWS; ++r) {
        scale[r] = 0.3f + random.uniform(), inverse[r] = 1 / scale[r], shift[r] = 8, base[r] = -8 * scale[r];
    }
    std::vector<int64_t> position(COLUMNS);
    for (long j = 0; j < COLUMNS; ++j) position[j] = COLUMNS - 1 - j;
    Buffer<float> values(COLUMNS * ROWS), errors(COLUMNS * ROWS);
    const Sweep job{COLUMNS, ROWS, x.data(), nullptr, mix.data(), position.data(),
                    {scale.data(), inverse.data(), shift.data(), base.data(), 0, 15, nullptr, nullptr, 0, RUN},
                    values.data(), errors.data()};
    const Sweeps& use = sweeps_of(current());
    for (long strip = 0; strip * use.rows < ROWS; ++strip) use.sweep(job, strip);
    for (long r = 0; r < ROWS; ++r) {
        std::vector<float> left(COLUMNS);
        for (long j = 0; j < COLUMNS; ++j) left[j] = x[j * ROWS + r];
        for (long j = 0; j < COLUMNS; ++j) {
            const float code = nearbyintf(fminf(fmaxf(shift[r] + left[j] * inverse[r], 0), 15));
            const float value = base[r] + code * scale[r], error = left[j] - value;
            check(values[j * ROWS + r] == value && errors[j * ROWS + r] == error, set + ": sweep");
            for (long i = j + 1; i < COLUMNS; ++i) left[i] -= mix[j * COLUMNS + i] * error;
        }
    }
}

}  // namespace

void test_encoders(const std::string& set) {
    Random random(7);
    for (bool weighted : {false, true}) {
        const Given units(random, weighted), supers(random, weighted, SUBS * SUB);
        test_scale(set, units), test_zero(set, units), test_line(set, units);
        test_scales(set, supers), test_lines(set, supers);
    }
    test_codes(set, random, false), test_codes(set, random, true);
    test_planes(set, random);
    test_sweep(set, random);
}

}  // namespace fewbits
