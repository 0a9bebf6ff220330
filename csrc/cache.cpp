#include "cache.h"

#include <stdlib.h>
#include <string.h>

#include <new>

namespace fewbits {

long Cache::bytes(const Sizes& z, Kept kept, long capacity) {
    return z.layers * z.kv_heads * lined(capacity) / LINE * planes_of(kept, z.head).all();
}

// fresh pages are zeros that take no memory before they are written
Cache::Cache(const Sizes& sizes, Kept kept, long capacity)
    : sizes(sizes), kept(kept), capacity(capacity), planes_(planes_of(kept, sizes.head)),
      memory_(calloc(bytes(sizes, kept, capacity) + 64, 1), free) {
    if (!memory_) throw std::bad_alloc();
}

Head Cache::head(long layer, long head) const {
    const long lines = lined(capacity) / LINE;
    uint8_t* at = (uint8_t*)(((uintptr_t)memory_.get() + 63) & ~(uintptr_t)63);
    at += (layer * sizes.kv_heads + head) * lines * planes_.all();
    uint8_t* values = at + lines * planes_.keys;
    uint8_t* key_scales = values + lines * planes_.values;
    return {kept, sizes.head, at, values, (uint16_t*)key_scales, (uint16_t*)(key_scales + lines * planes_.key_scales)};
}

void Cache::copy(const Cache& from, long positions) {
    const long lines = lined(positions) / LINE;
    for (long layer = 0; layer < sizes.layers; ++layer)
        for (long h = 0; h < sizes.kv_heads; ++h) {
            const Head to = head(layer, h), source = from.head(layer, h);
            memcpy(to.keys, source.keys, lines * planes_.keys);
            memcpy(to.values, source.values, lines * planes_.values);
            memcpy(to.key_scales, source.key_scales, lines * planes_.key_scales);
            memcpy(to.value_scales, source.value_scales, lines * planes_.value_scales);
        }
    length = positions, stretched = from.stretched;
}

}  // namespace fewbits
