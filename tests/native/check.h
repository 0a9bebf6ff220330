// What the tests of the native core share: random numbers, buffers, and a count of what went wrong.
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

namespace fewbits {

// Says what is wrong, and lets the program exit with 1 at its end.
void check(bool right, const std::string& what);

class Random {
public:
    explicit Random(uint64_t seed) : state_(seed * 2654435769u + 1) {}
    uint32_t bits() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return (uint32_t)(state_ >> 32);
    }
    int below(int limit) { return (int)(bits() % (uint32_t)limit); }
    float uniform() { return (float)(bits() >> 8) * 0x1p-24f; }
    float normal() {  // nearly
        float sum = -6;
        for (int i = 0; i < 12; ++i) sum += uniform();
        return sum;
    }

private:
    uint64_t state_;
};

// So many elements and not a byte more behind them, at an address that is a multiple of sizeof(T) but of no more.
template <class T>
class Buffer {
public:
    explicit Buffer(long count) : count_(count), at_((char*)malloc(count * sizeof(T) + sizeof(T))) {}
    ~Buffer() { free(at_); }
    Buffer(const Buffer&) = delete;
    Buffer(Buffer&& other) : count_(other.count_), at_(other.at_) { other.at_ = nullptr; }
    T* data() const { return (T*)(at_ + sizeof(T)); }
    T& operator[](long i) const { return data()[i]; }
    long size() const { return count_; }
    Buffer& fill(T value) {
        for (long i = 0; i < count_; ++i) data()[i] = value;
        return *this;
    }

private:
    long count_;
    char* at_;
};

inline Buffer<float> normals(Random& random, long count) {
    Buffer<float> x(count);
    for (long i = 0; i < count; ++i) x[i] = random.normal();
    return x;
}

// Squared differences over the squares of what is wanted; not a number where a result isn't one.
struct Error {
    double difference = 0, size = 0;
    void add(double got, double want) { difference += (got - want) * (got - want), size += want * want; }
    double nmse() const { return size > 0 ? difference / size : difference; }
};

// The tests: each runs on every usable set of kernels.
void test_products(const std::string& set);
void test_floats(const std::string& set);
void test_encoders(const std::string& set);
void test_steps(const std::string& set);
void test_attention(const std::string& set);
void test_prepare(const std::string& set);
void test_rounding(const std::string& set);
void test_scores(const std::string& set);
void test_bpe();

}  // namespace fewbits
