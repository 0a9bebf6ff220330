// Attention to what is kept in 16, 8 and 4 bits, and what is kept.
#include <math.h>

#include "attention.h"
#include "cache.h"
#include "check.h"

namespace fewbits {
namespace {

double value_of(uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                                       : ldexp(exponent ? 1024 + mantissa : mantissa, (exponent ? exponent : 1) - 25);
    return half & 0x8000 ? -size : size;
}

// Memory of a head, not a number where nothing was kept.
struct Memory {
    Planes planes;
    Buffer<uint16_t> key_memory, value_memory, key_scales, value_scales;
    uint8_t *const keys, *const values;
    Head head;
    Memory(Kept kept, long width, long length)
        : planes(planes_of(kept, width)), key_memory(lined(length) / LINE * planes.keys / 2),
          value_memory(lined(length) / LINE * planes.values / 2), key_scales(lined(length) / LINE * planes.key_scales / 2),
          value_scales(lined(length) / LINE * planes.value_scales / 2), keys((uint8_t*)key_memory.data()),
          values((uint8_t*)value_memory.data()) {
        key_memory.fill(0x7e00), value_memory.fill(kept == Kept::f16 ? 0 : 0x7e7e);
        key_scales.fill(0x7e00), value_scales.fill(0);
        head = {kept, width, keys, values, key_scales.data(), value_scales.data()};
    }

    // What is kept of a key or a value, as stored (4 bits: turned).
    double at(bool value, long position, long column) const {
        const long runs = (head.width + RUN - 1) / RUN, run = column / RUN, i = column % RUN;
        const long line = position / LINE, lane = position % LINE;
        if (head.kept == Kept::f16) {
            return value_of(value ? value_memory[position * lined(head.width) + column]
                                  : key_memory[(line * head.width + column) * LINE + lane]);
        }
        const double scale = value_of(value ? value_scales[position * runs + run]
                                            : key_scales[(line * runs + run) * LINE + lane]);
        if (head.kept == Kept::q8_0)
            return scale * (int8_t)(value ? values[(position * runs + run) * RUN + i]
                                          : keys[((line * runs + run) * RUN + i) * LINE + lane]);
        const int both = value ? values[(position * runs + run) * 16 + i % 16]
                               : keys[((line * runs + run) * 16 + i % 16) * LINE + lane];
        return scale * ((i < 16 ? both & 15 : both >> 4) - 8);
    }

