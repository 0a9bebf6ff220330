// Compiled without contraction to fused operations: codes must be the same on every machine.
#include "encode_codes.h"

#include "encode_lanes.h"

namespace fewbits::FEWBITS_ISA {

void nearest_codes(const Grid& grid, const Levels& levels, const uint8_t* order, ptrdiff_t first, ptrdiff_t last,
                   uint8_t* codes) {
    const int run = grid.width / grid.subs;
    for (ptrdiff_t at = first * grid.subs; at < last * grid.subs; ++at) {
        const float* w = grid.w + at * run;
        uint8_t* out = codes + at * run;
        // a zero scale decodes every code alike
        const float step = grid.scale[at] == 0.0f ? INF : grid.scale[at];
        const float offset = grid.offset ? grid.offset[at] : 0.0f, zero = grid.zero ? grid.zero[at] : grid.middle;
        if (levels.count) {
            for (int i = 0; i < run; ++i) {
                const float u = w[i] / step;
                int rank = 0;
                for (int n = 0; n < levels.count; ++n) rank += levels.bounds[n] < u;
                out[i] = order[rank];
            }
            continue;
        }
        for (int i = 0; i < run; ++i) {
            float u = (w[i] - offset) / step + zero;
            u = u > levels.low ? u : levels.low;
            u = u < levels.high ? u : levels.high;
            out[i] = uint8_t(int32_t((u + ROUNDING) - ROUNDING));
        }
    }
}

}  // namespace fewbits::FEWBITS_ISA
