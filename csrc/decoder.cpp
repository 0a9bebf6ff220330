#include "decoder.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <new>

#include "experts.h"
#include "pool.h"
#include "product.h"

namespace fewbits {
namespace {

constexpr long CHUNK = 16;   // tokens of a head that a thread takes at a time
constexpr long FEW = 16384;  // values of a buffer that are not worth sharing out

// What is the same for every step of a call.
class Call {
public:
    Call(Plan& plan, Cache& cache, const int64_t* tokens, long count, long wanted, float* out, int threads)
        : plan_(plan), cache_(cache), tokens_(tokens), count_(count), wanted_(wanted), out_(out), threads_(threads),
          steps_(steps_of(current())), attention_(attention_of(current())) {
        for (const Rotation& r : plan.rotations) turns_.push_back(turns_of(r));
    }

    long rows() const { return count_ - first_; }

    void operator()(const Embed& s) {
        values_of(s.table, tokens_, at(s.out));
    }

    void operator()(const Positions& s) {
        std::vector<int64_t> positions(count_);
        for (long i = 0; i < count_; ++i) positions[i] = cache_.length + i;
        values_of(s.table, positions.data(), at(s.out));
    }

    void operator()(const Norm& s) {
        const long width = plan_.widths[s.in], runs = width / s.width;
        each_row(width, [&](long i) {
            for (long k = i * runs; k < (i + 1) * runs; ++k) {
                const float* in = at(s.in) + k * s.width;
                float* out = at(s.out) + k * s.width;
                if (s.centred) steps_.layer_norm(in, s.weight, s.bias, s.width, s.epsilon, out);
                else steps_.norm(in, s.weight, s.width, s.epsilon, out);
            }
        });
    }

    void operator()(const Multiply& s) {
        std::vector<Term> terms;
        for (const Multiply::Part& p : s.parts)
            if (p.matrix.packed) terms.push_back({p.matrix.packed, at(p.out), p.bias});
            else product(p.matrix.floats, at(s.in), rows(), at(p.out), p.bias, threads_);
        if (terms.empty()) return;
        product(terms, Rounded(at(s.in), rows(), plan_.widths[s.in], threads_), threads_);
    }

    void operator()(const Rotate& s) {
        const long width = plan_.widths[s.buffer], half = (long)plan_.rotations[s.rotation].frequencies.size();
        const float* turns = turns_[s.rotation].data() + first_ * 2 * half;
        each_row(width, [&](long i) {
            const float* cos = turns + i * 2 * half;
            for (long c = 0; c < width; c += plan_.sizes.head)
                steps_.rotate(at(s.buffer) + i * width + c, cos, cos + half, half);
        });
    }

    void operator()(const Attend& s) {
        const Sizes& z = plan_.sizes;
        const long together = z.heads / z.kv_heads, chunks = (count_ + CHUNK - 1) / CHUNK;
        parallel(threads_, z.kv_heads, [&](long h) {
            const Head head = cache_.head(s.layer, h);
            for (long i = 0; i < count_; ++i) {
                const long column = (i * z.kv_heads + h) * z.head;
                attention_.keep(head, cache_.length + i, at(s.keys) + column, at(s.values) + column);
            }
        });
        parallel(threads_, z.kv_heads * chunks, [&](long part) {
            const long h = part % z.kv_heads, chunk = chunks - 1 - part / z.kv_heads;  // the longest first
            const Head head = cache_.head(s.layer, h);
            Query queries[QUERIES];
            int found = 0;
            const long last = std::min(count_, (chunk + 1) * CHUNK);
            for (long i = chunk * CHUNK; i < last; ++i)
                for (long k = 0; k < together; ++k) {
                    const long column = (i * z.heads + h * together + k) * z.head, position = cache_.length + i;
                    queries[found++] = {at(s.queries) + column,
                                        s.window ? std::max(0L, position - s.window + 1) : 0, position,
                                        at(s.out) + column};
                    if (found < QUERIES && (i + 1 < last || k + 1 < together)) continue;
                    attention_.attend(head, queries, found, z.scale, s.cap);
                    found = 0;
                }
        });
    }

    void operator()(const Gate& s) {
        const long width = plan_.widths[s.out];
        each_row(width, [&](long i) {
            steps_.gate(s.act, at(s.gate) + i * width, s.up == NONE ? nullptr : at(s.up) + i * width, width,
                        at(s.out) + i * width);
        });
    }

