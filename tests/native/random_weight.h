// Weights of random planes, and their values computed from these in double precision.
#pragma once

#include "check.h"
#include "layout.h"
#include "weight.h"

namespace fewbits {

// One row of the kernels' table.
struct Kind {
    int bits;
    bool table;
    Scaling scaling;
    int sub;
    std::string name() const;
};

std::vector<Kind> known_kinds();

struct RandomWeight {
    RandomWeight(const Kind& kind, Scale scale, long rows, long columns, int group, uint64_t seed);
    RandomWeight(const RandomWeight&) = delete;

    Weight weight{};
    std::vector<double> values;   // [rows][columns]
    std::vector<double> rounded;  // the same with the levels of tables rounded to bytes: what products use

private:
    void scale_planes(Random& random);
    double stored(const Buffer<uint8_t>& plane, long at) const;

    Buffer<uint8_t> codes_, scales_, mins_, subscales_, submins_;
};

}  // namespace fewbits
