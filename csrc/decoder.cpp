#include "decoder.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <new>

#include "experts.h"
#include "pool.h"
#include "product.h"
#include "rounding.h"

namespace fewbits {
namespace {

constexpr long FEW = 16384;     // values of a buffer that are not worth sharing out
constexpr long FEW_WORKS = 4;    // a thread: longer contexts are shared out in segments

// What is the same for every step of a call.
class Call {
public:
    Call(Plan& plan, const std::vector<Piece>& pieces, const int64_t* tokens, float* out, int threads)
        : plan_(plan), pieces_(pieces), tokens_(tokens), out_(out), threads_(threads), steps_(steps_of(current())),
          attention_(attention_of(current())) {
        for (const Piece& p : pieces)
            for (long i = 0; i < p.count; ++i) {
                if (i >= p.count - p.wanted) wanted_.push_back((long)positions_.size());
                positions_.push_back(p.cache->length + i);
                stretched_.push_back(p.cache->stretched);
            }
        count_ = rows_ = (long)positions_.size();
        for (const Rotation& r : plan.rotations) turns_.push_back(turns_of(r));
        share_out();
    }

    Call(Plan& plan, const std::vector<Piece>& none, long count, float* out, int threads)  // of the head alone
        : plan_(plan), pieces_(none), tokens_(nullptr), out_(out), threads_(threads), steps_(steps_of(current())),
          attention_(attention_of(current())), count_(count), rows_(count) {}

    long rows() const { return rows_; }

    void read_states(const float* states) { memcpy(at(plan_.state), states, rows_ * width() * sizeof(float)); }
    void write_states() { memcpy(out_, at(plan_.state), rows_ * width() * sizeof(float)); }

    void operator()(const Embed& s) {
        values_of(s.table, tokens_, at(s.out));
    }

    void operator()(const Positions& s) {
        values_of(s.table, std::vector<int64_t>(positions_.begin(), positions_.end()).data(), at(s.out));
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
        fewbits::multiply(terms, at(s.in), rows(), threads_);
    }

    void operator()(const Rotate& s) {
        const long width = plan_.widths[s.buffer], half = (long)plan_.rotations[s.rotation].frequencies.size();
        const float* turns = turns_[s.rotation].data();
        each_row(width, [&](long i) {
            const float* cos = turns + (narrowed_ ? wanted_[i] : i) * 2 * half;
            for (long c = 0; c < width; c += plan_.sizes.head)
                steps_.rotate(at(s.buffer) + i * width + c, cos, cos + half, half);
        });
    }

