// What a decoder does between products: norms, gates, rotations.
#include <math.h>

#include <algorithm>

#include "check.h"
#include "experts.h"
#include "steps.h"

namespace fewbits {
namespace {

void test_rows(const Steps& steps, long width, const std::string& name) {
    Random random(width);
    const Buffer<float> x = normals(random, width), w = normals(random, width);
    Buffer<float> normed(width), gated(width), added(width), centred(width), scaled(width), capped(width);
    double mean = 0, spread = 0;
    for (long i = 0; i < width; ++i) mean += x[i] / width;
    for (long i = 0; i < width; ++i) spread += (x[i] - mean) * (x[i] - mean) / width;
    double squares = 0;
    for (long i = 0; i < width; ++i) squares += (double)x[i] * x[i];
    steps.norm(x.data(), w.data(), width, 0.25f, normed.fill(7).data());
    steps.layer_norm(x.data(), w.data(), x.data(), width, 0.25f, centred.fill(7).data());
    for (long i = 0; i < width; ++i) gated[i] = 30 * x[i], added[i] = w[i], scaled[i] = capped[i] = x[i];
    steps.gate(Activation::silu, gated.data(), w.data(), width, gated.data());
    steps.add(x.data(), 0.75f, width, added.data());
    steps.scale(scaled.data(), 1.7f, width);
    steps.cap(capped.data(), 1.7f, width);
    Error norm, gate, add, layer_norm, scale, cap;
    for (long i = 0; i < width; ++i) {
        norm.add(normed[i], x[i] / sqrt(squares / width + 0.25) * w[i]);
        gate.add(gated[i], 30.0f * x[i] / (1 + exp(-(double)(30.0f * x[i]))) * w[i]);
        add.add(added[i], 0.75 * x[i] + w[i]);
        layer_norm.add(centred[i], (x[i] - mean) / sqrt(spread + 0.25) * w[i] + x[i]);
        scale.add(scaled[i], (double)1.7f * x[i]);
        cap.add(capped[i], 1.7f * tanh(x[i] / (double)1.7f));
    }
    for (const Error& e : {norm, gate, add, layer_norm, scale, cap})
        check(e.nmse() <= 1e-13, name + ", width " + std::to_string(width));
}

double activated(Activation act, double x) {
    switch (act) {
        case Activation::silu: return x / (1 + exp(-x));
        case Activation::gelu: return x * erfc(-x / sqrt(2)) / 2;
        case Activation::gelu_tanh: return x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))) / 2;
        default: return x > 0 ? x : 0;
    }
}

void test_activation(const Steps& steps, Activation act, const std::string& name) {
    constexpr long COUNT = 4001;
    Buffer<float> x(COUNT), gated(COUNT), alone(COUNT);
    for (long i = 0; i < COUNT; ++i) x[i] = (float)(i - 2000) * 0.01f;
    steps.gate(act, x.data(), x.data(), COUNT, gated.data());
    steps.gate(act, x.data(), nullptr, COUNT, alone.data());
    for (long i = 0; i < COUNT; ++i) {
        const double want = activated(act, x[i]);
        check(fabs(alone[i] - want) <= 3e-7 * std::max(1.0, fabs(want)), name + ", activation " +
              std::to_string((int)act) + " of " + std::to_string(x[i]) + ": " + std::to_string(alone[i]));
        check(gated[i] == alone[i] * x[i], name + ", gate " + std::to_string((int)act));
    }
    x[0] = NAN;
    steps.gate(act, x.data(), nullptr, 1, alone.data());
    check(isnan(alone[0]), name + ", activation of not a number");
}

// Scores in ascending order but for one: which experts they choose, and how rows are sorted.
void test_choice() {
    const float scores[] = {0, 1, 2, 3, /**/ 9, 1, 2, 3};
    for (bool normalised : {true, false}) {
        const Choice c(scores, 2, 4, 2, normalised);
        const long first[] = {0, 1, 1, 2, 4}, row[] = {2, 1, 0, 3};
        for (int i = 0; i < 5; ++i) check(c.first[i] == first[i], "first rows of experts");
        for (int i = 0; i < 4; ++i) check(c.row[i] == row[i], "rows of tokens");
        const double e = exp(1), all = normalised ? e * e * e + e * e : e * e * e + e * e + e + 1;
        check(fabs(c.weight[0] - e * e * e / all) < 1e-6 && fabs(c.weight[1] - e * e / all) < 1e-6, "weights of experts");
    }
    const float none[] = {NAN, NAN, NAN};
    const Choice c(none, 1, 3, 2, false);
    check(c.first[3] == 2 && c.row[0] != c.row[1], "experts of scores that are no numbers");
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
    for (auto act : {Activation::silu, Activation::gelu, Activation::gelu_tanh, Activation::relu})
        test_activation(steps, act, set);
    test_choice();
}

}  // namespace fewbits
