#include "random_weight.h"

#include <math.h>

#include "products.h"

namespace fewbits {
namespace {

constexpr int SCALE_BYTES[] = {2, 2, 4, 1};

// An exponent and a mantissa field to the number that they stand for.
double number(uint32_t bits, int mantissa, int exponents) {
    const int bias = (1 << (exponents - 1)) - 1, e = (int)(bits >> mantissa) & ((1 << exponents) - 1);
    const double m = bits & ((1u << mantissa) - 1);
    const double size = e ? ldexp(m + (1u << mantissa), e - bias - mantissa) : ldexp(m, 1 - bias - mantissa);
    return bits >> (mantissa + exponents) ? -size : size;
}

long tiles_of(long rows) { return (rows + TILE - 1) / TILE; }
long blocks_of(long columns) { return (columns + BLOCK - 1) / BLOCK; }

}  // namespace

std::string Kind::name() const {
    constexpr const char* SCALINGS[] = {"plain", "minimum", "zeros", "small", "lines", "nibbles"};
    return std::to_string(bits) + (table ? " bits by table, " : " bits, ") + SCALINGS[(int)scaling] + " of " +
           std::to_string(sub);
}

std::vector<Kind> known_kinds() {
    std::vector<Kind> found;
    for (int bits = 1; bits <= 8; ++bits)
        for (bool table : {false, true})
            for (int scaling = 0; scaling <= (int)Scaling::nibbles; ++scaling)
                for (int sub : {16, 32}) {
                    Weight w{};
                    w.bits = bits, w.table = table, w.scaling = (Scaling)scaling, w.sub = sub;
                    if (products_of(current()).knows(w)) found.push_back({bits, table, w.scaling, sub});
                }
    return found;
}

RandomWeight::RandomWeight(const Kind& kind, Scale scale, long rows, long columns, int group, uint64_t seed)
    : codes_(tiles_of(rows) * blocks_of(columns) * 64 * kind.bits),
      scales_(tiles_of(rows) * ((blocks_of(columns) + group - 1) / group) * TILE * SCALE_BYTES[(int)scale]),
      mins_(scales_.size()), subscales_(tiles_of(rows) * blocks_of(columns) * (BLOCK / kind.sub) * TILE),
      submins_(subscales_.size()) {
    Random random(seed);
    Weight& w = weight;
    w.rows = rows, w.columns = columns, w.bits = kind.bits, w.table = kind.table, w.scaling = kind.scaling;
    w.sub = kind.sub, w.scale = scale, w.group = group, w.factor = 0.5f;
    w.tiles = tiles_of(rows), w.blocks = blocks_of(columns), w.groups = (w.blocks + group - 1) / group;
    w.zero = w.table ? 128 : w.offsets() ? 0 : random.below(1 << w.bits);
    for (int i = 0; i < 16; ++i) {
        w.levels[i] = (uint8_t)(i == 3 ? 255 : random.below(256));
        w.values[i] = (float)(w.levels[i] - w.zero) + 0.25f;  // told from what products use
    }
    w.codes = codes_.data(), w.scales = scales_.data(), w.mins = mins_.data();
    w.subscales = subscales_.data(), w.submins = submins_.data();
    scale_planes(random);

    std::vector<uint8_t> codes(rows * columns);
    for (auto& code : codes) code = (uint8_t)random.below(1 << w.bits);
    interleave(codes.data(), rows, columns, w.bits, codes_.data());
    values.resize(codes.size()), rounded.resize(codes.size());
    for (long i = 0; i < rows * columns; ++i) {
        const long row = i / columns, column = i % columns, lane = row % TILE;
        const long entry = (row / TILE * w.groups + column / BLOCK / group) * TILE + lane;
        const long sub = (row / TILE * w.subs() + column / w.sub) * TILE + lane;
        double s = stored(scales_, entry) * w.factor, offset = 0;
        switch (w.scaling) {
            case Scaling::plain: break;
            case Scaling::minimum: offset = stored(mins_, entry); break;
            case Scaling::zeros: offset = -s * mins_[entry]; break;
            case Scaling::small: s *= (int8_t)subscales_[sub]; break;
            case Scaling::lines: s *= subscales_[sub], offset = -stored(mins_, entry) * submins_[sub]; break;
            case Scaling::nibbles:
                s *= subscales_[sub] & 15, offset = -stored(mins_, entry) * (subscales_[sub] >> 4);
                break;
        }
        const int code = codes[i];
        rounded[i] = s * ((w.table ? w.levels[code] : code) - w.zero) + offset;
        values[i] = w.table ? s * w.values[code] : rounded[i];
    }
}

// Scales of an ordinary size, a few of them denormal, bytes anything.
void RandomWeight::scale_planes(Random& random) {
    for (Buffer<uint8_t>* plane : {&scales_, &mins_, &subscales_, &submins_})
        for (long i = 0; i < plane->size(); ++i) (*plane)[i] = (uint8_t)random.bits();
    const bool bytes = weight.scaling == Scaling::zeros;
    for (Buffer<uint8_t>* plane : {&scales_, &mins_}) {
        if (plane == &mins_ && bytes) break;
        const int step = SCALE_BYTES[(int)weight.scale];
        for (long i = 0; i < plane->size(); i += step) {
            uint8_t& top = (*plane)[i + step - 1];  // sign and most of the exponent
            if (weight.scale == Scale::e8m0) top = (uint8_t)(118 + top % 8);
            else if (weight.scale != Scale::f16) top = (uint8_t)((top & 0x80) | 0x3C);
            else top = (uint8_t)((top & 0x83) | (i / step % 11 ? 0x20 + top % 8 * 4 : 0));
        }
    }
}

double RandomWeight::stored(const Buffer<uint8_t>& plane, long at) const {
    uint32_t bits = 0;
    const int size = SCALE_BYTES[(int)weight.scale];
    memcpy(&bits, plane.data() + at * size, size);  // little-endian, as everything here
    switch (weight.scale) {
        case Scale::f16: return number(bits, 10, 5);
        case Scale::bf16: return number(bits, 7, 8);
        case Scale::f32: return number(bits, 23, 8);
        case Scale::e8m0: break;
    }
    return ldexp(1, (int)bits - 128);
}

}  // namespace fewbits
