#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() std::this_thread::yield()
#endif

namespace fewbits {
namespace {

constexpr int SPINS = 4000;  // pauses before a thread sleeps: 50 to 200 microseconds

struct Job {
    void (*work)(void*, long) = nullptr;
    void* context = nullptr;
    long count = 0;
    int threads = 0;  // how many take part, the caller counted
};

class Pool {
public:
    void run(const Job& job) {
        std::lock_guard<std::mutex> alone(callers_);
        while ((int)threads_.size() < job.threads - 1) {
            const int number = (int)threads_.size() + 1;
            threads_.emplace_back([this, number, round = round_.load()] { serve(number, round); });
        }
        job_ = job;
        next_ = 0;
        open_ = true;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            round_.fetch_add(1);
        }
        if (asleep_.load() > 0) wake_.notify_all();
        take();
        // a thread that could not start in time (another pool may spin on its core) is not waited for
        open_ = false;
        for (int spins = 0; busy_.load() > 0; ++spins) {
            if (spins < SPINS) PAUSE();
            else std::this_thread::yield();
        }
    }

    // never destroyed: threads may outlive static destructors
    static Pool& get();

private:
    void take() {
        for (long part; (part = next_.fetch_add(1, std::memory_order_relaxed)) < job_.count;)
            job_.work(job_.context, part);
    }

    void serve(int number, unsigned seen) {
        for (;;) {
            for (int spins = 0; spins < SPINS && round_.load(std::memory_order_acquire) == seen; ++spins) PAUSE();
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                asleep_.fetch_add(1);
                wake_.wait(lock, [&] { return round_.load() != seen; });
                asleep_.fetch_sub(1);
            }
            seen = round_.load();
            busy_.fetch_add(1);
            if (open_.load() && number < job_.threads) take();
            busy_.fetch_sub(1);
        }
    }

    Job job_;
    alignas(64) std::atomic<long> next_{0};
    alignas(64) std::atomic<int> busy_{0};  // threads that look at the job
    std::atomic<bool> open_{false};  // whether they may
    alignas(64) std::atomic<unsigned> round_{0};
    std::atomic<int> asleep_{0};
    std::mutex callers_, mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> threads_;
};

std::atomic<Pool*> pool{nullptr};

Pool& Pool::get() {
    // a fork leaves a child without the threads: it starts again with a pool of its own
    static const int once = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
    (void)once;
    Pool* found = pool.load();
    if (!found) {
        Pool* made = new Pool;
        if (pool.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *found;
}

}  // namespace

void run(int threads, long count, void (*work)(void*, long), void* context) {
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        for (long part = 0; part < count; ++part) work(context, part);
        return;
    }
    Pool::get().run({work, context, count, threads});
}

}  // namespace fewbits
