// What a decoder does between products: norms, gates, rotations.
#include <math.h>

#include "check.h"
#include "steps.h"

namespace fewbits {
namespace {

void test_rows(const Steps& steps, long width, const std::string& name) {
    Random random(width);
    const Buffer<float> x = normals(random, width), w = normals(random, width);
    Buffer<float> normed(width), gated(width), added(width);
    double squares = 0;
    for (long i = 0; i < width; ++i) squares += (double)x[i] * x[i];
    steps.norm(x.data(), w.data(), width, 0.25f, normed.fill(7).data());
    for (long i = 0; i < width; ++i) gated[i] = 30 * x[i], added[i] = w[i];
    steps.gate(gated.data(), w.data(), width, gated.data());
    steps.add(x.data(), width, added.data());
    Error norm, gate, add;
    for (long i = 0; i < width; ++i) {
        norm.add(normed[i], x[i] / sqrt(squares / width + 0.25) * w[i]);
        gate.add(gated[i], 30.0f * x[i] / (1 + exp(-(double)(30.0f * x[i]))) * w[i]);
        add.add(added[i], (double)x[i] + w[i]);
    }
    check(norm.nmse() <= 1e-13 && gate.nmse() <= 1e-13 && add.nmse() <= 1e-13, name + ", width " + std::to_string(width));
}

void test_rotation(const Steps& steps, long half, const std::string& name) {
    Random random(half);
    const Buffer<float> x = normals(random, 2 * half), cos = normals(random, half), sin = normals(random, half);
    Buffer<float> turned(2 * half);
    memcpy(turned.data(), x.data(), 2 * half * sizeof(float));
    steps.rotate(turned.data(), cos.data(), sin.data(), half);
    Error error;
    for (long i = 0; i < half; ++i) {
        error.add(turned[i], (double)x[i] * cos[i] - (double)x[i + half] * sin[i]);
        error.add(turned[i + half], (double)x[i + half] * cos[i] + (double)x[i] * sin[i]);
    }
    check(error.nmse() <= 1e-13, name + ", rotation of " + std::to_string(half));
}

}  // namespace

void test_steps(const std::string& set) {
    const Steps& steps = steps_of(current());
    for (long width : {1, 15, 16, 17, 576}) test_rows(steps, width, set);
    for (long half : {1, 5, 32}) test_rotation(steps, half, set);
}

}  // namespace fewbits