    void operator()(const Attend& s) {
        const Sizes& z = plan_.sizes;
        const long together = z.heads / z.kv_heads, width = z.kv_heads * z.head;
        parallel(count_ * width > FEW ? threads_ : 1, z.kv_heads, [&](long h) {
            long row = 0;
            for (const Piece& p : pieces_) {
                const Head head = p.cache->head(s.layer, h);
                for (long i = 0; i < p.count; ++i, ++row)
                    attention_.keep(head, positions_[row], at(s.keys) + row * width + h * z.head,
                                    at(s.values) + row * width + h * z.head);
            }
        });
        const Scores how{z.scale, s.cap};
        auto ask = [&](const Chunk& chunk, long h, Query* queries) {
            int found = 0;
            for (long row = chunk.first; row < chunk.last; ++row)
                for (long k = chunk.head; k < std::min(chunk.head + QUERIES, together); ++k) {
                    const long column = (row * z.heads + h * together + k) * z.head, position = positions_[row];
                    queries[found++] = {at(s.queries) + column, s.window ? std::max(0L, position - s.window + 1) : 0,
                                        position, at(s.out) + column};
                }
            return found;
        };
        parallel(threads_, (long)works_.size(), [&](long i) {
            const Work& w = works_[i];
            const Head head = w.chunk->cache->head(s.layer, w.head);
            Query queries[QUERIES];
            const int found = ask(*w.chunk, w.head, queries);
            if (w.segment < 0) attention_.attend(head, queries, found, how);
            else attention_.gather(head, queries, found, how, w.segment, sums_.data() + w.sums);
        });
        for (const Work& w : works_)
            if (w.segment == 0) {
                const Head head = w.chunk->cache->head(s.layer, w.head);
                Query queries[QUERIES];
                const int found = ask(*w.chunk, w.head, queries);
                attention_.finish(head, queries, found, segments(positions_[w.chunk->last - 1] + 1),
                                  sums_.data() + w.sums);
            }
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
        if (s.router.packed) fewbits::multiply({{s.router.packed, scores.data(), nullptr}}, at(s.in), rows(), threads_);
        else product(s.router.floats, at(s.in), rows(), scores.data(), nullptr, threads_);
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

    void operator()(const Narrow&) {
        rows_ = (long)wanted_.size();
        narrowed_ = true;
        for (int b = 0; b < (int)plan_.widths.size(); ++b)
            for (long i = 0, width = plan_.widths[b]; i < rows_; ++i)
                if (wanted_[i] != i) memcpy(at(b) + i * width, at(b) + wanted_[i] * width, width * sizeof(float));
    }

private:
    long width() const { return plan_.widths[plan_.state]; }

    // Neighbouring tokens of a piece whose queries meet a head's keys and values together.
    struct Chunk {
        const Cache* cache;
        long first, last;  // rows
        long head;         // the first of the heads of queries that share one of keys
    };
    struct Work {
        const Chunk* chunk;
        long head, segment, sums;  // segment: -1, all at once; where sums over it go
    };

    // What threads take one after the other in every layer: long ones first, and in parts where they are few.
    void share_out() {
        const Sizes& z = plan_.sizes;
        const long together = z.heads / z.kv_heads, tokens = std::max(1L, QUERIES / together);
        long row = 0;
        for (const Piece& p : pieces_) {
            const long end = row + p.count;
            for (; row < end; row = std::min(row + tokens, end))
                for (long head = 0; head < together; head += QUERIES)
                    chunks_.push_back({p.cache, row, std::min(row + tokens, end), head});
        }
        auto cost = [&](const Chunk& c) { return (c.last - c.first) * (positions_[c.last - 1] + 1); };
        std::stable_sort(chunks_.begin(), chunks_.end(),
                         [&](const Chunk& a, const Chunk& b) { return cost(a) > cost(b); });
        const bool split = threads_ > 1 && (long)chunks_.size() * z.kv_heads < FEW_WORKS * threads_;
        long sums = 0;
        for (long h = 0; h < z.kv_heads; ++h)  // one head's keys and values may stay in a cache
            for (const Chunk& c : chunks_) {
                const long rows = (c.last - c.first) * std::min<long>(QUERIES, together - c.head);
                const long parts = segments(positions_[c.last - 1] + 1);
                if (!split || parts == 1) works_.push_back({&c, h, -1, 0});
                else
                    for (long i = 0; i < parts; ++i, sums += rows * sums_of(z.head)) works_.push_back({&c, h, i, sums});
            }
        sums_.resize(sums);
    }

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
        const long half = (long)r.frequencies.size();
        std::vector<float> turns(count_ * 2 * half);
        for (long i = 0; i < count_; ++i) {
            const std::vector<float>& frequencies = stretched_[i] ? r.stretched : r.frequencies;
            for (long k = 0; k < half; ++k) {
                const double angle = (float)positions_[i] * frequencies[k];
                turns[2 * i * half + k] = (float)::cos(angle) * r.factor;
                turns[(2 * i + 1) * half + k] = (float)::sin(angle) * r.factor;
            }
        }
        return turns;
    }

    float* at(int buffer) { return buffer == RESULT ? out_ : plan_.room(buffer, count_); }

    template <class One>
    void each_row(long width, One&& one) {
        parallel(rows() * width > FEW ? threads_ : 1, rows(), [&](long i) { one(i); });
    }

    Plan& plan_;
    const std::vector<Piece>& pieces_;
    const int64_t* tokens_;
    float* const out_;
    const int threads_;
    const Steps& steps_;
    const Attention& attention_;
    long count_, rows_;            // tokens of the call, and rows that buffers have now
    std::vector<long> positions_;  // of every token in its sequence
    std::vector<bool> stretched_;  // whether its cache is
    std::vector<long> wanted_;     // tokens whose results are
    bool narrowed_ = false;        // rows are those of wanted tokens
    std::vector<std::vector<float>> turns_;  // by rotation
    std::vector<Chunk> chunks_;
    std::vector<Work> works_;
    std::vector<float> sums_;
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

void run(Plan& plan, const std::vector<Piece>& pieces, const int64_t* tokens, float* out, bool states, int threads) {
    long count = 0;
    for (const Piece& p : pieces) count += p.count;
    plan.room(0, count);  // before threads need it
    Call call(plan, pieces, tokens, out, threads);
    const size_t end = states ? plan.head : plan.steps.size();
    for (size_t i = 0; i < end; ++i) {
        std::visit(call, plan.steps[i]);
        if (!call.rows()) break;
    }
    if (states) call.write_states();
    for (const Piece& p : pieces) p.cache->length += p.count;
}

void finish(Plan& plan, const float* states, long count, float* out, int threads) {
    plan.room(0, count);
    const std::vector<Piece> none;
    Call call(plan, none, count, out, threads);
    call.read_states(states);
    for (size_t i = plan.head; i < plan.steps.size(); ++i) std::visit(call, plan.steps[i]);
}

}  // namespace fewbits
