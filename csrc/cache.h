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
    static long bytes(const Sizes& sizes, Kept kept, long capacity);
    Cache(const Sizes& sizes, Kept kept, long capacity);  // throws std::bad_alloc
    Head head(long layer, long head) const;
    void copy(const Cache& from, long positions);  // the first ones of a cache of the same sizes and kind

    const Sizes sizes;
    const Kept kept;
    const long capacity;
    long length = 0;  // positions that are filled
    bool stretched = false;  // which frequencies turned its keys

private:
    const Planes planes_;
    std::unique_ptr<void, void (*)(void*)> memory_;
};

}  // namespace fewbits
