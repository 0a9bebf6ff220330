// Products by integer dot products: bytes of a weight, unsigned, times bytes of activations, signed, four at a time.
//
// A vector holds 4 columns of 16 rows, so sums need no adding across a vector. Few rows of activations, one panel, meet
// codes as they come out of the records; for more, two tiles are unpacked to bytes once and meet panel after panel.
#include "products.h"

#include <stdlib.h>

#include <algorithm>
#include <utility>

#include "unpack.h"

namespace fewbits::FEWBITS_ISA {

#if defined(__AVX512F__)
constexpr int TILES = 2;  // 24 of 32 registers hold sums of 2 tiles and 6 rows, as integers and as floats
constexpr int FEW[] = {1, 2, 3, 4, 6, 8, 12, 16};  // 24 hold a record of codes and sums of 16 rows
constexpr int WIDTHS[] = {5, 6};  // more rows than 16 need no narrower panels
#else
constexpr int TILES = 1;
constexpr int FEW[] = {1, 2, 3, 4};
constexpr int WIDTHS[] = {3, 4};
#endif
constexpr int FEWS = sizeof FEW / sizeof *FEW, MOST = FEW[FEWS - 1];
constexpr int WIDEST = WIDTHS[sizeof WIDTHS / sizeof *WIDTHS - 1];
constexpr long PANELS = 96;        // that share one unpacking
constexpr long STRETCH = 32;       // blocks unpacked at a time, so that they stay in the nearest cache
constexpr long FETCHED = 4096;     // bytes of records fetched ahead

static int width(long rows) {
    for (int w : FEW)
        if (w >= rows) return w;
    const long panels = (rows + WIDEST - 1) / WIDEST;
    for (int w : WIDTHS)
        if (w * panels >= rows) return w;
    return WIDEST;
}

// Activations ---------------------------------------------------------------------------------------------------------

INLINE int32_t bits_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

typedef int32_t I32x8 __attribute__((vector_size(32)));
typedef int32_t I32x4 __attribute__((vector_size(16)));

// `join` of every fourth lane
template <class Join>
INLINE I32x4 fourths(I32 v, Join join) {
    struct { I32x8 a, b; } eight;
    memcpy(&eight, &v, sizeof v);
    const I32x8 w = join(eight.a, eight.b);
    struct { I32x4 a, b; } four;
    memcpy(&four, &w, sizeof w);
    return join(four.a, four.b);
}

// The compiler is to take lanes from memory, not one by one out of a register.
#define IN_MEMORY(array) asm("" : "+m"(array))

// 32 floats to bytes, four a word; returns the scale. It has 12 bits, so that its product with MAGIC_VALUE is exact.
INLINE float quantize_block(const float* x, int32_t* codes, int32_t* sums) {
    const auto larger = [](auto a, auto b) { return a > b ? a : b; };
    const F32 values[2] = {load<F32>(x), load<F32>(x + LANES)};
    // in the order of magnitudes
    I32x4 sizes = fourths(larger((I32)values[0] & 0x7fffffff, (I32)values[1] & 0x7fffffff), larger);
    sizes = larger(sizes, __builtin_shuffle(sizes, I32x4{2, 3, 0, 1}));
    const int32_t most = larger(sizes, __builtin_shuffle(sizes, I32x4{1, 0, 3, 2}))[0];
    const bool strange = most >= 0x7f800000;  // infinite, or not a number
    if (strange || float_of(most) < 1e-30f) {
        memset(codes, 0, BLOCK);
        sums[0] = sums[1] = 0;
        return strange ? float_of(0x7fc00000) : 0;
    }
    const float scale = float_of((bits_of(float_of(most) * (1.0f / 127)) + 0xFFF) & ~0xFFF);
    const F32 inverse = spread(1 / scale);
    for (int half = 0; half < 2; ++half) {
        // to the nearest integer, ties to even
        const I32 rounded = (I32)(values[half] * inverse + MAGIC_VALUE) - MAGIC;
        const I8x16 narrow = __builtin_convertvector(rounded, I8x16);
        memcpy(codes + 4 * half, &narrow, sizeof narrow);
        int32_t sum[4];
        store(sum, fourths(rounded, [](auto a, auto b) { return a + b; }));
        IN_MEMORY(sum);
        sums[half] = sum[0] + sum[1] + sum[2] + sum[3];
    }
    return scale;
}

static void quantize(const float* x, const Activations& all, long panel, long first, long last) {
    const Activations to = all;  // what is written could lie in `all`, for all that the compiler knows
    const long width = to.width, whole = to.columns / BLOCK;
    for (long p = 0; p < width; ++p) {
        const long row = panel * width + p;
        const float* from = x + row * to.columns;
        for (long b = first; b < last; ++b) {
            float edge[BLOCK];
            const bool inside = row < to.rows && b < whole;
            if (!inside) {
                memset(edge, 0, sizeof edge);
                if (row < to.rows) memcpy(edge, from + b * BLOCK, 4 * (to.columns - b * BLOCK));
            }
            const long at = (panel * to.blocks + b) * width;
            int32_t fours[8], sums[2];
            const float scale = quantize_block(inside ? from + b * BLOCK : edge, fours, sums);
            IN_MEMORY(fours);
            int32_t* codes = (int32_t*)to.codes + at * 8 + p;
            for (int q = 0; q < 8; ++q) codes[q * width] = fours[q];
            to.scales[at + p] = scale;
            to.shifts[at + p] = scale * -MAGIC_VALUE;
            to.sums[at * 2 + p] = sums[0];
            to.sums[at * 2 + width + p] = sums[1];
        }
    }
}

static void correct(const Weight& w, const Activations& a, const Corrections& to, long panel, long first, long last) {
    const long width = a.width, parts = BLOCK / w.sub;
    const int zero = w.zero - (reg::run_of(w.bits, w.table, w.offsets()) == 0 ? reg::Sum<0>::BASE : 0);
    for (long b = panel * a.blocks + first; b < panel * a.blocks + last; ++b)
        for (int part = 0; part < parts; ++part) {
            const int32_t* sums = a.sums + (b * 2 + part) * width;
            const float* scales = a.scales + b * width;
            const long at = (b * parts + part) * width;
            for (int p = 0; p < width; ++p) {
                const int32_t sum = parts == 2 ? sums[p] : sums[p] + sums[width + p];
                if (w.offsets()) to.sums[at + p] = scales[p] * (float)sum;
                else to.starts[at + p] = MAGIC - zero * sum;
            }
        }
}

// Inner loops ---------------------------------------------------------------------------------------------------------

namespace reg {

// One panel, from a block on.
struct Cursor {
    const int32_t* codes;
    const float *scales, *shifts, *sums;
    const int32_t* starts;
};

INLINE Cursor cursor(const Activations& a, const Corrections& c, int parts, long panel, long block) {
    const long at = (panel * a.blocks + block) * a.width;
    return {(const int32_t*)a.codes + at * 8, a.scales + at, a.shifts + at, c.sums + at * parts, c.starts + at * parts};
}

// Whether a sum over QUADS quads is to be settled after quad `q`.
template <int RUN, int QUADS>
constexpr bool ends(int q) {
    return (q + 1) % (RUN && RUN < QUADS ? RUN : QUADS) == 0;
}

// sums[p] of LANES rows with P rows of activations, as codes come out of the records
template <class Codes, Scaling KIND, int SUB, int P>
INLINE void few_lanes(const Weight& w, const Activations& a, const Corrections& c, long tile, int lane,
                      float (*sums)[TILE]) {
    using Scales = Scales<KIND, SUB>;
    constexpr int PARTS = Scales::PARTS, QUADS = SUB / 4, CHAINS = P % 4 == 0 ? 4 : P % 2 == 0 ? 2 : 1,
                  RUN = Codes::run(Scales::OFFSETS);
    const U8 table = table_of(w);
    Cursor x = cursor(a, c, PARTS, 0, 0);
    const uint8_t* record = w.codes + tile * w.blocks * Codes::BYTES + 4 * lane;
    F32 y[P];
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) y[p] = F32{};
    for (long g = 0; g < w.groups; ++g) {
        const Scales group = Scales::group(w, tile, g, lane);
        const long last = (g + 1) * w.group < w.blocks ? (g + 1) * w.group : w.blocks;
        for (long b = g * w.group; b < last; ++b) {
            U8 code[8];
            Codes::unpack(record, table, code);
            if (lane == 0) {
                Scales::fetch(w, tile, b);
#pragma GCC unroll 8
                for (int line = 0; line < Codes::BYTES; line += 64) __builtin_prefetch(record + FETCHED + line);
            }
#pragma GCC unroll 2
            for (int part = 0; part < PARTS; ++part) {
                F32 scale, offset;
                Scales::part(group, w, tile, b, part, lane, scale, offset);
#pragma GCC unroll 16
                for (int first = 0; first < P; first += CHAINS) {
                    Sum<RUN> sum[CHAINS];
#pragma GCC unroll 4
                    for (int i = 0; i < CHAINS; ++i)
                        sum[i] = Sum<RUN>::from(spread(Scales::OFFSETS ? MAGIC : x.starts[part * P + first + i]));
#pragma GCC unroll 8
                    for (int q = part * QUADS; q < (part + 1) * QUADS; ++q)
#pragma GCC unroll 4
                        for (int i = 0; i < CHAINS; ++i) {
                            sum[i].add(code[q], &x.codes[q * P + first + i]);
                            if (ends<RUN, QUADS>(q)) sum[i].settle();
                        }
#pragma GCC unroll 4
                    for (int i = 0; i < CHAINS; ++i) {
                        const int p = first + i;
                        y[p] = fma(scaled(sum[i].all, spread(x.scales[p]), spread(x.shifts[p])), scale, y[p]);
                        if (Scales::OFFSETS) y[p] = fma(spread(x.sums[part * P + p]), offset, y[p]);
                    }
                }
            }
            record += Codes::BYTES;
            x.codes += 8 * P, x.scales += P, x.shifts += P, x.sums += PARTS * P, x.starts += PARTS * P;
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) store(sums[p] + lane, y[p]);
}

template <class Codes, Scaling KIND, int SUB, int P>
static void few(const Weight& w, const Activations& a, const Corrections& c, long tile, float (*sums)[TILE]) {
    few_lanes<Codes, KIND, SUB, P>(w, a, c, tile, 0, sums);
#pragma GCC unroll 1
    for (int lane = LANES; lane < TILE; lane += LANES) few_lanes<Codes, KIND, SUB, P>(w, a, c, tile, lane, sums);
}

// Bytes of TILES tiles, quad after quad, and their scales, sub-block after sub-block.
struct Unpacked {
    uint8_t* codes;           // [quads][TILES][64]
    float *scales, *offsets;  // [sub-blocks][TILES][16]
};

template <class Codes, Scaling KIND, int SUB>
static void unpack(const Weight& w, const long* tiles, long first, long last, const Unpacked& to) {
    using Scales = Scales<KIND, SUB>;
    const U8 table = table_of(w);
    for (int i = 0; i < TILES * PARTS; ++i)
        for (long b = first; b < last;) {
            const int t = i / PARTS, lane = i % PARTS * LANES;
            const long g = b / w.group, end = (g + 1) * w.group < last ? (g + 1) * w.group : last;
            const Scales group = Scales::group(w, tiles[t], g, lane);
            for (; b < end; ++b) {
                U8 code[8];
                Codes::unpack(w.codes + (tiles[t] * w.blocks + b) * Codes::BYTES + 4 * lane, table, code);
#pragma GCC unroll 8
                for (int q = 0; q < 8; ++q)
                    store(to.codes + (((b - first) * 8 + q) * TILES + t) * 64 + 4 * lane, code[q]);
                for (int part = 0; part < Scales::PARTS; ++part) {
                    const long at = (((b - first) * Scales::PARTS + part) * TILES + t) * TILE + lane;
                    F32 scale, offset;
                    Scales::part(group, w, tiles[t], b, part, lane, scale, offset);
                    store(to.scales + at, scale);
                    if (Scales::OFFSETS) store(to.offsets + at, offset);
                }
            }
        }
}

// Records that are unpacked next: they are fetched while the unpacked ones are multiplied.
struct Ahead {
    const uint8_t* from;
    long left, step;  // bytes of each tile; of them at a sub-block
    long apart;       // bytes from a tile's records to the next tile's

