// Blocks of a file as planes, against their description taken value by value.
#include <stdexcept>

#include "check.h"
#include "prepare.h"

namespace fewbits {
namespace {

int value_of(const Values& values, const uint8_t* block, int number) {
    int found = 0;
    for (const Bits& b : values.bits) {
        const int i = number - b.first;
        if (i < 0 || i >= b.count) continue;
        int byte = block[b.at + i / (b.run * b.each) * b.run + i % b.run], part = i / b.run % b.each;
        if (b.swapped) byte = byte >> 4 | (byte & 15) << 4;
        int power = 1;
        for (int digit = 0; digit < part; ++digit) power *= 3;
        found |= b.digits ? (byte * power & 255) * 3 >> 8
                          : (byte >> (b.shift + part * b.bits) & ((1 << b.bits) - 1)) << b.to;
    }
    return (found - values.minus) & 255;
}

// The code of a row and column in a tile's record, from its planes of 4, 2 and 1 bits.
int code_in(const uint8_t* record, int bits, int row, int column) {
    const int quad = column / 4, at = 4 * row + column % 4;
    if (bits == 8) return record[64 * quad + at];
    int found = 0, done = 0;
    for (int plane = 4; plane; plane /= 2)
        if (bits & plane) {
            const int per = 8 / plane;
            found |= (record[64 * (done + quad / per) + at] >> quad % per * plane & ((1 << plane) - 1)) << done;
            done += plane;
        }
    return found;
}

struct Case {
    const char* name;
    BlockLayout layout;
};

Bits bits(int at, int bits, int run, int each, int count, int to = 0) {
    return {0, count, at, bits, run, each, 0, to, false, false};
}

Bits digits(int first, int count, int at, int run, int each) { return {first, count, at, 2, run, each, 0, 0, true, false}; }

std::vector<Case> cases() {
    const Values none{{}, 0};
    const Values sixes{{bits(4, 6, 4, 1, 4), {4, 4, 12, 4, 4, 1, 0, 0, false, false},
                        {4, 4, 4, 2, 4, 1, 6, 4, false, false}}, 0};
    const Values ternary{{digits(0, 160, 0, 32, 5), digits(160, 80, 32, 16, 5), digits(240, 16, 48, 4, 4)}, 0};
    return {
        {"8 bits", {34, 32, 8, 2, 0, -1, {{bits(2, 8, 32, 1, 32)}, 128}, none, none}},
        {"5 bits, a stream",
         {24, 32, 5, 2, 0, 2, {{bits(8, 4, 16, 2, 32), bits(4, 1, 1, 8, 32, 4)}, 0}, none, none}},
        {"4 bits, lines", {144, 256, 4, 2, 0, 2, {{bits(16, 4, 32, 2, 256)}, 0}, sixes, sixes}},
        {"3 bits, small",
         {110, 256, 3, 2, 108, -1, {{bits(32, 2, 32, 4, 256), bits(0, 1, 32, 8, 256, 2)}, 0},
          {{bits(96, 4, 8, 2, 16), bits(104, 2, 4, 4, 16, 4)}, 32}, none}},
        {"6 bits, small",
         {210, 256, 6, 2, 208, -1, {{bits(0, 4, 64, 2, 256), bits(128, 2, 32, 4, 256, 4)}, 0},
          {{bits(192, 8, 16, 1, 16)}, 0}, none}},
        {"digits", {54, 256, 2, 2, 52, -1, ternary, none, none}},
        {"1 bit, scale of a byte", {17, 128, 1, 1, 16, -1, {{bits(0, 1, 1, 8, 128)}, 0}, none, none}},
        {"halves swapped, scales elsewhere",
         {16, 32, 4, 0, 0, -1, {{{0, 32, 0, 4, 1, 2, 0, 0, false, true}}, 0}, none, none}},
        {"scale of 4 bytes", {20, 32, 4, 4, 16, -1, {{bits(0, 4, 16, 2, 32)}, 0}, none, none}},
    };
}

void test(const Case& c, long rows, long blocks, int threads, const std::string& set) {
    const BlockLayout& l = c.layout;
    const Unpacking unpacking(l);
    const long tiles = (rows + TILE - 1) / TILE, entries = tiles * TILE * blocks;
    const long subs = 4 * (long)unpacking.subscales.size(), more = 4 * (long)unpacking.submins.size();
    Random random(rows * 131 + blocks);
    Buffer<uint8_t> data(rows * blocks * l.bytes), codes(entries * l.columns / 8 * l.bits);
    Buffer<uint8_t> scales(entries * l.scale_bytes), mins(entries * l.scale_bytes), subscales(entries * subs),
        submins(entries * more);
    for (long i = 0; i < data.size(); ++i) data[i] = (uint8_t)random.bits();
    struct Rows {
        const uint8_t* data;
        long count, bytes;
    } const from{data.data(), rows, blocks * l.bytes};
    const auto row = [](const void* context, long r) {  // from the last one on
        const Rows& f = *static_cast<const Rows*>(context);
        return f.data + (f.count - 1 - r) * f.bytes;
    };
    prepare(unpacking, row, &from, rows, blocks,
            {codes.fill(7).data(), scales.fill(7).data(), l.min_at < 0 ? nullptr : mins.fill(7).data(),
             subscales.fill(7).data(), submins.fill(7).data()}, threads);
    bool right = true;
    for (long r = 0; r < tiles * TILE; ++r)
        for (long b = 0; b < blocks; ++b) {
            const uint8_t* block = r < rows ? row(&from, r) + b * l.bytes : nullptr;
            const long tile = r / TILE, lane = r % TILE, at = tile * blocks + b;
            for (int i = 0; i < l.columns; ++i) {
                const long record = (tile * blocks * l.columns + b * l.columns + i) / BLOCK;
                right &= code_in(codes.data() + record * 64 * l.bits, l.bits, (int)lane, i % BLOCK) ==
                         (block ? value_of(l.codes, block, i) : 0);
            }
            for (int i = 0; i < l.scale_bytes; ++i) {
                const long to = (at * TILE + lane) * l.scale_bytes + i;
                right &= scales[to] == (block ? block[l.scale_at + i] : 0);
                right &= l.min_at < 0 || mins[to] == (block ? block[l.min_at + i] : 0);
            }
            for (int i = 0; i < subs; ++i)
                right &= subscales[(at * subs + i) * TILE + lane] == (block ? value_of(l.subscales, block, i) : 0);
            for (int i = 0; i < more; ++i)
                right &= submins[(at * more + i) * TILE + lane] == (block ? value_of(l.submins, block, i) : 0);
        }
    check(right, set + ", blocks of " + c.name + ", " + std::to_string(rows) + " rows of " + std::to_string(blocks));
}

// Descriptions that leave their block.
void test_refusals(const std::string& set) {
    const Values none{{}, 0}, whole{{bits(2, 8, 32, 1, 32)}, 0};
    auto with = [&](auto change) {
        BlockLayout l{34, 32, 8, 2, 0, -1, whole, none, none};
        change(l, l.codes.bits[0]);
        try {
            Unpacking made(l);
        } catch (const std::invalid_argument&) {
            return;
        }
        check(false, set + ": a block that cannot be was taken");
    };
    with([](BlockLayout& l, Bits&) { l.bytes = 33; });
    with([](BlockLayout& l, Bits&) { l.bits = 7; });
    with([](BlockLayout& l, Bits&) { l.columns = 48; });
    with([](BlockLayout& l, Bits&) { l.scale_at = 33; });
    with([](BlockLayout& l, Bits&) { l.min_at = 40; });
    with([](BlockLayout& l, Bits&) { l.codes.bits.clear(); });
    with([](BlockLayout&, Bits& b) { b.at = -1; });
    with([](BlockLayout&, Bits& b) { b.at = 3; });
    with([](BlockLayout&, Bits& b) { b.run = 2; });
    with([](BlockLayout&, Bits& b) { b.each = 2; });
    with([](BlockLayout&, Bits& b) { b.count = 64; });
    with([](BlockLayout&, Bits& b) { b.to = 1; });
    with([](BlockLayout&, Bits& b) { b.first = 2; });
}

}  // namespace

void test_prepare(const std::string& set) {
    for (const Case& c : cases())
        for (long rows : {1, 16, 35, 200})
            for (long blocks : {1, 3}) test(c, rows, blocks, rows == 200 ? 3 : 1, set);
    test_refusals(set);
}

}  // namespace fewbits
