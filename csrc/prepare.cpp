#include "prepare.h"

#include <algorithm>
#include <stdexcept>

#include "pool.h"

namespace fewbits {
namespace {

constexpr long PART = 1 << 16;  // bytes of a file that a thread takes at a time

void require(bool right, const char* what) {
    if (!right) throw std::invalid_argument(what);
}

void check(const Bits& b, int bytes, int count) {
    require(0 <= b.first && 0 < b.count && b.first <= count - b.count && b.first % 4 == 0 && b.count % 4 == 0,
            "values of a block come in fours");
    require(1 <= b.bits && b.bits <= 8 && 0 <= b.to && b.to + b.bits <= 8, "values are bytes");
    require(1 <= b.each && b.each <= 8 && 0 <= b.shift && b.shift < 8, "bits of a byte");
    require(1 <= b.run && b.run <= count, "a run of values");
    if (b.digits) require(b.each <= 5 && b.run % 4 == 0 && !b.shift && !b.to, "a byte has at most five digits");
    else require(b.shift + b.each * b.bits <= 8, "a byte has eight bits");
    require(b.run % 4 == 0 || (b.run == 1 && b.each % 2 == 0 && b.each * b.bits == 8), "runs are of 1 or fours");
    require(!b.swapped || (b.run == 1 && b.bits == 4), "halves of bytes are swapped");
    const int last = b.count - 1, span = b.run * b.each;
    const int end = b.at + last / span * b.run + std::min(last % span, b.run - 1);
    require(0 <= b.at && b.at < bytes && end < bytes, "bits lie beyond the block");
}

}  // namespace

Unpacking::Unpacking(const BlockLayout& l) : layout(l) {
    require(4 <= l.bytes && l.bytes < 1 << 28, "a block has 4 bytes or more");
    require(BLOCK <= l.columns && l.columns <= BLOCK * SUPER && l.columns % BLOCK == 0, "columns of a block");
    require((1 <= l.bits && l.bits <= 6) || l.bits == 8, "codes have 1 to 6, or 8 bits");
    require(0 <= l.scale_bytes && l.scale_bytes <= 4 && l.scale_bytes != 3, "scales have 1, 2 or 4 bytes");
    require(l.scale_bytes || l.min_at < 0, "a minimum without a scale");
    codes = quads(l.codes, l.columns);
    require((int)codes.size() * 4 == l.columns, "a code for every column");
    subscales = quads(l.subscales, l.columns / 16);
    submins = quads(l.submins, l.columns / 16);
    if (l.scale_bytes) scale = lane(l.scale_at);
    if (l.min_at >= 0) min = lane(l.min_at);
    require((int)words.size() <= MOST_WORDS, "too many words in a block");
}

// Which of the words begins at a byte.
int Unpacking::word(int at) {
    const int found = (int)(std::find(words.begin(), words.end(), at) - words.begin());
    if (found == (int)words.size()) words.push_back(at);
    return found;
}

Unpacking::Lane Unpacking::lane(int at) {
    require(0 <= at && at <= layout.bytes - layout.scale_bytes, "a scale lies beyond the block");
    const int begin = std::min(at, layout.bytes - 4);
    return {word(begin), 8 * (at - begin)};
}

std::vector<Unpacking::Quad> Unpacking::quads(const Values& values, int most) {
    require(0 <= values.minus && values.minus < 256, "values are bytes");
    int count = 0;
    for (const Bits& b : values.bits) {
        check(b, layout.bytes, most);
        count = std::max(count, b.first + b.count);
    }
    std::vector<Quad> found;
    for (int value = 0; value < count; value += 4) {
        const int begin = (int)steps.size();
        for (const Bits& b : values.bits)
            if (b.first <= value && value < b.first + b.count) add(b, value - b.first);
        found.push_back({begin, (int)steps.size()});
    }
    return found;
}

void Unpacking::add(const Bits& b, int i) {
    const int byte = i / (b.run * b.each) * b.run + i % b.run, part = i / b.run % b.each;
    const uint32_t mask = (1u << b.bits) - 1;
    if (b.run == 1) {
        const int begin = std::min(b.at + (i / b.each & ~3), layout.bytes - 4);
        const uint32_t right = 8 * (b.at + i / b.each - begin) + i % b.each * b.bits;
        const Kind kind = b.swapped ? Kind::swapped : Kind::stream;
        steps.push_back({kind, word(begin), right, (uint32_t)b.to, mask, (uint32_t)b.bits, 0});
        return;
    }
    require(b.at + byte <= layout.bytes - 4, "bits lie beyond the block");
    Step step{Kind::four, word(b.at + byte), 0, 0, (mask << b.to) * 0x01010101u, 0, 0};
    const int down = b.shift + part * b.bits - b.to;
    if (b.digits) {
        step.kind = Kind::digits, step.power = 1;
        for (int digit = 0; digit < part; ++digit) step.power *= 3;
    } else if (down > 0) {
        step.right = down;
    } else {
        step.left = -down;
    }
    steps.push_back(step);
}

void prepare(const Unpacking& s, const uint8_t* (*row)(const void*, long), const void* context, long rows, long blocks,
             const Planes& p, int threads) {
    const long tiles = (rows + TILE - 1) / TILE, each = std::max(1L, PART / (TILE * blocks * s.layout.bytes));
    const long record = 64L * s.layout.bits * s.layout.columns / BLOCK, entry = TILE * s.layout.scale_bytes;
    const auto& tile = preparers_of(current()).tile;
    parallel(threads, (tiles + each - 1) / each, [&](long part) {
        for (long t = part * each; t < std::min(tiles, (part + 1) * each); ++t) {
            const int count = (int)std::min((long)TILE, rows - t * TILE);
            const uint8_t* at[TILE];
            for (int r = 0; r < TILE; ++r) at[r] = row(context, t * TILE + std::min(r, count - 1));
            const long first = t * blocks;
            tile(s, at, count, blocks,
                 {p.codes + first * record, p.scales ? p.scales + first * entry : nullptr,
                  p.mins ? p.mins + first * entry : nullptr,
                  p.subscales ? p.subscales + first * 4 * TILE * (long)s.subscales.size() : nullptr,
                  p.submins ? p.submins + first * 4 * TILE * (long)s.submins.size() : nullptr});
        }
    });
}

}  // namespace fewbits