    void fetch() {
        for (long at = 0; at < step && left > 0; at += 64, from += 64, left -= 64)
            for (int t = 0; t < TILES; ++t) __builtin_prefetch(from + t * apart, 0, 2);
    }
};

// sums[p][t] += product of P rows with LANES rows of TILES unpacked tiles
template <int SUB, bool OFFSETS, int RUN, int P>
INLINE void many_lanes(const Unpacked& w, Cursor x, long blocks, Ahead& ahead, int lane, float (*sums)[TILE]) {
    constexpr int SUBS = BLOCK / SUB, QUADS = SUB / 4;
    const uint8_t* codes = w.codes + 4 * lane;
    const float *scales = w.scales + lane, *offsets = w.offsets + lane;
    F32 y[P][TILES];
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) y[p][t] = load<F32>(sums[p * TILES + t] + lane);
    for (long sub = 0; sub < blocks * SUBS; ++sub) {
        if (lane == 0) ahead.fetch();
        Sum<RUN> sum[P][TILES];
#pragma GCC unroll 6
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
            for (int t = 0; t < TILES; ++t) sum[p][t] = Sum<RUN>::from(spread(OFFSETS ? MAGIC : x.starts[p]));
#pragma GCC unroll 8
        for (int q = 0; q < QUADS; ++q) {
            U8 code[TILES];
#pragma GCC unroll 2
            for (int t = 0; t < TILES; ++t) code[t] = load<U8>(codes + 64 * t);
#pragma GCC unroll 6
            for (int p = 0; p < P; ++p) {
                const I32 four = spread(x.codes[p]);
#pragma GCC unroll 2
                for (int t = 0; t < TILES; ++t) {
                    sum[p][t].add(code[t], four);
                    if (ends<RUN, QUADS>(q)) sum[p][t].settle();
                }
            }
            codes += 64 * TILES, x.codes += P;
        }
#pragma GCC unroll 6
        for (int p = 0; p < P; ++p) {
            const F32 factor = spread(x.scales[p]), shift = spread(x.shifts[p]);
#pragma GCC unroll 2
            for (int t = 0; t < TILES; ++t) {
                y[p][t] = fma(scaled(sum[p][t].all, factor, shift), load<F32>(scales + t * TILE), y[p][t]);
                if (OFFSETS) y[p][t] = fma(spread(x.sums[p]), load<F32>(offsets + t * TILE), y[p][t]);
            }
        }
        scales += TILES * TILE, offsets += TILES * TILE;
        x.starts += P, x.sums += P;
        if (SUBS == 1 || sub % 2) x.scales += P, x.shifts += P;
    }
#pragma GCC unroll 6
    for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
        for (int t = 0; t < TILES; ++t) store(sums[p * TILES + t] + lane, y[p][t]);
}

template <int SUB, bool OFFSETS, int RUN, int P>
static void many(const Unpacked& w, Cursor x, long blocks, Ahead& ahead, float (*sums)[TILE]) {
    many_lanes<SUB, OFFSETS, RUN, P>(w, x, blocks, ahead, 0, sums);
#pragma GCC unroll 1
    for (int lane = LANES; lane < TILE; lane += LANES)
        many_lanes<SUB, OFFSETS, RUN, P>(w, x, blocks, ahead, lane, sums);
}

// Choosing among instances --------------------------------------------------------------------------------------------

using Few = void (*)(const Weight&, const Activations&, const Corrections&, long, float (*)[TILE]);
using Unpack = void (*)(const Weight&, const long*, long, long, const Unpacked&);
using Many = void (*)(const Unpacked&, Cursor, long, Ahead&, float (*)[TILE]);

struct Instances {
    Few few[FEWS];
    Unpack unpack;
};

template <class Codes, Scaling KIND, int SUB, size_t... I>
constexpr Instances made(std::index_sequence<I...>) {
    return {{few<Codes, KIND, SUB, FEW[I]>...}, unpack<Codes, KIND, SUB>};
}

template <int BITS, bool TABLE, Scaling KIND, int SUB>
constexpr Instances made() {
    return made<Codes<BITS, TABLE>, KIND, SUB>(std::make_index_sequence<FEWS>());
}

struct Row {
    int bits;
    bool table;
    Scaling scaling;
    int sub;
    Instances instances;
};

#define ROW(bits, table, scaling, sub) {bits, table, Scaling::scaling, sub, made<bits, table, Scaling::scaling, sub>()}
static const Row rows[] = {
    ROW(2, false, plain, 32), ROW(3, false, plain, 32),   ROW(4, false, plain, 32),   ROW(5, false, plain, 32),
    ROW(8, false, plain, 32), ROW(4, true, plain, 32),    ROW(1, true, plain, 32),    ROW(4, false, minimum, 32),
    ROW(5, false, minimum, 32), ROW(2, false, zeros, 32), ROW(3, false, zeros, 32),   ROW(4, false, zeros, 32),
    ROW(8, false, zeros, 32), ROW(2, false, nibbles, 16), ROW(3, false, small, 16),   ROW(6, false, small, 16),
    ROW(4, true, small, 32),  ROW(4, false, lines, 32),   ROW(5, false, lines, 32),
};
#undef ROW

static const Instances* find(const Weight& w) {
    for (const Row& r : rows)
        if (r.bits == w.bits && r.table == w.table && r.scaling == w.scaling && r.sub == w.sub) return &r.instances;
    return nullptr;
}

static bool knows(const Weight& w) { return find(w) != nullptr; }

template <int SUB, bool OFFSETS, int RUN>
static Many many_of(int width) {
    switch (width) {
#if defined(__AVX512F__)
        case 5: return many<SUB, OFFSETS, RUN, 5>;
        case 6: return many<SUB, OFFSETS, RUN, 6>;
#else
        case 3: return many<SUB, OFFSETS, RUN, 3>;
        case 4: return many<SUB, OFFSETS, RUN, 4>;
#endif
    }
    return nullptr;
}

template <int RUN>
static Many many_of(const Weight& w, int width) {
    if (w.sub == 16) return w.offsets() ? many_of<16, true, RUN>(width) : many_of<16, false, RUN>(width);
    return w.offsets() ? many_of<32, true, RUN>(width) : many_of<32, false, RUN>(width);
}

static Many many_of(const Weight& w, int width) {
#if !defined(__AVX512F__)  // which takes one instruction whatever the codes are
    switch (run_of(w.bits, w.table, w.offsets())) {
        case 1: return many_of<1>(w, width);
        case 2: return many_of<2>(w, width);
        case 4: return many_of<4>(w, width);
        case 8: return many_of<8>(w, width);
    }
#endif
    return many_of<0>(w, width);
}

}  // namespace reg

