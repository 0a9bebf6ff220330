#include "layout.h"

#include <string.h>

#include "weight.h"

namespace fewbits {
namespace {

using Quads = uint8_t[8][64];  // of a block: four columns of 16 rows side by side

void join(const Quads quads, int bits, uint8_t* record) {
    if (bits == 8) {
        memcpy(record, quads, sizeof(Quads));
        return;
    }
    memset(record, 0, 64 * bits);
    int done = 0;
    for (int plane = 4; plane; plane /= 2)
        if (bits & plane) {
            const int per = 8 / plane;
            for (int q = 0; q < 8; ++q)
                for (int i = 0; i < 64; ++i)
                    record[64 * (done + q / per) + i] |=
                        (quads[q][i] >> done & ((1 << plane) - 1)) << q % per * plane;
            done += plane;
        }
}

void split(const uint8_t* record, int bits, Quads quads) {
    if (bits == 8) {
        memcpy(quads, record, sizeof(Quads));
        return;
    }
    memset(quads, 0, sizeof(Quads));
    int done = 0;
    for (int plane = 4; plane; plane /= 2)
        if (bits & plane) {
            const int per = 8 / plane;
            for (int q = 0; q < 8; ++q)
                for (int i = 0; i < 64; ++i)
                    quads[q][i] |= (record[64 * (done + q / per) + i] >> q % per * plane & ((1 << plane) - 1)) << done;
            done += plane;
        }
}

// Calls visit(row of the tile, first column of the block, columns, bytes of the record) for all of a tile's rows.
template <class Visit>
void each(long rows, long columns, long tile, long block, Visit visit) {
    const long left = rows - tile * TILE, wide = columns - block * BLOCK;
    for (int r = 0; r < TILE && r < left; ++r)
        visit(r, (tile * TILE + r) * columns + block * BLOCK, (int)(wide < BLOCK ? wide : BLOCK));
}

}  // namespace

void interleave(const uint8_t* codes, long rows, long columns, int bits, uint8_t* records) {
    const long tiles = (rows + TILE - 1) / TILE, blocks = (columns + BLOCK - 1) / BLOCK;
    for (long t = 0; t < tiles; ++t)
        for (long b = 0; b < blocks; ++b) {
            Quads quads = {};
            each(rows, columns, t, b, [&](int r, long at, int count) {
                if (count == BLOCK)
                    for (int q = 0; q < 8; ++q) memcpy(&quads[q][4 * r], codes + at + 4 * q, 4);
                else
                    for (int c = 0; c < count; ++c) quads[c / 4][4 * r + c % 4] = codes[at + c];
            });
            join(quads, bits, records + (t * blocks + b) * 64 * bits);
        }
}

void deinterleave(const uint8_t* records, long rows, long columns, int bits, uint8_t* codes) {
    const long tiles = (rows + TILE - 1) / TILE, blocks = (columns + BLOCK - 1) / BLOCK;
    for (long t = 0; t < tiles; ++t)
        for (long b = 0; b < blocks; ++b) {
            Quads quads;
            split(records + (t * blocks + b) * 64 * bits, bits, quads);
            each(rows, columns, t, b, [&](int r, long at, int count) {
                for (int c = 0; c < count; ++c) codes[at + c] = quads[c / 4][4 * r + c % 4];
            });
        }
}

}  // namespace fewbits
