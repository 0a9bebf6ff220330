// Attention to a cache in float16, and what goes into one.
#include <math.h>

#include "attention.h"
#include "check.h"

namespace fewbits {
namespace {

double value_of(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                       : ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    return half & 0x8000 ? -size : size;
}

// Numbers that are halves, lie between two, are denormal, too large or none, as they come back from the cache.
void test_halves(const Attention& attention, const std::string& name) {
    const float wanted[][2] = {{1, 1},           {-2.5f, -2.5f},      {1 + 0x1p-11f, 1},      {1 + 0x3p-11f, 1 + 0x1p-9f},
                               {65504, 65504},   {65519, 65504},      {65520, INFINITY},      {-1e9f, -INFINITY},
                               {0x1p-24f, 0x1p-24f}, {0x1p-25f, 0},   {0x3p-25f, 0x1p-23f},   {0x1p-14f, 0x1p-14f},
                               {0x1.ff8p-15f, 0x1.ff8p-15f}, {-0.0f, -0.0f}, {0x1.fffp-15f, 0x1p-14f}};
    constexpr long WIDTH = sizeof wanted / sizeof *wanted;
    float values[WIDTH];
    for (long i = 0; i < WIDTH; ++i) values[i] = wanted[i][0];
    Buffer<uint16_t> keys(LINE * WIDTH), stored(LINE * lined(WIDTH));
    attention.keep({WIDTH, keys.data(), stored.data()}, 3, values, values);
    for (long i = 0; i < WIDTH; ++i)
        for (uint16_t half : {keys[i * LINE + 3], stored[3 * lined(WIDTH) + i]})
            check(value_of(half) == wanted[i][1], name + ", float16 of " + std::to_string(wanted[i][0]));
    values[0] = NAN;
    attention.keep({WIDTH, keys.data(), stored.data()}, 3, values, values);
    check(isnan(value_of(keys[3])), name + ", float16 of not a number");
}

void test_one(const Attention& attention, long width, long length, long window, int count, const std::string& name) {
    Random random(width + length);
    const long room = lined(length);
    Buffer<uint16_t> keys(room * width), values(room * lined(width));
    keys.fill(0x7e00), values.fill(0);  // beyond the last position: not a number
    const Head head{width, keys.data(), values.data()};
    for (long p = 0; p < length; ++p) {
        const Buffer<float> key = normals(random, width), value = normals(random, width);
        attention.keep(head, p, key.data(), value.data());
    }
    const Buffer<float> x = normals(random, count * width);
    const float scale = 1 / sqrtf((float)width);
    Buffer<float> out(count * width);
    out.fill(7);
    std::vector<Query> queries;
    for (int r = 0; r < count; ++r) {
        const long last = length - 1 - (count - 1 - r) % length;
        queries.push_back({x.data() + r * width, window && last >= window ? last - window + 1 : 0, last,
                           out.data() + r * width});
    }
    attention.attend(head, queries.data(), count, scale);
    Error error;
    for (const Query& q : queries) {
        std::vector<double> scores, sums(width);
        double total = 0;
        for (long p = q.first; p <= q.last; ++p) {
            double score = 0;
            for (long c = 0; c < width; ++c)
                score += q.x[c] * value_of(keys[(p / LINE * width + c) * LINE + p % LINE]);
            scores.push_back(exp(score * scale)), total += scores.back();
        }
        for (long c = 0; c < width; ++c) {
            for (long p = q.first; p <= q.last; ++p)
                sums[c] += scores[p - q.first] / total * value_of(values[p * lined(width) + c]);
            error.add(q.out[c], sums[c]);
        }
    }
    check(error.nmse() <= 1e-11, name + ", heads of " + std::to_string(width) + ", " + std::to_string(length) +
                                     " positions, window " + std::to_string(window));
}

}  // namespace

void test_attention(const std::string& set) {
    const Attention& attention = attention_of(current());
    test_halves(attention, set);
    for (long width : {1L, 8L, 20L, 64L, WIDEST_HEAD})
        for (long length : {1, 2, 16, 17, 64, 65, 200})
            for (int count = 1; count <= QUERIES; ++count)
                for (long window : {0, 1, 40}) test_one(attention, width, length, window, count, set);
}

}  // namespace fewbits