// Whole products ------------------------------------------------------------------------------------------------------

INLINE void put(const Weight& w, const float* sums, long tile, const float* bias, float* row) {
    const long first = tile * TILE, count = w.rows - first < TILE ? w.rows - first : TILE;
    if (count == TILE) {
        const F32 all = load<F32>(sums);
        store(row + first, bias ? all + load<F32>(bias + first) : all);
        return;
    }
    for (long i = 0; i < count; ++i) row[first + i] = sums[i] + (bias ? bias[first + i] : 0);
}

// Memory that a thread keeps for unpacked tiles.
struct Scratch {
    char* at = (char*)aligned_alloc(64, SIZE);
    ~Scratch() { free(at); }
    static constexpr long CODES = STRETCH * BLOCK * TILE * TILES, SCALES = STRETCH * 2 * TILES * (long)sizeof(F32),
                          SUMS = PANELS * WIDEST * TILES * (long)sizeof(F32), SIZE = CODES + 2 * SCALES + SUMS;
};

// The records from `block` on, or where it is the last the first ones of the next tiles, during `subs` sub-blocks.
static reg::Ahead next(const Weight& w, long tile, long block, long subs) {
    const long bytes = 64 * w.bits, row = w.blocks * bytes;
    if (block == w.blocks) tile += TILES, block = 0;
    if (tile + TILES > w.tiles) return {nullptr, 0, 0, 0};
    const long blocks = w.blocks - block < STRETCH ? w.blocks - block : STRETCH;
    return {w.codes + tile * row + block * bytes, blocks * bytes, (blocks * bytes / subs + 64) & ~63L, row};
}

