// Sums and divergences of logits, against double precision.
#include <math.h>

#include "check.h"
#include "scores.h"

namespace fewbits {
namespace {

void test_row(const Scores& scores, long width, float size, float apart, const std::string& name) {
    Random random(width);
    const Buffer<float> p = normals(random, width), q = normals(random, width);
    const long most = random.below((int)width);
    for (long i = 0; i < width; ++i) p[i] *= size;
    p[most] = 9 * size;
    if (most + 1 < width) p[width - 1] = p[most];  // the first of two is the one
    for (long i = 0; i < width; ++i) q[i] = p[i] + apart * q[i];
    auto exact = [&](const Buffer<float>& x) {
        double sum = 0;
        for (long i = 0; i < width; ++i) sum += exp((double)x[i] - 9 * size);
        return 9 * size + log(sum);
    };
    const double a = exact(p), b = exact(q);
    double wanted = 0, scale = 0;
    for (long i = 0; i < width; ++i) {
        const double term = exp(p[i] - a) * (p[i] - a - q[i] + b);
        wanted += term, scale += fabs(term);
    }
    long top = -1, other;
    const double found = scores.log_sum(p.data(), width, &top), of_q = scores.log_sum(q.data(), width, &other);
    const std::string where = name + ", width " + std::to_string(width);
    check(top == most, where + ": the largest");
    check(fabs(found - a) <= 1e-6 && fabs(of_q - b) <= 1e-6, where + ": log-sum");
    const double kl = scores.divergence(p.data(), found, q.data(), of_q, width);
    check(fabs(kl - wanted) <= 4e-6 * scale + 4e-7, where + ": divergence");
    check(fabs(scores.divergence(p.data(), found, p.data(), found, width)) == 0, where + ": from itself");
}

}  // namespace

void test_scores(const std::string& set) {
    const Scores& scores = scores_of(current());
    for (long width : {1L, 3L, 16L, 17L, 1000L, 1024L, 1041L, 49152L})
        for (float apart : {0.01f, 2.0f}) test_row(scores, width, 3, apart, set);
    Buffer<float> wrong(40);
    wrong.fill(1);
    wrong[37] = NAN;
    long top;
    const double sum = scores.log_sum(wrong.data(), 40, &top);
    check(sum != sum, set + ": a sum over what is no number");
}

}  // namespace fewbits
