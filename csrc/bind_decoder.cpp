// Plans of decoders, built a step at a time: every buffer and weight is checked as its step is added, so that a call has
// only its tokens to check.
#include "bind.h"
#include "decoder.h"

#include <algorithm>

namespace fewbits {
namespace {

using Vector = Array<const float, 1>;

class HeldPlan {
public:
    HeldPlan(const Sizes& sizes, const std::vector<long>& widths) : plan(sizes, widths) {
        require(1 <= sizes.kv_heads && sizes.kv_heads <= sizes.heads && sizes.heads < 1 << 16 &&
                    sizes.heads % sizes.kv_heads == 0, "heads of queries are a multiple of those of keys");
        require(1 <= sizes.head && sizes.head <= WIDEST_HEAD, "heads are 1 to " + std::to_string(WIDEST_HEAD) + " wide");
        require(0 <= sizes.layers && sizes.layers < 1 << 16, "the number of layers");
        require(!widths.empty(), "a plan has buffers");
        for (long width : widths) require(1 <= width && width < 1L << 24, "a buffer's width");
    }

    void embed(nb::object table, int out) {
        require(!vocabulary_, "a plan begins with one table of tokens");
        const Matrix m = matrix(table);
        require_rows(m);
        same(m.columns(), width(out), "the table's columns");
        vocabulary_ = m.rows();
        weights_.push_back(table);
        plan.steps.push_back(Embed{m, out});
    }

    void positions(nb::object table, int out) {
        require(!positions_, "a plan has one table of positions");
        const Matrix m = matrix(table);
        require_rows(m);
        same(m.columns(), width(out), "the table's columns");
        positions_ = m.rows();
        weights_.push_back(table);
        plan.steps.push_back(Positions{m, out});
    }

    void norm(int in, int out, Vector weight, float epsilon, bool centred, std::optional<Vector> bias) {
        const long run = (long)weight.shape(0);
        require(run > 0 && width(in) % run == 0, "the norm's width");
        same(width(in), width(out), "the norm's result");
        require(!bias || (centred && (long)bias->shape(0) == run), "the norm's bias");
        vectors_.push_back(weight);
        if (bias) vectors_.push_back(*bias);
        plan.steps.push_back(Norm{in, out, weight.data(), run, epsilon, centred, bias ? bias->data() : nullptr});
    }

    void multiply(int in, const std::vector<nb::object>& matrices, const std::vector<std::optional<Vector>>& biases,
                  const std::vector<int>& outs) {
        require(!matrices.empty() && matrices.size() == biases.size() && matrices.size() == outs.size(),
                "a bias and a result for every weight");
        Multiply step{in, {}};
        for (size_t i = 0; i < matrices.size(); ++i) {
            const Matrix m = matrix(matrices[i]);
            require(outs[i] != in, "a product cannot overwrite its input");
            same(m.columns(), width(in), "the weight's columns");
            if (outs[i] == RESULT) require(!plan.result, "a plan has one result"), plan.result = m.rows();
            else same(m.rows(), width(outs[i]), "the weight's rows");
            if (biases[i]) same((long)biases[i]->shape(0), m.rows(), "the bias's shape");
            step.parts.push_back({m, biases[i] ? biases[i]->data() : nullptr, outs[i]});
        }
        weights_.insert(weights_.end(), matrices.begin(), matrices.end());
        for (const auto& bias : biases)
            if (bias) vectors_.push_back(*bias);
        plan.steps.push_back(step);
    }

    int rotation(const std::vector<float>& frequencies, float factor, const std::vector<float>& stretched) {
        require(2 * (long)frequencies.size() <= plan.sizes.head, "rotated columns of a head");
        require(stretched.empty() || stretched.size() == frequencies.size(), "as many stretched frequencies");
        plan.rotations.push_back({frequencies, stretched.empty() ? frequencies : stretched, factor});
        return (int)plan.rotations.size() - 1;
    }

    void rotate(int buffer, int rotation) {
        require(width(buffer) % plan.sizes.head == 0, "rotated buffers hold whole heads");
        require(0 <= rotation && rotation < (int)plan.rotations.size(), "no rotation " + std::to_string(rotation));
        plan.steps.push_back(Rotate{buffer, rotation});
    }

    void attend(int queries, int keys, int values, int out, long layer, long window, float cap) {
        const Sizes& z = plan.sizes;
        require(0 <= layer && layer < z.layers && 0 <= window, "the layer or the window");
        require(0 <= cap && cap < 1e30f, "the cap of scores");
        require(!narrow_, "every token has its keys and values");
        same(width(queries), z.heads * z.head, "the queries' width");
        same(width(out), z.heads * z.head, "the attention's result");
        same(width(keys), z.kv_heads * z.head, "the keys' width");
        same(width(values), z.kv_heads * z.head, "the values' width");
        plan.steps.push_back(Attend{queries, keys, values, out, layer, window, cap});
    }