    // A row as Hadamard's matrix turns it, which is its own inverse; as it is where nothing is turned.
    std::vector<double> turned(const std::vector<double>& x) const {
        if (head.kept != Kept::q4_0) return x;
        const long width = (long)x.size(), block = width & -width;
        std::vector<double> y(width);
        for (long i = 0; i < width; ++i)
            for (long k = i / block * block; k < (i / block + 1) * block; ++k)
                y[i] += x[k] * (__builtin_parityl((i % block) & (k % block)) ? -1 : 1) / sqrt((double)block);
        return y;
    }
};

std::vector<double> doubles(const float* x, long width) { return std::vector<double>(x, x + width); }

// Numbers that are halves, lie between two, are denormal, too large or none, as they come back from the cache.
void test_halves(const Attention& attention, const std::string& name) {
    const float wanted[][2] = {{1, 1},           {-2.5f, -2.5f},      {1 + 0x1p-11f, 1},      {1 + 0x3p-11f, 1 + 0x1p-9f},
                               {65504, 65504},   {65519, 65504},      {65520, INFINITY},      {-1e9f, -INFINITY},
                               {0x1p-24f, 0x1p-24f}, {0x1p-25f, 0},   {0x3p-25f, 0x1p-23f},   {0x1p-14f, 0x1p-14f},
                               {0x1.ff8p-15f, 0x1.ff8p-15f}, {-0.0f, -0.0f}, {0x1.fffp-15f, 0x1p-14f}};
    constexpr long WIDTH = sizeof wanted / sizeof *wanted;
    float values[WIDTH];
    for (long i = 0; i < WIDTH; ++i) values[i] = wanted[i][0];
    Memory some(Kept::f16, WIDTH, LINE);
    attention.keep(some.head, 3, values, values);
    for (long i = 0; i < WIDTH; ++i)
        for (bool value : {false, true})
            check(some.at(value, 3, i) == wanted[i][1], name + ", float16 of " + std::to_string(wanted[i][0]));
    values[0] = NAN;
    attention.keep(some.head, 3, values, values);
    check(isnan(some.at(false, 3, 0)), name + ", float16 of not a number");
}

// Codes are the nearest ones (4 bits: but for the end opposite to the largest), the largest magnitude is kept.
void test_codes(const Attention& attention, Kept kept, long width, const std::string& name) {
    Random random(width);
    Memory some(kept, width, 40);
    for (long p = 0; p < 40; ++p) {
        Buffer<float> key = normals(random, width), value = normals(random, width);
        for (long c = 0; c < width; ++c) key[c] *= p == 5 ? 0 : p == 6 ? 1e-9f : p == 7 ? 1e4f : 1;
        attention.keep(some.head, p, key.data(), value.data());
        for (bool of_value : {false, true}) {
            const std::vector<double> want = some.turned(doubles((of_value ? value : key).data(), width));
            for (long run = 0; run < width; run += RUN) {
                double most = 0;
                const long end = run + RUN < width ? run + RUN : width;
                for (long c = run; c < end; ++c) most = fmax(most, fabs(want[c]));
                const double step = most / (kept == Kept::q8_0 ? 127 : 8), part = kept == Kept::q8_0 ? 0.51 : 1.01;
                for (long c = run; c < end; ++c)
                    check(fabs(some.at(of_value, p, c) - want[c]) <= part * step + 1e-7 * most + 1e-7,
                          name + ", codes of position " + std::to_string(p) + ", " + std::to_string(width) + " columns");
            }
        }
    }
    Buffer<float> strange = normals(random, width);
    strange[width - 1] = INFINITY;
    attention.keep(some.head, 3, strange.data(), strange.data());
    check(isnan(some.at(false, 3, width - 1)) && isnan(some.at(true, 3, width - 1)), name + ", codes of infinity");
}

void test_one(const Attention& attention, Kept kept, long width, long length, long window, int count, float cap,
              const std::string& set) {
    const std::string name = set + ", " + std::to_string(count) + " queries, heads of " + std::to_string(width) +
                             " in kind " + std::to_string((int)kept) + ", " + std::to_string(length) +
                             " positions, window " + std::to_string(window) + ", cap " + std::to_string(cap);
    Random random(width + length);
    Memory some(kept, width, length);
    for (long p = 0; p < length; ++p) {
        const Buffer<float> key = normals(random, width), value = normals(random, width);
        attention.keep(some.head, p, key.data(), value.data());
    }
    const Buffer<float> x = normals(random, count * width);
    const Scores how{2 / sqrtf((float)width), cap};
    Buffer<float> out(count * width), alone(count * width), parted(count * width);
    out.fill(7);
    auto queries = [&](const Buffer<float>& to) {
        std::vector<Query> all;
        for (int r = 0; r < count; ++r) {
            const long last = length - 1 - (count - 1 - r) / 3 % length;
            all.push_back({x.data() + r * width, window && last >= window ? last - window + 1 : 0, last,
                           to.data() + r * width});
        }
        return all;
    };
    attention.attend(some.head, queries(out).data(), count, how);
    for (const Query& q : queries(alone)) attention.attend(some.head, &q, 1, how);
    check(!memcmp(out.data(), alone.data(), count * width * sizeof(float)), name + ": not the same bits as alone");
    const long parts = segments(length), size = count * sums_of(width);
    Buffer<float> sums(parts * size);
    for (long i = parts - 1; i >= 0; --i)
        attention.gather(some.head, queries(parted).data(), count, how, i, sums.data() + i * size);
    attention.finish(some.head, queries(parted).data(), count, parts, sums.data());
    check(!memcmp(out.data(), parted.data(), count * width * sizeof(float)), name + ": not the same bits in segments");
    Error error;
    for (const Query& q : queries(out)) {
        const std::vector<double> asked = some.turned(doubles(q.x, width));
        std::vector<double> scores, sums(width);
        double total = 0;
        for (long p = q.first; p <= q.last; ++p) {
            double score = 0;
            for (long c = 0; c < width; ++c) score += asked[c] * some.at(false, p, c) * how.scale;
            scores.push_back(exp(cap > 0 ? cap * tanh(score / cap) : score)), total += scores.back();
        }
        for (long c = 0; c < width; ++c)
            for (long p = q.first; p <= q.last; ++p) sums[c] += scores[p - q.first] / total * some.at(true, p, c);
        const std::vector<double> want = some.turned(sums);
        for (long c = 0; c < width; ++c) error.add(q.out[c], want[c]);
    }
    check(error.nmse() <= 1e-11, name + ": " + std::to_string(error.nmse()));
}

}  // namespace

void test_attention(const std::string& set) {
    const Attention& attention = attention_of(current());
    test_halves(attention, set);
    for (Kept kept : {Kept::q8_0, Kept::q4_0})
        for (long width : {1L, 20L, 64L, 96L, WIDEST_HEAD}) test_codes(attention, kept, width, set);
    for (Kept kept : {Kept::f16, Kept::q8_0, Kept::q4_0}) {
        for (long width : {1L, 8L, 20L, 64L, 80L, WIDEST_HEAD})
            for (long length : {1, 2, 16, 17, 64, 65, 200})
                for (int count : {1, 2, 3, 5, 6, 13})
                    for (long window : {0, 1, 40}) test_one(attention, kept, width, length, window, count, 0, set);
        for (long length : {SEGMENT, SEGMENT + 1, 3 * SEGMENT + 100})
            for (long window : {0, 70, SEGMENT + 100}) test_one(attention, kept, 64, length, window, QUERIES, 0, set);
        for (float cap : {0.5f, 50.f}) test_one(attention, kept, 64, 200, 0, 3, cap, set);
    }
}

}  // namespace fewbits
