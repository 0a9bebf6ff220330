// Byte-pair encoding over a vocabulary as a GGUF file has it: nothing is copied, a text is found by its hash.
#pragma once

#include <stdint.h>

#include <string>
#include <string_view>
#include <vector>

namespace fewbits {

// Texts that lie in one buffer, 8 bytes (the next one's length) between them; `starts` has one more than there are.
struct Texts {
    const char* data;
    const int64_t* starts;
    long count;
    std::string_view operator[](long i) const { return {data + starts[i], size_t(starts[i + 1] - 8 - starts[i])}; }
};

// Text -> its number. Of equal texts the last one counts; `repeated` is the first such, or -1.
class Table {
public:
    explicit Table(const Texts& texts);
    int32_t find(std::string_view text) const;

    const Texts texts;
    long repeated = -1;

private:
    std::vector<int32_t> slots_;
    uint64_t seed_, mask_;
};

enum Kind : uint8_t { PIECE = 1, ADDED = 2 };  // may be merged by its score; stands for itself in a text

class Bpe {
public:
    // Either `merges`, pairs with a space between in the order of merging, or `scores` of tokens, highest first.
    Bpe(const Texts& tokens, const uint8_t* kinds, const Texts* merges, const float* scores, bool byte_fallback,
        bool whole_words, int32_t unknown);

    // Appends the tokens of a word: text between added tokens, normalized and split before.
    void encode(std::string_view word, std::vector<int32_t>& to) const;

    struct Part {
        int32_t token;  // an added one, or -1: `text`
        std::string_view text;
    };
    // Added tokens and what is between them; the longest token that starts first wins.
    std::vector<Part> split(std::string_view text) const;

    const Table tokens, merges;

private:
    struct Pair;
    bool pair(int32_t left, int32_t right, std::string& scratch, Pair& to) const;

    const uint8_t* kinds_;
    const float* scores_;  // or null
    const bool byte_fallback_, whole_words_;
    const int32_t unknown_;  // or -1: characters without a token vanish
    int32_t bytes_[256];
    std::vector<uint32_t> lengths_[256];  // of added tokens by their first byte, the longest first
};

}  // namespace fewbits