    void gate(const std::string& act, int gate, int up, int out) {
        if (up != NONE) same(width(gate), width(up), "the gate's width");
        same(width(gate), width(out), "the gate's result");
        plan.steps.push_back(Gate{gate, up, out, activation(act)});
    }

    void experts(int in, nb::object router, const std::vector<nb::object>& gates, const std::vector<nb::object>& ups,
                 const std::vector<nb::object>& downs, const std::vector<int>& room, int out, int chosen,
                 bool normalised, const std::string& act) {
        require(room.size() == 3, "room for rows, gates and ups of experts");
        Experts step{matrix(router), {}, in, out, room[0], room[1], room[2], chosen, normalised, activation(act)};
        const long count = step.router.rows(), hidden = width(in), inner = width(room[1]) / std::max(chosen, 1);
        require(1 <= chosen && chosen <= count && count < 1 << 16, "a token goes to 1 or more of the experts");
        same(step.router.columns(), hidden, "the router's columns");
        same(width(out), hidden, "the experts' result");
        same(width(room[0]), hidden * chosen, "room for rows of experts");
        same(width(room[1]), inner * chosen, "room for gates of experts");
        same(width(room[2]), inner * chosen, "room for ups of experts");
        require((long)gates.size() == count && (long)ups.size() == count && (long)downs.size() == count,
                "three weights for every expert");
        for (long i = 0; i < count; ++i) {
            const Experts::Expert expert{matrix(gates[i]), matrix(ups[i]), matrix(downs[i])};
            for (const Matrix& m : {expert.gate, expert.up, expert.down}) require_rows(m);
            for (const Matrix& m : {expert.gate, expert.up})
                same(m.columns(), hidden, "an expert's columns"), same(m.rows(), inner, "an expert's rows");
            same(expert.down.columns(), inner, "an expert's columns");
            same(expert.down.rows(), hidden, "an expert's rows");
            step.all.push_back(expert);
        }
        weights_.push_back(router);
        for (const auto& part : {gates, ups, downs}) weights_.insert(weights_.end(), part.begin(), part.end());
        plan.steps.push_back(step);
    }

    void scale(int buffer, float factor) {
        width(buffer);
        plan.steps.push_back(Scaled{buffer, factor});
    }

    void cap(int buffer, float most) {
        if (buffer == RESULT) require(plan.result > 0, "no result yet");
        else width(buffer);
        plan.steps.push_back(Cap{buffer, most});
    }

    void add(int in, int out) {
        same(width(in), width(out), "what is added");
        plan.steps.push_back(Add{in, out});
    }

    void head(int buffer) {
        width(buffer);
        require(narrow_ && plan.state == NONE && !plan.result, "a plan narrows, has one head, and then a result");
        plan.state = buffer, plan.head = plan.steps.size();
    }

    void narrow() {
        require(!narrow_, "a plan narrows once");
        narrow_ = true;
        plan.steps.push_back(Narrow{});
    }

    void check_result(const Array<float, 2>& out, bool states) const {
        require(vocabulary_ && plan.result && narrow_, "a plan embeds tokens, narrows and has a result");
        require(!states || plan.state != NONE, "a plan without a head has no states");
        require((long)out.shape(1) == (states ? plan.widths[plan.state] : plan.result), "the result's width");
    }

    void check_call(const std::vector<Piece>& pieces, const Array<const int64_t, 1>& tokens,
                    const Array<float, 2>& out, bool states) const {
        const long count = (long)tokens.shape(0);
        check_result(out, states);
        require(1 <= count && count <= Plan::MOST_TOKENS, "1 to " + std::to_string(Plan::MOST_TOKENS) + " tokens a call");
        long all = 0, wanted = 0;
        for (const Piece& p : pieces) {
            require(1 <= p.count && p.count <= count && 0 <= p.wanted && p.wanted <= p.count, "a sequence's tokens");
            require(p.count <= p.cache->capacity - p.cache->length, "more tokens than the cache has room for");
            require(!positions_ || p.count <= positions_ - p.cache->length, "more tokens than the table has positions");
            for (const Piece* q = pieces.data(); q != &p; ++q) require(q->cache != p.cache, "a cache is there twice");
            all += p.count, wanted += p.wanted;
        }
        require(all == count && wanted == (long)out.shape(0), "as many results as are wanted");
        for (long i = 0; i < count; ++i)
            require(0 <= tokens.data()[i] && tokens.data()[i] < vocabulary_,
                    "token " + std::to_string(tokens.data()[i]) + " is not in 0 … " + std::to_string(vocabulary_ - 1));
    }

