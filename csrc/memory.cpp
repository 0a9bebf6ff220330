#include "memory.h"

#include <atomic>
#include <cstdint>
#include <thread>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fewbits {
namespace {

constexpr long PAGE = 2 << 20, STEP = 16 << 20;

}  // namespace

struct Ready::Filling {
    std::thread thread;
    std::atomic<bool> stopped{false};
};

#ifdef __linux__

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // since Linux 5.14; an older one refuses it, and pages come as they are touched
#endif

void advise(void* at, long bytes) {
    const uintptr_t first = ((uintptr_t)at + PAGE - 1) & ~(uintptr_t)(PAGE - 1),
                    last = ((uintptr_t)at + bytes) & ~(uintptr_t)(PAGE - 1);
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
}

std::unique_ptr<Ready> Ready::make(long bytes) {
    const long whole = (bytes + PAGE - 1) / PAGE * PAGE;
    void* at = mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return nullptr;
    return std::unique_ptr<Ready>(new Ready((unsigned char*)at, whole + PAGE));
}

Ready::Ready(unsigned char* at, long bytes) : at(at), bytes(bytes), filling_(new Filling) {
    advise(at, bytes);
    filling_->thread = std::thread([filling = filling_.get(), at, bytes] {
        for (long done = 0; done < bytes && !filling->stopped; done += STEP)
            madvise(at + done, bytes - done < STEP ? bytes - done : STEP, MADV_POPULATE_WRITE);
    });
}

Ready::~Ready() {
    filling_->stopped = true;
    filling_->thread.join();
    munmap(at, bytes);
}

#else

void advise(void*, long) {}
std::unique_ptr<Ready> Ready::make(long) { return nullptr; }
Ready::Ready(unsigned char* at, long bytes) : at(at), bytes(bytes) {}
Ready::~Ready() {}

#endif

}  // namespace fewbits
