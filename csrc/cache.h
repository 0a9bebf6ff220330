// The keys and values that a sequence of tokens leaves behind, for every layer and head.
#pragma once

#include <memory>

#include "attention.h"

namespace fewbits {

struct Sizes {
    long layers, heads, kv_heads, head;  // `head`: columns of one
    float scale;                         // of scores
};

// Keys and values of up to `capacity` positions.
class Cache {
public:
    static long bytes(const Sizes& sizes, long capacity);
    Cache(const Sizes& sizes, long capacity);  // throws std::bad_alloc
    Head head(long layer, long head) const;

    const Sizes sizes;
    const long capacity;
    long length = 0;  // positions that are filled
    bool stretched = false;  // which frequencies turned its keys

private:
    std::unique_ptr<void, void (*)(void*)> memory_;
};

}  // namespace fewbits
