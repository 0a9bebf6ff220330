// A decoder-only transformer as a list of steps over buffers of float32.
// docs/concepts/decoder.md draws both.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <memory>
#include <mutex>
#include <variant>
#include <vector>

#include "cache.h"
#include "floats.h"
#include "steps.h"
#include "weight.h"

namespace fewbits {

// A weight of either kind; what it points to lives as long as the plan.
struct Matrix {
    const Weight* packed;  // or null: `floats`
    FloatWeight floats;
    long rows() const { return packed ? packed->rows : floats.rows; }
    long columns() const { return packed ? packed->columns : floats.columns; }
};

// Steps. `in`, `out` … are numbers of buffers [tokens, width].
constexpr int RESULT = -1;  // what the caller gets, in place of a buffer
constexpr int NONE = -2;

struct Embed {
    Matrix table;
    int out;
};
struct Positions {  // rows of the tokens' positions
    Matrix table;
    int out;
};
struct Norm {  // of every run of `width` columns
    int in, out;
    const float* weight;
    long width;
    float epsilon;
    bool centred;  // by their mean, or by 0
    const float* bias;  // of centred ones, or null
};
struct Multiply {
    struct Part {
        Matrix matrix;
        const float* bias;  // or null
        int out;
    };
    int in;
    std::vector<Part> parts;
};
struct Rotate {  // of every head, pairs of columns i, i + half by the position times a frequency
    int buffer, rotation;
};
struct Attend {  // keeps keys and values first
    int queries, keys, values, out;
    long layer, window;  // positions that are seen, or 0: all
    float cap;           // of scores, or 0: none
};
struct Gate {  // act(gate) * up
    int gate, up, out;  // `up` may be NONE
    Activation act;
};
struct Experts {  // of every token a few, whose feed-forward parts are added up
    struct Expert {
        Matrix gate, up, down;
    };
    Matrix router;
    std::vector<Expert> all;
    int in, out;
    int rows, gate, up;  // room for what they read and make, `chosen` times as wide
    int chosen;
    bool normalised;  // whether the weights of those chosen sum to 1, or those of all
    Activation act;
};
struct Scaled {
    int buffer;
    float factor;
};
struct Cap {  // cap * tanh(x / cap)
    int buffer;
    float most;
};
struct Add {
    int in, out;
};
struct Narrow {};  // from here on only tokens whose result is wanted

using Step = std::variant<Embed, Positions, Norm, Multiply, Rotate, Attend, Gate, Experts, Scaled, Cap, Add, Narrow>;

struct Rotation {
    std::vector<float> frequencies;  // half of the columns that are rotated
    std::vector<float> stretched;    // the same in a cache that is stretched
    float factor;                    // of cosines and sines
};

class Plan {
public:
    static constexpr long MOST_TOKENS = 512;  // in a call

    Plan(const Sizes& sizes, const std::vector<long>& widths) : sizes(sizes), widths(widths) {}
    float* room(int buffer, long tokens);  // where it lies in a call with so many

    const Sizes sizes;
    const std::vector<long> widths;
    std::vector<Step> steps;
    std::vector<Rotation> rotations;
    long result = 0;  // its width
    int state = NONE;  // the buffer that `head` reads: what the model knows of a token, before the product with its head
    size_t head = 0;   // steps before it
    std::mutex busy;  // one call at a time

private:
    std::unique_ptr<float, void (*)(void*)> memory_{nullptr, free};
    long tokens_ = 0;
};

// What a call appends to one sequence, and of how many of its last tokens the result is wanted.
struct Piece {
    Cache* cache;
    long count, wanted;
};

// Appends the tokens of all pieces, one after the other and at most MOST_TOKENS; `out` gets the wanted results in that
// order, or states in place of results. Arguments were checked: no cache is there twice.
void run(Plan& plan, const std::vector<Piece>& pieces, const int64_t* tokens, float* out, bool states, int threads);

// Results of 1 to MOST_TOKENS states, with the same bits.
void finish(Plan& plan, const float* states, long count, float* out, int threads);

}  // namespace fewbits
