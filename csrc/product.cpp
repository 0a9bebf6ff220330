#include "product.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>

#include "decode.h"
#include "floats.h"
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

// Activations of so many rows, without memory yet.
Activations shaped(const Products& kernels, long rows, long columns) {
    const int width = kernels.width(std::max(rows, 1L));
    return {rows, columns, (columns + BLOCK - 1) / BLOCK, (rows + width - 1) / width, width, nullptr, nullptr, nullptr,
            nullptr};
}

// Each of the four arrays in lines of its own.
struct Sizes {
    long codes, floats;
    explicit Sizes(const Activations& a)
        : codes(aligned(a.panels * a.blocks * a.width * BLOCK)), floats(aligned(a.panels * a.blocks * a.width * 4)) {}
    long all() const { return codes + 4 * floats; }
};

void place(Activations& a, char* at) {
    const Sizes size(a);
    a.codes = (int8_t*)at, a.scales = (float*)(at + size.codes), a.shifts = (float*)(at + size.codes + size.floats);
    a.sums = (int32_t*)(at + size.codes + 2 * size.floats);
}

long bytes_of_corrections(const Weight& w, const Activations& a) {
    return 2 * aligned(a.panels * a.width * w.subs() * 4);
}

Corrections corrections_at(char* at, const Weight& w, const Activations& a) {
    return {(int32_t*)at, (float*)(at + bytes_of_corrections(w, a) / 2)};
}

// Sums that weights of one zero point and size of sub-blocks meet.
struct Prepared {
    int zero, sub;
    bool offsets;
    Memory memory;
    Corrections corrections;
};

struct Work {
    const Weight* weight;
    const Activations* x;
    Corrections corrections;
    float* out;
    const float* bias;
};

void multiply(const Products& kernels, const std::vector<Work>& works, int threads) {
    struct Part {
        const Work* work;
        long tile, panel;
    };
    long tiles = 0;
    bool few = true;
    for (const Work& w : works) tiles += w.weight->tiles, few = few && w.x->panels == 1;
    // neighbours in memory stay together where there are enough of them to share out evenly
    const long step = kernels.tiles * (few && tiles >= 16 * TOGETHER * kernels.tiles * threads ? TOGETHER : 1);
    std::vector<Part> parts;
    for (const Work& w : works)
        for (long panel = 0; panel < w.x->panels; panel += kernels.panels)
            for (long tile = 0; tile < w.weight->tiles; tile += step) parts.push_back({&w, tile, panel});
    parallel(threads, (long)parts.size(), [&](long i) {
        const Part& p = parts[i];
        const Work& w = *p.work;
        const long last = std::min(p.panel + kernels.panels, w.x->panels);
        for (long tile = p.tile; tile < std::min(p.tile + step, w.weight->tiles); tile += kernels.tiles)
            kernels.multiply(*w.weight, *w.x, w.corrections, tile, p.panel, last, w.out, w.weight->rows, w.bias);
    });
}

}  // namespace

Rounded::Rounded(const float* x, long rows, long columns, int threads) : set_(current()), memory_(nullptr, free) {
    const Products& kernels = products_of(set_);
    acts_ = shaped(kernels, rows, columns);
    memory_ = allocate(Sizes(acts_).all());
    place(acts_, memory_.get());
    spread(threads, acts_, [&](long panel, long first, long last) { kernels.quantize(x, acts_, panel, first, last); });
}

void product(const std::vector<Term>& terms, const Rounded& x, int threads) {
    const Products& kernels = products_of(x.set());
    const Activations& a = x.get();
    std::vector<Prepared> prepared;
    std::vector<Work> works;
    for (const Term& t : terms) {
        const Weight& w = *t.weight;
        auto same = [&](const Prepared& p) { return p.zero == w.zero && p.sub == w.sub && p.offsets == w.offsets(); };
        auto found = std::find_if(prepared.begin(), prepared.end(), same);
        if (found == prepared.end()) {
            Memory memory = allocate(bytes_of_corrections(w, a));
            const Corrections c = corrections_at(memory.get(), w, a);
            spread(threads, a,
                   [&](long panel, long first, long last) { kernels.correct(w, a, c, panel, first, last); });
            prepared.push_back({w.zero, w.sub, w.offsets(), std::move(memory), c});
            found = prepared.end() - 1;
        }
        works.push_back({&w, &a, found->corrections, t.out, t.bias});
    }
    multiply(kernels, works, threads);
}

