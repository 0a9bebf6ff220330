#include "bpe.h"

#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <queue>
#include <random>
#include <tuple>

namespace fewbits {
namespace {

uint64_t hash(std::string_view text, uint64_t seed) {
    uint64_t h = seed ^ text.size();
    const char* at = text.data();
    for (size_t left = text.size(); left; ) {
        uint64_t word = 0;
        const size_t taken = left < 8 ? left : 8;
        memcpy(&word, at, taken);
        h = (h ^ word) * 0x9E3779B97F4A7C15u;
        h ^= h >> 29;
        at += taken, left -= taken;
    }
    return (h * 0xBF58476D1CE4E5B9u) ^ (h >> 32);
}

// Bytes of the character that starts with `first`; texts are valid UTF-8.
int width(unsigned char first) { return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4; }

}  // namespace

Table::Table(const Texts& texts) : texts(texts) {
    static const uint64_t seed = std::random_device{}() * 0x100000001u + 1;  // no file can be made to collide
    seed_ = seed;
    uint64_t size = 16;
    while (size < uint64_t(texts.count) * 2) size *= 2;
    mask_ = size - 1;
    slots_.assign(size, -1);
    for (long i = 0; i < texts.count; ++i) {
        const std::string_view text = texts[i];
        uint64_t at = hash(text, seed_) & mask_;
        while (slots_[at] >= 0 && texts[slots_[at]] != text) at = (at + 1) & mask_;
        if (slots_[at] >= 0 && repeated < 0) repeated = slots_[at];
        slots_[at] = int32_t(i);
    }
}

int32_t Table::find(std::string_view text) const {
    uint64_t at = hash(text, seed_) & mask_;
    while (slots_[at] >= 0 && texts[slots_[at]] != text) at = (at + 1) & mask_;
    return slots_[at];
}

Bpe::Bpe(const Texts& tokens, const uint8_t* kinds, const Texts* merges, const float* scores, bool byte_fallback,
         bool whole_words, int32_t unknown)
    : tokens(tokens), merges(merges ? *merges : Texts{nullptr, nullptr, 0}), kinds_(kinds), scores_(scores),
      byte_fallback_(byte_fallback), whole_words_(whole_words), unknown_(unknown) {
    for (int i = 0; i < 256; ++i) {
        char name[8];
        snprintf(name, sizeof name, "<0x%02X>", unsigned(i));
        bytes_[i] = this->tokens.find(name);
    }
    for (long i = 0; i < tokens.count; ++i)
        if (kinds[i] & ADDED && !tokens[i].empty()) lengths_[(unsigned char)tokens[i][0]].push_back(tokens[i].size());
    for (std::vector<uint32_t>& lengths : lengths_) {
        std::sort(lengths.begin(), lengths.end(), std::greater<>());
        lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
    }
}

// Two neighbours that can be merged: what comes first, and the token that they make.
struct Bpe::Pair {
    double order;  // rank, or the score negated
    int32_t made, left, right;
    int position, next;
    auto key() const { return std::tie(order, made, left, right, position); }
    bool operator<(const Pair& other) const { return key() > other.key(); }  // the least is on top of a queue
};

bool Bpe::pair(int32_t left, int32_t right, std::string& scratch, Pair& to) const {
    const std::string_view one = tokens.texts[left], two = tokens.texts[right];
    scratch.assign(one).append(scores_ ? "" : " ").append(two);
    to.left = left, to.right = right;
    if (scores_) {
        to.made = kinds_[left] & kinds_[right] & PIECE ? tokens.find(scratch) : -1;
        if (to.made < 0 || !(kinds_[to.made] & PIECE)) return false;
        to.order = -double(scores_[to.made]);
        return true;
    }
    const int32_t rank = merges.find(scratch);
    if (rank < 0) return false;
    to.made = tokens.find(scratch.assign(one).append(two));
    to.order = rank;
    return to.made >= 0;
}

void Bpe::encode(std::string_view word, std::vector<int32_t>& to) const {
    if (whole_words_) {
        const int32_t whole = tokens.find(word);
        if (whole >= 0) return to.push_back(whole);
    }
    struct Symbol {
        int32_t token;  // or -1: merged into the one before
        int before, after;
    };
    std::vector<Symbol> symbols;
    bool unknown = false;  // characters without a token wait, as one, for the next that has one: so the library does
    for (size_t at = 0; at < word.size();) {
        const size_t size = std::min<size_t>(width((unsigned char)word[at]), word.size() - at);
        const std::string_view character = word.substr(at, size);
        at += size;
        const int32_t token = tokens.find(character);
        bool spelled = byte_fallback_ && token < 0;
        for (char c : character) spelled = spelled && bytes_[(unsigned char)c] >= 0;
        if (spelled)
            for (char c : character) symbols.push_back({bytes_[(unsigned char)c], 0, 0});
        else if (token < 0) unknown = unknown_ >= 0;
        else {
            if (unknown) symbols.push_back({unknown_, 0, 0});
            symbols.push_back({token, 0, 0});
            unknown = false;
        }
    }
    if (unknown) symbols.push_back({unknown_, 0, 0});
    const int count = int(symbols.size());
    std::string scratch;
    std::vector<Pair> first;
    const auto consider = [&](int left, int right, auto&& add) {
        Pair found;
        if (left < 0 || right >= count || !pair(symbols[left].token, symbols[right].token, scratch, found)) return;
        found.position = left, found.next = right;
        add(found);
    };
    for (int i = 0; i < count; ++i) {
        symbols[i].before = i - 1, symbols[i].after = i + 1;
        consider(i, i + 1, [&](const Pair& p) { first.push_back(p); });
    }
    std::priority_queue<Pair> queue(std::less<Pair>(), std::move(first));
    while (!queue.empty()) {
        const Pair p = queue.top();
        queue.pop();
        Symbol &left = symbols[p.position], *right = &symbols[p.next];
        if (left.token != p.left || right->token != p.right || left.after != p.next) continue;
        left.token = p.made;
        right->token = -1;
        left.after = right->after;
        if (left.after < count) symbols[left.after].before = p.position;
        consider(left.before, p.position, [&](const Pair& q) { queue.push(q); });
        consider(p.position, left.after, [&](const Pair& q) { queue.push(q); });
    }
    for (const Symbol& s : symbols)
        if (s.token >= 0) to.push_back(s.token);
}

std::vector<Bpe::Part> Bpe::split(std::string_view text) const {
    std::vector<Part> parts;
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
        int32_t found = -1;
        for (uint32_t length : lengths_[(unsigned char)text[at]]) {
            if (at + length > text.size()) continue;
            found = tokens.find(text.substr(at, length));
            if (found >= 0 && kinds_[found] & ADDED) break;
            found = -1;
        }
        if (found < 0) {
            ++at;
            continue;
        }
        if (at > begin) parts.push_back({-1, text.substr(begin, at - begin)});
        parts.push_back({found, {}});
        begin = at += tokens.texts[found].size();
    }
    if (begin < text.size()) parts.push_back({-1, text.substr(begin)});
    return parts;
}

}  // namespace fewbits