    void operator()(const Experts& s) {
        const long width = plan_.widths[s.in], inner = plan_.widths[s.gate] / s.chosen, all = (long)s.all.size();
        std::vector<float> scores(rows() * all);
        if (s.router.packed)
            product({{s.router.packed, scores.data(), nullptr}}, Rounded(at(s.in), rows(), width, threads_), threads_);
        else
            product(s.router.floats, at(s.in), rows(), scores.data(), nullptr, threads_);
        const Choice choice(scores.data(), rows(), all, s.chosen, s.normalised);
        each_row(width * s.chosen, [&](long i) {
            for (long k = i * s.chosen; k < (i + 1) * s.chosen; ++k)
                memcpy(at(s.rows) + choice.row[k] * width, at(s.in) + i * width, width * sizeof(float));
        });
        multiply(s, &Experts::Expert::gate, choice, at(s.rows), at(s.gate));
        multiply(s, &Experts::Expert::up, choice, at(s.rows), at(s.up));
        each_row(inner * s.chosen, [&](long i) {
            const long first = i * inner * s.chosen;
            steps_.gate(s.act, at(s.gate) + first, at(s.up) + first, inner * s.chosen, at(s.gate) + first);
        });
        multiply(s, &Experts::Expert::down, choice, at(s.gate), at(s.rows));
        each_row(width * s.chosen, [&](long i) {
            float* out = at(s.out) + i * width;
            memset(out, 0, width * sizeof(float));
            for (long k = i * s.chosen; k < (i + 1) * s.chosen; ++k)
                steps_.add(at(s.rows) + choice.row[k] * width, choice.weight[k], width, out);
        });
    }

    void operator()(const Scaled& s) {
        const long width = plan_.widths[s.buffer];
        each_row(width, [&](long i) { steps_.scale(at(s.buffer) + i * width, s.factor, width); });
    }

    void operator()(const Cap& s) {
        const long width = s.buffer == RESULT ? plan_.result : plan_.widths[s.buffer];
        each_row(width, [&](long i) { steps_.cap(at(s.buffer) + i * width, s.most, width); });
    }

    void operator()(const Add& s) {
        const long width = plan_.widths[s.out];
        each_row(width, [&](long i) { steps_.add(at(s.in) + i * width, 1, width, at(s.out) + i * width); });
    }

    void operator()(const Narrow&) { first_ = count_ - wanted_; }

private:
    // Products of every expert with its rows.
    void multiply(const Experts& s, Matrix Experts::Expert::*part, const Choice& choice, const float* in, float* out) {
        std::vector<Share> shares;
        for (size_t e = 0; e < s.all.size(); ++e) {
            const Matrix& m = s.all[e].*part;
            const long first = choice.first[e], count = choice.first[e + 1] - first;
            if (!count) continue;
            if (m.packed) shares.push_back({m.packed, first, count});
            else product(m.floats, in + first * m.columns(), count, out + first * m.rows(), nullptr, threads_);
        }
        if (!shares.empty()) grouped(shares, in, out, threads_);
    }

    // Rows `ids` of a table, one for each token.
    void values_of(const Matrix& table, const int64_t* ids, float* out) {
        if (table.packed) return fewbits::rows(*table.packed, ids, count_, out, threads_);
        const FloatWeight& w = table.floats;
        const long bytes = w.columns * (w.kind == Scale::f32 ? 4 : 2);
        each_row(w.columns, [&](long i) {
            steps_.widen(w.kind, w.values + ids[i] * bytes, w.columns, out + i * w.columns);
        });
    }

    // [tokens, 2, half]: cosines and sines; angles are float32, as Transformers computes them
    std::vector<float> turns_of(const Rotation& r) const {
        const std::vector<float>& frequencies = cache_.stretched ? r.stretched : r.frequencies;
        const long half = (long)frequencies.size();
        std::vector<float> turns(count_ * 2 * half);
        for (long i = 0; i < count_; ++i)
            for (long k = 0; k < half; ++k) {
                const double angle = (float)(cache_.length + i) * frequencies[k];
                turns[2 * i * half + k] = (float)::cos(angle) * r.factor;
                turns[(2 * i + 1) * half + k] = (float)::sin(angle) * r.factor;
            }
        return turns;
    }

    float* at(int buffer) {
        return buffer == RESULT ? out_ : plan_.room(buffer, count_) + first_ * plan_.widths[buffer];
    }

    template <class Work>
    void each_row(long width, Work&& work) {
        parallel(rows() * width > FEW ? threads_ : 1, rows(), [&](long i) { work(i); });
    }

    Plan& plan_;
    Cache& cache_;
    const int64_t* tokens_;
    const long count_, wanted_;
    float* const out_;
    const int threads_;
    const Steps& steps_;
    const Attention& attention_;
    std::vector<std::vector<float>> turns_;  // by rotation
    long first_ = 0;  // token that buffers begin with
};

}  // namespace

float* Plan::room(int buffer, long tokens) {
    long all = 0;
    for (long width : widths) all += lined(width);
    if (tokens > tokens_) {
        tokens_ = 0;
        memory_.reset((float*)aligned_alloc(64, all * tokens * sizeof(float)));
        if (!memory_) throw std::bad_alloc();
        tokens_ = tokens;
    }
    float* at = memory_.get();
    for (int i = 0; i < buffer; ++i) at += lined(widths[i]) * tokens;
    return at;
}

void run(Plan& plan, Cache& cache, const int64_t* tokens, long count, long wanted, float* out, int threads) {
    plan.room(0, count);  // before threads need it
    Call call(plan, cache, tokens, count, wanted, out, threads);
    for (const Step& step : plan.steps) {
        std::visit(call, step);
        if (!call.rows()) break;
    }
    cache.length += count;
}

}  // namespace fewbits
