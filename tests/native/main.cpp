// Runs the kernels of every set that was compiled and that this CPU has, against plain loops in double precision.
//
//     native_tests [SET …]     exits with 1 if a result is wrong, or if a set that is named cannot run here
#include <stdio.h>

#include <algorithm>

#include "check.h"
#include "cpu.h"

static int failures = 0;

void fewbits::check(bool right, const std::string& what) {
    if (right) return;
    if (++failures <= 20) fprintf(stderr, "wrong: %s\n", what.c_str());
}

int main(int count, char** arguments) {
    using namespace fewbits;
    std::vector<std::string> sets(arguments + 1, arguments + count), here;
    for (Set set : usable()) here.emplace_back(name_of(set));
    if (sets.empty()) sets = here;
    test_bpe();
    for (const std::string& set : sets) {
        const int before = failures;
        if (use(set)) {
            test_products(set);
            test_floats(set);
            test_encoders(set);
            test_steps(set);
            test_attention(set);
            test_prepare(set);
            test_rounding(set);
            test_scores(set);
        } else {
            check(false, "no usable set of kernels is called " + set);
        }
        printf("%s: %s\n", set.c_str(), failures == before ? "right" : "WRONG");
        fflush(stdout);
    }
    return failures ? 1 : 0;
}
