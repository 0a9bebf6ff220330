#include "steps.h"

#include "lanes.h"

namespace fewbits::FEWBITS_ISA {

static void widen(Scale kind, const uint8_t* from, long width, float* out) {
    if (kind == Scale::f32) {
        memcpy(out, from, width * sizeof(float));
        return;
    }
    auto values = [&](const void* at) { return kind == Scale::f16 ? from_f16(at) : from_bf16(at); };
    long i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, values(from + 2 * i));
    if (i == width) return;
    uint16_t end[LANES] = {};
    memcpy(end, from + 2 * i, 2 * (width - i));
    store_some(out + i, values(end), width - i);
}

// sum of one(x[i])
template <class One>
INLINE float sum_over(const float* x, long width, One one) {
    F32 sum = {};
    long i = 0;
    for (; i + LANES <= width; i += LANES) sum = sum + one(load<F32>(x + i));
    if (i < width) {
        float end[LANES];
        store(end, one(load_some(x + i, width - i)));
        sum = sum + load_some(end, width - i);
    }
    return sum_of(sum);
}

static void norm(const float* x, const float* weight, long width, float epsilon, float* out) {
    const float squares = sum_over(x, width, [](F32 v) { return v * v; });
    const F32 factor = spread(1 / sqrtf(squares / (float)width + epsilon));
    over_row(x, weight, width, out, [&](F32 v, F32 w) { return v * factor * w; });
}

static void layer_norm(const float* x, const float* weight, const float* bias, long width, float epsilon, float* out) {
    const F32 mean = spread(sum_over(x, width, [](F32 v) { return v; }) / (float)width);
    const float squares = sum_over(x, width, [&](F32 v) { return (v - mean) * (v - mean); });
    const F32 factor = spread(1 / sqrtf(squares / (float)width + epsilon));
    over_row(x, weight, width, out, [&](F32 v, F32 w) { return (v - mean) * factor * w; });
    if (bias) over_row(out, bias, width, out, [](F32 v, F32 b) { return v + b; });
}

INLINE F32 silu(F32 x) { return x / (1.0f + exponential(-x)); }

// x (1 + tanh u) / 2 = x / (1 + e^-2u)
INLINE F32 gelu_tanh(F32 x) {
    constexpr float TWICE = 1.5957691216f;  // 2 sqrt(2 / pi)
    return x / (1.0f + exponential(-(x * TWICE) * fma(x * x, spread(0.044715f), spread(1.0f))));
}

// What lies beyond |x| of a normal distribution is e^(-x^2/2) t P(t) with t = 1 / (1 + 0.3 |x| / sqrt 2): P fitted to a
// relative error below 2e-8.
INLINE F32 gelu(F32 x) {
    const I32 below = x < spread(0.0f);
    const F32 t = 1.0f / fma(choose(below, -x, x), spread(0.3f * 0.70710678f), spread(1.0f));
    F32 y = spread(-0.0638517304f);
    for (float c : {0.238037989f, -0.24554581f, 0.2606492f, -0.0372798072f, 0.102702205f, 0.075540383f, 0.0851387472f,
                    0.0846088153f})
        y = fma(y, t, spread(c));
    const F32 beyond = x * y * t * exponential(x * x * -0.5f);
    return choose(below, beyond, x - beyond);
}

template <class Act>
static void activate(const float* gate, const float* up, long width, float* out, Act act) {
    if (up) over_row(gate, up, width, out, [&](F32 g, F32 u) { return act(g) * u; });
    else over_row(gate, gate, width, out, [&](F32 g, F32) { return act(g); });
}

static void gate(Activation kind, const float* gate, const float* up, long width, float* out) {
    switch (kind) {
        case Activation::silu: return activate(gate, up, width, out, [](F32 x) { return silu(x); });
        case Activation::gelu: return activate(gate, up, width, out, [](F32 x) { return gelu(x); });
        case Activation::gelu_tanh: return activate(gate, up, width, out, [](F32 x) { return gelu_tanh(x); });
        case Activation::relu: return activate(gate, up, width, out, [](F32 x) { return choose(x < 0.0f, F32{}, x); });
    }
}

static void add(const float* x, float factor, long width, float* to) {
    over_row(x, to, width, to, [&](F32 a, F32 b) { return fma(a, spread(factor), b); });
}

static void scale(float* x, float factor, long width) {
    over_row(x, x, width, x, [&](F32 v, F32) { return v * spread(factor); });
}

static void cap(float* x, float most, long width) {
    over_row(x, x, width, x, [&](F32 v, F32) { return tangent(v / spread(most)) * spread(most); });
}

static void rotate(float* x, const float* cos, const float* sin, long half) {
    for (long i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

extern const Steps steps = {widen, norm, layer_norm, gate, add, scale, cap, rotate};

}  // namespace fewbits::FEWBITS_ISA