    Plan plan;

private:
    long width(int buffer) const {
        require(0 <= buffer && buffer < (int)plan.widths.size(), "no buffer " + std::to_string(buffer));
        return plan.widths[buffer];
    }

    static void require_rows(const Matrix& m) {
        require(!m.packed || !m.packed->order, "the table's columns lie in their own order");
    }

    static Activation activation(const std::string& name) {
        const char* names[] = {"silu", "gelu", "gelu_tanh", "relu"};
        for (int i = 0; i < 4; ++i)
            if (name == names[i]) return (Activation)i;
        throw nb::value_error(("no activation is called " + name).c_str());
    }

    static void same(long found, long wanted, const char* what) {
        require(found == wanted, std::string(what) + ": " + std::to_string(found) + ", not " + std::to_string(wanted));
    }

    static Matrix matrix(nb::handle of) {
        if (nb::isinstance<Held>(of)) return {&nb::cast<const Held&>(of).weight, {}};
        require(nb::isinstance<HeldFloats>(of), "a weight is a Weight or Floats");
        return {nullptr, nb::cast<const HeldFloats&>(of).weight};
    }

    std::vector<nb::object> weights_;  // what steps point into
    std::vector<Vector> vectors_;
    long vocabulary_ = 0, positions_ = 0;
    bool narrow_ = false;
};

// A sequence of tokens that a plan runs through. Calls on one plan wait for each other.
struct HeldCache {
    HeldPlan& plan;
    nb::object kept;  // the same
    Cache cache;
};

void step(HeldPlan& self, const std::vector<nb::object>& caches, const std::vector<long>& counts,
          const std::vector<long>& wanted, Array<const int64_t, 1> tokens, Array<float, 2> out, bool states,
          int threads) {
    check_threads(threads);
    require(counts.size() == caches.size() && wanted.size() == caches.size(), "tokens and results of every cache");
    std::vector<Piece> pieces;
    for (size_t i = 0; i < caches.size(); ++i) {
        require(nb::isinstance<HeldCache>(caches[i]), "a cache is a Cache");
        HeldCache& held = nb::cast<HeldCache&>(caches[i]);
        require(&held.plan == &self, "a cache belongs to its plan");
        pieces.push_back({&held.cache, counts[i], wanted[i]});
    }
    std::unique_lock<std::mutex> alone(self.plan.busy, std::defer_lock);
    {
        nb::gil_scoped_release release;  // the call that is waited for may need it at its end
        alone.lock();
    }
    self.check_call(pieces, tokens, out, states);
    nb::gil_scoped_release release;
    run(self.plan, pieces, tokens.data(), out.data(), states, threads);
}

void finish(HeldPlan& self, Array<const float, 2> states, Array<float, 2> out, int threads) {
    check_threads(threads);
    self.check_result(out, false);
    require(self.plan.state != NONE && (long)states.shape(1) == self.plan.widths[self.plan.state], "the states' width");
    require(states.shape(0) == out.shape(0) && 1 <= states.shape(0) && (long)states.shape(0) <= Plan::MOST_TOKENS,
            "1 to " + std::to_string(Plan::MOST_TOKENS) + " states a call, and a result for each");
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> alone(self.plan.busy);
    finish(self.plan, states.data(), (long)states.shape(0), out.data(), threads);
}

void truncate(HeldCache& self, long length) {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> alone(self.plan.plan.busy);
    if (length < 0 || length > self.cache.length)
        throw nb::value_error("a sequence is truncated to no more tokens than it has");
    self.cache.length = length;
}

void stretch(HeldCache& self, bool stretched) {
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> alone(self.plan.plan.busy);
    if (self.cache.length && self.cache.stretched != stretched)
        throw nb::value_error("keys that were turned stay as they are");
    self.cache.stretched = stretched;
}

void copy(HeldCache& self, const HeldCache& from, long length) {
    require(&self.plan == &from.plan && &self != &from, "a cache is copied to another one of its plan");
    nb::gil_scoped_release release;
    std::lock_guard<std::mutex> alone(self.plan.plan.busy);
    if (self.cache.kept != from.cache.kept || length < 0 || length > from.cache.length || length > self.cache.capacity)
        throw nb::value_error("as many tokens are copied as there are, and as there is room for");
    self.cache.copy(from.cache, length);
}

Kept kept_of(const std::string& name) {
    const std::pair<const char*, Kept> all[] = {{"f16", Kept::f16}, {"q8_0", Kept::q8_0}, {"q4_0", Kept::q4_0}};
    for (const auto& [known, kept] : all)
        if (name == known) return kept;
    throw nb::value_error(("a cache is f16, q8_0 or q4_0, not " + name).c_str());
}

void check_capacity(long capacity) { require(1 <= capacity && capacity < 1L << 30, "a cache has 1 to 2^30 positions"); }

}  // namespace

void bind_decoder(nb::module_& m) {
    m.attr("RESULT") = RESULT;
    m.attr("NONE") = NONE;
    m.attr("WIDEST_HEAD") = WIDEST_HEAD;
    m.attr("MOST_TOKENS") = Plan::MOST_TOKENS;
    nb::class_<HeldPlan>(m, "Plan")
        .def("__init__", [](HeldPlan* self, const std::vector<long>& widths, long layers, long heads, long kv_heads,
                            long head, float scale) {
            new (self) HeldPlan(Sizes{layers, heads, kv_heads, head, scale}, widths);
        }, nb::kw_only(), nb::arg("widths"), nb::arg("layers"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head"),
           nb::arg("scale"))
        .def("embed", &HeldPlan::embed, nb::arg("table"), nb::arg("out"))
        .def("positions", &HeldPlan::positions, nb::arg("table"), nb::arg("out"))
        .def("norm", &HeldPlan::norm, nb::arg("x"), nb::arg("out"), array("weight"), nb::arg("epsilon"),
             nb::arg("centred") = false, array("bias").none() = nb::none())
        .def("multiply", &HeldPlan::multiply, nb::arg("x"), nb::arg("weights"), array("biases"), nb::arg("outs"))
        .def("rotation", &HeldPlan::rotation, nb::arg("frequencies"), nb::arg("factor"),
             nb::arg("stretched") = std::vector<float>())
        .def("rotate", &HeldPlan::rotate, nb::arg("x"), nb::arg("rotation"))
        .def("attend", &HeldPlan::attend, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("out"),
             nb::arg("layer"), nb::arg("window"), nb::arg("cap"))
        .def("gate", &HeldPlan::gate, nb::arg("activation"), nb::arg("gate"), nb::arg("up"), nb::arg("out"))
        .def("experts", &HeldPlan::experts, nb::arg("x"), nb::arg("router"), nb::arg("gates"), nb::arg("ups"),
             nb::arg("downs"), nb::arg("room"), nb::arg("out"), nb::arg("chosen"), nb::arg("normalised"),
             nb::arg("activation"))
        .def("scale", &HeldPlan::scale, nb::arg("x"), nb::arg("factor"))
        .def("cap", &HeldPlan::cap, nb::arg("x"), nb::arg("most"))
        .def("add", &HeldPlan::add, nb::arg("x"), nb::arg("to"))
        .def("narrow", &HeldPlan::narrow)
        .def("head", &HeldPlan::head, nb::arg("x"))
        .def("step", step, nb::arg("caches"), nb::arg("counts"), nb::arg("wanted"), array("tokens"), array("out"),
             nb::arg("states"), nb::arg("threads"))
        .def("finish", static_cast<void (*)(HeldPlan&, Array<const float, 2>, Array<float, 2>, int)>(finish),
             array("states"), array("out"), nb::arg("threads"))
        .def("cache_bytes", [](const HeldPlan& p, long capacity, const std::string& kept) {
            check_capacity(capacity);
            return Cache::bytes(p.plan.sizes, kept_of(kept), capacity);
        }, nb::arg("capacity"), nb::arg("kept"));
    nb::class_<HeldCache>(m, "Cache")
        .def("__init__", [](HeldCache* self, nb::object plan, long capacity, const std::string& kept) {
            HeldPlan& held = nb::cast<HeldPlan&>(plan);
            check_capacity(capacity);
            new (self) HeldCache{held, plan, Cache(held.plan.sizes, kept_of(kept), capacity)};
        }, nb::arg("plan"), nb::arg("capacity"), nb::arg("kept"))
        .def_prop_rw("stretched", [](const HeldCache& s) { return s.cache.stretched; }, stretch, nb::arg("value"))
        .def_prop_ro("length", [](const HeldCache& s) { return s.cache.length; })
        .def_prop_ro("capacity", [](const HeldCache& s) { return s.cache.capacity; })
        .def("copy", copy, nb::arg("source"), nb::arg("length"))
        .def("truncate", truncate, nb::arg("length"));
}

}  // namespace fewbits
