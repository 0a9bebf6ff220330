// What this CPU can do, and which of the compiled sets of kernels is in use.
#pragma once

#include <string>
#include <vector>

namespace fewbits {

enum class Set { portable, neon, avx2, avx512 };  // ascending on any one machine

struct Feature {
    const char* name;
    bool here;
};

const char* name_of(Set set);
std::vector<Feature> features();
std::vector<Set> usable();  // compiled in, and the CPU has all their instructions; ascending
Set current();              // the last of `usable()`, until `use` says otherwise
bool use(const std::string& name);  // false: no usable set has that name

// A table of functions, one of each set: `FEWBITS_TABLE(Products, products)` declares portable::products, … and
// `const Products& products_of(Set)`.
#if defined(FEWBITS_HAS_AVX512)
#define FEWBITS_TABLE(Type, table)                                                               \
    namespace portable { extern const Type table; }                                              \
    namespace avx2 { extern const Type table; }                                                  \
    namespace avx512 { extern const Type table; }                                                \
    inline const Type& table##_of(Set set) {                                                     \
        return set == Set::avx512 ? avx512::table : set == Set::avx2 ? avx2::table : portable::table; \
    }
#elif defined(FEWBITS_HAS_NEON)
#define FEWBITS_TABLE(Type, table)                          \
    namespace portable { extern const Type table; }         \
    namespace neon { extern const Type table; }             \
    inline const Type& table##_of(Set set) { return set == Set::neon ? neon::table : portable::table; }
#else
#define FEWBITS_TABLE(Type, table)              \
    namespace portable { extern const Type table; } \
    inline const Type& table##_of(Set) { return portable::table; }
#endif

}  // namespace fewbits
