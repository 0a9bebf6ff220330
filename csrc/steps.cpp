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

static void norm(const float* x, const float* weight, long width, float epsilon, float* out) {
    F32 squares = {};
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        const F32 v = load<F32>(x + i);
        squares = fma(v, v, squares);
    }
    if (i < width) {
        const F32 v = load_some(x + i, width - i);
        squares = fma(v, v, squares);
    }
    const F32 factor = spread(1 / sqrtf(sum_of(squares) / (float)width + epsilon));
    over_row(x, weight, width, out, [&](F32 v, F32 w) { return v * factor * w; });
}

static void gate(const float* gate, const float* up, long width, float* out) {
    over_row(gate, up, width, out, [](F32 g, F32 u) { return g / (1.0f + exponential(-g)) * u; });
}

static void add(const float* x, long width, float* to) {
    over_row(x, to, width, to, [](F32 a, F32 b) { return a + b; });
}

static void rotate(float* x, const float* cos, const float* sin, long half) {
    for (long i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

extern const Steps steps = {widen, norm, gate, add, rotate};

}  // namespace fewbits::FEWBITS_ISA