void grouped(const std::vector<Share>& shares, const float* x, float* out, int threads) {
    const Products& kernels = products_of(current());
    std::vector<Activations> acts;
    long bytes = 0;
    for (const Share& s : shares) {
        acts.push_back(shaped(kernels, s.count, s.weight->columns));
        bytes += Sizes(acts.back()).all() + bytes_of_corrections(*s.weight, acts.back());
    }
    const Memory memory = allocate(bytes);
    struct Panel {
        size_t share;
        long panel;
    };
    std::vector<Panel> panels;
    std::vector<Work> works;
    char* at = memory.get();
    for (size_t i = 0; i < shares.size(); ++i) {
        const Weight& w = *shares[i].weight;
        Activations& a = acts[i];
        place(a, at);
        at += Sizes(a).all();
        works.push_back({&w, &a, corrections_at(at, w, a), out + shares[i].first * w.rows, nullptr});
        at += bytes_of_corrections(w, a);
        for (long panel = 0; panel < a.panels; ++panel) panels.push_back({i, panel});
    }
    parallel(threads, (long)panels.size(), [&](long i) {
        const auto [share, panel] = panels[i];
        const Work& w = works[share];
        kernels.quantize(x + shares[share].first * w.weight->columns, acts[share], panel, 0, acts[share].blocks);
        kernels.correct(*w.weight, acts[share], w.corrections, panel, 0, acts[share].blocks);
    });
    multiply(kernels, works, threads);
}

void product(const FloatWeight& weight, const float* x, long count, float* out, const float* bias, int threads) {
    const FloatProducts& kernels = float_products_of(current());
    constexpr long PART = 64;  // rows of the weight that a thread takes at a time
    parallel(threads, (weight.rows + PART - 1) / PART, [&](long part) {
        const long first = part * PART;
        kernels.multiply(weight, x, count, first, std::min(PART, weight.rows - first), out, bias);
    });
}

void rows(const Weight& weight, const int64_t* ids, long count, float* out, int threads) {
    std::vector<long> runs;  // where ids of another tile begin, or more than a tile has
    for (long i = 0; i < count; ++i)
        if (i == 0 || ids[i] / TILE != ids[i - 1] / TILE || i - runs.back() == TILE) runs.push_back(i);
    const Decoders& decoders = decoders_of(current());
    parallel(threads, (long)runs.size(), [&](long run) {
        const long first = runs[run], last = run + 1 < (long)runs.size() ? runs[run + 1] : count;
        int lanes[TILE];
        float* to[TILE];
        for (long i = first; i < last; ++i)
            lanes[i - first] = (int)(ids[i] % TILE), to[i - first] = out + i * weight.columns;
        decoders.rows(weight, ids[first] / TILE, lanes, (int)(last - first), to);
    });
}

void columns(const Weight& weight, const int64_t* ids, long count, float* out, int threads) {
    const Decoders& decoders = decoders_of(current());
    parallel(threads, weight.tiles, [&](long tile) {
        const long left = std::min<long>(TILE, weight.rows - tile * TILE);
        for (long i = 0; i < count; ++i) {
            float values[TILE];
            decoders.column(weight, tile, ids[i], values);
            memcpy(out + i * weight.rows + tile * TILE, values, left * sizeof(float));
        }
    });
}

void turned(const Weight& weight, long first, long tiles, float* out, int threads) {
    const Decoders& decoders = decoders_of(current());
    parallel(threads, tiles, [&](long i) { decoders.turned(weight, first + i, out + i * TILE, tiles * TILE); });
}

}  // namespace fewbits
