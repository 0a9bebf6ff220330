// Merging by a queue against merging by search, one pair after the other; added tokens against trying every place.
#include "bpe.h"
#include "check.h"

namespace fewbits {
namespace {

// Texts in a buffer that ends with the last one.
struct Packed {
    std::vector<int64_t> starts{0};
    std::vector<char> bytes;
    explicit Packed(const std::vector<std::string>& texts) {
        for (const std::string& t : texts) {
            bytes.resize(starts.back());
            bytes.insert(bytes.end(), t.begin(), t.end());
            starts.push_back(starts.back() + (long)t.size() + 8);
        }
        bytes.shrink_to_fit();
    }
    Texts texts() const { return {bytes.data(), starts.data(), (long)starts.size() - 1}; }
};

long place(const std::vector<std::string>& in, const std::string& text) {  // the last one counts
    for (long i = (long)in.size(); i--; )
        if (in[i] == text) return i;
    return -1;
}

struct Vocabulary {
    std::vector<std::string> tokens, merges;
    std::vector<uint8_t> kinds;
    std::vector<float> scores;
};

Vocabulary random_vocabulary(Random& random) {
    Vocabulary v{{"?", "<0x61>", "a", "b", "\xC3\xA9"}, {}, {}, {}};
    while (v.tokens.size() < 40) {
        const std::string one = v.tokens[2 + random.below((int)v.tokens.size() - 2)],
                          two = v.tokens[2 + random.below((int)v.tokens.size() - 2)];
        v.merges.push_back(one + " " + two);
        if (place(v.tokens, one + two) < 0) v.tokens.push_back(one + two);
    }
    for (const std::string& t : v.tokens) {
        v.kinds.push_back(t.size() > 1 && t[0] != '<' && random.below(8) == 0 ? ADDED : t[0] == '<' ? 0 : PIECE);
        v.scores.push_back((float)-random.below(6));
    }
    return v;
}

std::vector<int32_t> merged(const Vocabulary& v, std::vector<int32_t> word, bool by_scores) {
    for (;;) {
        double best = 1e30;
        long at = -1, made = -1, left = 0, right = 0;
        for (size_t i = 0; i + 1 < word.size(); ++i) {
            const std::string &one = v.tokens[word[i]], &two = v.tokens[word[i + 1]];
            const long token = place(v.tokens, one + two);
            if (token < 0) continue;
            double order;
            if (by_scores) {
                if (!(v.kinds[word[i]] & v.kinds[word[i + 1]] & v.kinds[token] & PIECE)) continue;
                order = -v.scores[token];
            } else {
                const long rank = place(v.merges, one + " " + two);
                if (rank < 0) continue;
                order = (double)rank;
            }
            const bool first = order < best || (order == best && (token < made || (token == made && (
                word[i] < left || (word[i] == left && word[i + 1] < right)))));
            if (first) best = order, at = (long)i, made = token, left = word[i], right = word[i + 1];
        }
        if (at < 0) return word;
        word[at] = (int32_t)made;
        word.erase(word.begin() + at + 1);
    }
}

}  // namespace

void test_bpe() {
    Random random(5);
    const std::vector<std::string> letters{"a", "b", "\xC3\xA9"};
    for (int round = 0; round < 60; ++round) {
        const Vocabulary v = random_vocabulary(random);
        const Packed tokens(v.tokens), merges(v.merges);
        const bool by_scores = round % 2;
        const Texts listed = merges.texts();
        const Bpe bpe(tokens.texts(), v.kinds.data(), by_scores ? nullptr : &listed,
                      by_scores ? v.scores.data() : nullptr, false, false, round % 4 ? 0 : -1);
        for (size_t i = 0; i < v.tokens.size(); ++i)
            check(bpe.tokens.find(v.tokens[i]) == (int32_t)i, "bpe: a token is found");
        check(bpe.tokens.find("nowhere") == -1 && bpe.tokens.find("") == -1, "bpe: no token is found");
        for (int text = 0; text < 20; ++text) {
            std::string word;
            std::vector<int32_t> start;
            bool unknown = false;
            for (int i = random.below(30); i--; ) {
                const int letter = random.below(12);
                word += letter < 11 ? letters[letter % 3] : "\xE2\x82\xAC";
                if (letter < 11) start.push_back(2 + letter % 3);
                else if (round % 4 && !unknown) start.push_back(0);
                unknown = letter == 11;
            }
            std::vector<int32_t> got;
            bpe.encode(word, got);
            check(got == merged(v, start, by_scores), "bpe: tokens of " + word);
            std::string again;
            for (const Bpe::Part& part : bpe.split(word)) {
                check(part.token < 0 ? !part.text.empty() : bool(v.kinds[part.token] & ADDED), "bpe: a part");
                again += part.token < 0 ? std::string(part.text) : v.tokens[part.token];
            }
            check(again == word, "bpe: parts of " + word);
        }
    }
    const Packed few({"a", "b", "a"}), none({});
    check(Table(few.texts()).repeated == 0 && Table(none.texts()).find("a") == -1, "bpe: texts twice, and none");
}

}  // namespace fewbits
