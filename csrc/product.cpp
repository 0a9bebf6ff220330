#include "product.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>

#include "pool.h"
#include "products.h"

namespace fewbits {
namespace {

using Memory = std::unique_ptr<char, void (*)(void*)>;

long aligned(long bytes) { return (bytes + 63) & ~63L; }

Memory allocate(long bytes) {
    Memory memory((char*)aligned_alloc(64, aligned(std::max(bytes, 64L))), free);
    if (!memory) throw std::bad_alloc();
    return memory;
}

constexpr long STRETCH = 32;  // blocks of a panel that a thread prepares at a time
constexpr long TOGETHER = 4;  // calls of `multiply` in a row, for few rows

// work(panel, first block, last block) for all of the activations
template <class Work>
void spread(int threads, const Activations& a, Work work) {
    const long stretches = (a.blocks + STRETCH - 1) / STRETCH;
    parallel(a.rows > 1 ? threads : 1, a.panels * stretches, [&](long i) {
        const long first = i % stretches * STRETCH;
        work(i / stretches, first, std::min(first + STRETCH, a.blocks));
    });
}

// Sums that weights of one zero point and size of sub-blocks meet.
struct Prepared {
    int zero, sub;
    bool offsets;
    Memory memory;
    Corrections corrections;
};

}  // namespace

Rounded::Rounded(const float* x, long rows, long columns, int threads) : set_(current()), memory_(nullptr, free) {
    const Products& kernels = products_of(set_);
    const int width = kernels.width(std::max(rows, 1L));
    const long panels = (rows + width - 1) / width, blocks = (columns + BLOCK - 1) / BLOCK;
    const long count = panels * blocks * width, codes = aligned(count * BLOCK), floats = aligned(count * 4);
    memory_ = allocate(codes + 4 * floats);
    char* at = memory_.get();
    acts_ = {rows, columns, blocks, panels, width, (int8_t*)at, (float*)(at + codes), (float*)(at + codes + floats),
             (int32_t*)(at + codes + 2 * floats)};
    spread(threads, acts_, [&](long panel, long first, long last) { kernels.quantize(x, acts_, panel, first, last); });
}

void product(const std::vector<Term>& terms, const Rounded& x, int threads) {
    const Products& kernels = products_of(x.set());
    const Activations& a = x.get();
    std::vector<Prepared> prepared;
    std::vector<const Corrections*> which;
    prepared.reserve(terms.size());
    for (const Term& t : terms) {
        const Weight& w = *t.weight;
        auto same = [&](const Prepared& p) { return p.zero == w.zero && p.sub == w.sub && p.offsets == w.offsets(); };
        auto found = std::find_if(prepared.begin(), prepared.end(), same);
        if (found == prepared.end()) {
            const long bytes = aligned(a.panels * a.width * w.subs() * 4);
            Memory memory = allocate(2 * bytes);
            const Corrections c{(int32_t*)memory.get(), (float*)(memory.get() + bytes)};
            spread(threads, a, [&](long panel, long first, long last) { kernels.correct(w, a, c, panel, first, last); });
            prepared.push_back({w.zero, w.sub, w.offsets(), std::move(memory), c});
            found = prepared.end() - 1;
        }
        which.push_back(&found->corrections);
    }
    struct Part {
        size_t term;
        long tile, panel;
    };
    std::vector<Part> parts;
    long tiles = 0;
    for (const Term& t : terms) tiles += t.weight->tiles;
    // neighbours in memory stay together where there are enough of them to share out evenly
    const long step = kernels.tiles * (a.panels == 1 && tiles >= 16 * TOGETHER * kernels.tiles * threads ? TOGETHER : 1);
    for (size_t i = 0; i < terms.size(); ++i)
        for (long panel = 0; panel < a.panels; panel += kernels.panels)
            for (long tile = 0; tile < terms[i].weight->tiles; tile += step) parts.push_back({i, tile, panel});
    parallel(threads, (long)parts.size(), [&](long i) {
        const Part& p = parts[i];
        const Term& t = terms[p.term];
        for (long tile = p.tile; tile < std::min(p.tile + step, t.weight->tiles); tile += kernels.tiles)
            kernels.multiply(*t.weight, a, *which[p.term], tile, p.panel, std::min(p.panel + kernels.panels, a.panels),
                             t.out, t.weight->rows, t.bias);
    });
}

void rows(const Weight& weight, const int64_t* ids, long count, float* out, int threads) {
    const Products& kernels = products_of(current());
    parallel(threads, count, [&](long i) { kernels.row(weight, ids[i], out + i * weight.columns); });
}

void columns(const Weight& weight, const int64_t* ids, long count, float* out, int threads) {
    const Products& kernels = products_of(current());
    parallel(threads, weight.tiles, [&](long tile) {
        const long left = std::min<long>(TILE, weight.rows - tile * TILE);
        for (long i = 0; i < count; ++i) {
            float values[TILE];
            kernels.column(weight, tile, ids[i], values);
            memcpy(out + i * weight.rows + tile * TILE, values, left * sizeof(float));
        }
    });
}

}  // namespace fewbits
