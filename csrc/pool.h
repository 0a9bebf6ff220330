// Threads that wait for work: they spin for some microseconds, then sleep.
#pragma once

namespace fewbits {

constexpr int MOST_THREADS = 256;

// Calls work(context, i) once for every i in 0 … count - 1, on up to `threads` threads, the caller among them.
// Parts are handed out in order, as threads become free. Returns when all are done. `work` must not throw.
void run(int threads, long count, void (*work)(void* context, long part), void* context);

// The same for anything that can be called with a part's number.
template <class Work>
void parallel(int threads, long count, Work&& work) {
    run(threads, count, [](void* context, long part) { (*static_cast<Work*>(context))(part); }, (void*)&work);
}

}  // namespace fewbits
