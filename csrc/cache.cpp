#include "cache.h"

#include <stdlib.h>

#include <new>

namespace fewbits {

long Cache::bytes(const Sizes& z, long capacity) {
    return z.layers * z.kv_heads * lined(capacity) * (z.head + lined(z.head)) * (long)sizeof(uint16_t);
}

// fresh pages are zeros that take no memory before they are written
Cache::Cache(const Sizes& sizes, long capacity)
    : sizes(sizes), capacity(capacity), memory_(calloc(bytes(sizes, capacity) + 64, 1), free) {
    if (!memory_) throw std::bad_alloc();
}

Head Cache::head(long layer, long head) const {
    const long number = layer * sizes.kv_heads + head, keys = lined(capacity) * sizes.head;
    uint16_t* at = (uint16_t*)(((uintptr_t)memory_.get() + 63) & ~(uintptr_t)63);
    at += number * (keys + lined(capacity) * lined(sizes.head));
    return {sizes.head, at, at + keys};
}

}  // namespace fewbits