static void multiply(const Weight& w, const Activations& a, const Corrections& c, long tile, long first_panel,
                     long last_panel, float* out, long stride, const float* bias) {
    const reg::Instances* instances = reg::find(w);
    if (a.panels == 1) {
        const reg::Few few = instances->few[std::find(FEW, FEW + FEWS, a.width) - FEW];
        for (int t = 0; t < TILES && tile + t < w.tiles; ++t) {
            float sums[MOST][TILE];
            few(w, a, c, tile + t, sums);
            for (long row = 0; row < a.rows; ++row) put(w, sums[row], tile + t, bias, out + row * stride);
        }
        return;
    }
    static thread_local Scratch scratch;
    const reg::Unpacked unpacked{(uint8_t*)scratch.at, (float*)(scratch.at + Scratch::CODES),
                                 (float*)(scratch.at + Scratch::CODES + Scratch::SCALES)};
    float(*sums)[TILE] = (float(*)[TILE])(scratch.at + Scratch::CODES + 2 * Scratch::SCALES);  // [panels][width][TILES]
    const long panels = last_panel - first_panel;
    memset(sums, 0, panels * a.width * TILES * sizeof *sums);
    long tiles[TILES];
    for (int t = 0; t < TILES; ++t) tiles[t] = tile + t < w.tiles ? tile + t : tile;
    const reg::Many many = reg::many_of(w, a.width);
    for (long block = 0; block < w.blocks; block += STRETCH) {
        const long end = block + STRETCH < w.blocks ? block + STRETCH : w.blocks;
        instances->unpack(w, tiles, block, end, unpacked);
        reg::Ahead ahead = next(w, tile, end, panels * (end - block) * (BLOCK / w.sub));
        for (long p = 0; p < panels; ++p)
            many(unpacked, reg::cursor(a, c, BLOCK / w.sub, first_panel + p, block), end - block, ahead,
                 sums + p * a.width * TILES);
    }
    for (long p = 0; p < panels * a.width; ++p) {
        const long row = first_panel * a.width + p;
        if (row >= a.rows) break;
        for (int t = 0; t < TILES && tile + t < w.tiles; ++t)
            put(w, sums[p * TILES + t], tile + t, bias, out + row * stride);
    }
}

extern const Products products = {reg::knows, width, quantize, correct, TILES, PANELS, multiply};

}  // namespace fewbits::FEWBITS_ISA
