// Products of float weights as they are stored.
#include "check.h"
#include "floats.h"

namespace fewbits {
namespace {

// Some float32 number and its nearest neighbour in fewer bits, both exact; halves have 8 bits of mantissa here, and
// exponents that float16 has as normal and as denormal numbers.
float stored(Random& random, Scale kind, uint8_t* to) {
    float value = random.normal() * (random.below(9) ? 1 : 0x1p-20f);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (kind != Scale::f32) bits &= 0xffff0000u;
    memcpy(&value, &bits, 4);
    if (kind == Scale::f32) {
        memcpy(to, &bits, 4);
        return value;
    }
    uint16_t half = (uint16_t)(bits >> 16);
    if (kind == Scale::f16) {
        const int exponent = (int)(bits >> 23 & 255) - 127 + 15;
        const uint32_t mantissa = (bits & 0x7fffff) >> 13, sign = bits >> 16 & 0x8000;
        if (exponent > 0) {
            half = (uint16_t)(sign | (uint32_t)exponent << 10 | mantissa);
        } else {
            const uint32_t small = exponent > -10 ? (mantissa | 0x400) >> (1 - exponent) : 0;
            half = (uint16_t)(sign | small);
            value = (float)small * (sign ? -0x1p-24f : 0x1p-24f);
        }
    }
    memcpy(to, &half, 2);
    return value;
}

void test_product(Scale kind, long rows, long columns, long count, int threads, const std::string& name) {
    Random random(rows + columns + count);
    const long size = kind == Scale::f32 ? 4 : 2;
    Buffer<uint8_t> weight(rows * columns * size);
    std::vector<double> values(rows * columns);
    for (long i = 0; i < rows * columns; ++i) values[i] = stored(random, kind, weight.data() + i * size);
    const Buffer<float> x = normals(random, count * columns), bias = normals(random, rows);
    Buffer<float> out(count * rows), plain(count * rows);
    const FloatWeight w{rows, columns, kind, weight.data()};
    product(w, x.data(), count, out.fill(7).data(), bias.data(), threads);
    product(w, x.data(), count, plain.fill(7).data(), nullptr, threads);
    Error error;
    for (long i = 0; i < count; ++i)
        for (long r = 0; r < rows; ++r) {
            double sum = 0;
            for (long c = 0; c < columns; ++c) sum += values[r * columns + c] * x[i * columns + c];
            error.add(plain[i * rows + r], sum);
            error.add(out[i * rows + r], sum + bias[r]);
        }
    for (long i = 0; i < count; ++i) {
        Buffer<float> one(rows);
        product(w, x.data() + i * columns, 1, one.fill(7).data(), bias.data(), threads);
        check(!memcmp(one.data(), out.data() + i * rows, rows * sizeof(float)), name + ", a row by itself");
    }
    check(error.nmse() <= 1e-11, name + ", " + std::to_string(rows) + " x " + std::to_string(columns) + ", " +
                                     std::to_string(count) + " rows");
}

}  // namespace

void test_floats(const std::string& set) {
    for (Scale kind : {Scale::f16, Scale::bf16, Scale::f32}) {
        const std::string name = set + ", floats of kind " + std::to_string((int)kind);
        for (long count : {0, 1, 2, 3, 4, 5, 7, 16, 17, 70}) {
            test_product(kind, 67, 1100, count, 1 + (int)(count % 3), name);
            for (long rows : {0, 1, 4}) test_product(kind, rows, 33, count, 1, name);
            test_product(kind, 5, 1, count, 1, name);
        }
    }
}

}  // namespace fewbits
