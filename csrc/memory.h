// Memory in large pages, and memory that is made ready before it is needed.
#pragma once

#include <memory>

namespace fewbits {

// Asks for huge pages under a buffer that was not touched yet.
void advise(void* at, long bytes);

// `bytes` of zeros in large pages, which a thread of its own fills in while others go on.
class Ready {
public:
    static std::unique_ptr<Ready> make(long bytes);  // null where the system has no way to do it
    ~Ready();
    Ready(const Ready&) = delete;

    unsigned char* const at;
    const long bytes;

private:
    struct Filling;
    Ready(unsigned char* at, long bytes);
    std::unique_ptr<Filling> filling_;
};

}  // namespace fewbits
