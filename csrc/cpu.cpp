#include "cpu.h"

#include <atomic>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace fewbits {

const char* name_of(Set set) {
    constexpr const char* NAMES[] = {"portable", "neon", "avx2", "avx512"};
    return NAMES[(int)set];
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
#elif defined(__aarch64__) && defined(__linux__)
std::vector<Feature> features() { return {{"asimddp", (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0}}; }
#elif defined(__aarch64__) && defined(__APPLE__)
std::vector<Feature> features() { return {{"asimddp", true}}; }  // in every processor of theirs for computers
#else
std::vector<Feature> features() { return {}; }
#endif

std::vector<Set> usable() {
    std::vector<Set> sets{Set::portable};
#ifdef FEWBITS_HAS_AVX512
    if (all(0, 3)) sets.push_back(Set::avx2);
    if (all(0, 9)) sets.push_back(Set::avx512);
#endif
#ifdef FEWBITS_HAS_NEON
    if (features().front().here) sets.push_back(Set::neon);
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
