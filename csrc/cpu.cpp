#include "cpu.h"

#include <atomic>

namespace fewbits {

const char* name_of(Set set) {
    return set == Set::avx512 ? "avx512" : set == Set::avx2 ? "avx2" : "portable";
}

#if defined(__x86_64__)
#define HAS(name) Feature{name, __builtin_cpu_supports(name) != 0}

std::vector<Feature> features() {
    __builtin_cpu_init();
    return {HAS("avx2"),     HAS("fma"),      HAS("f16c"),       HAS("avx512f"),   HAS("avx512bw"),
            HAS("avx512vl"), HAS("avx512dq"), HAS("avx512vnni"), HAS("avx512bf16")};
}

static bool all(size_t first, size_t last) {
    const auto have = features();
    for (size_t i = first; i < last; ++i)
        if (!have[i].here) return false;
    return true;
}
#else
std::vector<Feature> features() { return {}; }
static bool all(size_t, size_t) { return false; }
#endif

std::vector<Set> usable() {
    std::vector<Set> sets{Set::portable};
#ifdef FEWBITS_HAS_AVX512
    if (all(0, 3)) sets.push_back(Set::avx2);
    if (all(0, 9)) sets.push_back(Set::avx512);
#endif
    return sets;
}

static std::atomic<Set>& chosen() {
    static std::atomic<Set> set{usable().back()};
    return set;
}

Set current() { return chosen(); }

bool use(const std::string& name) {
    for (Set set : usable())
        if (name == name_of(set)) {
            chosen() = set;
            return true;
        }
    return false;
}

}  // namespace fewbits
