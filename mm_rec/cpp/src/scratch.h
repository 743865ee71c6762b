// Working memory of a kernel.
#pragma once

#include <stdlib.h>

#include "parallel.h"
#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

// A 64-byte aligned block of floats, freed at the end of its scope; null if there is no memory.
struct Scratch {
    float* data;
    explicit Scratch(int64_t floats)
        : data(static_cast<float*>(allocate(round_up(floats * int64_t(sizeof(float)), 64)))) {}
    ~Scratch() { release(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

private:
#if defined(_WIN32)
    static void* allocate(int64_t bytes) { return _aligned_malloc(bytes, 64); }
    static void release(void* block) { _aligned_free(block); }
#else
    static void* allocate(int64_t bytes) { return aligned_alloc(64, bytes); }
    static void release(void* block) { free(block); }
#endif
};

// Deals a block out in order, every part 64-byte aligned. With a null block it measures: `used` is the size.
struct Parts {
    float* base;
    int64_t used = 0;
    explicit Parts(float* block) : base(block) {}
    float* take(int64_t floats) {
        float* part = base ? base + used : nullptr;
        used += round_up(floats, 16);
        return part;
    }
};

// Calls task(i, buffers) for i < tasks, dealt out to the threads in order. Every thread has buffers of its own, made
// by make(parts), which is also called to measure. False if there is no memory for them.
template <class Make, class Task>
static bool run_tasks(int64_t tasks, int threads, Make make, Task task) {
    Parts size(nullptr);
    make(size);
    bool done = true;
    parallel_ranges(tasks, threads, [&](int64_t begin, int64_t end) {
        const Scratch block(size.used);
        if (!block.data) return __atomic_store_n(&done, false, __ATOMIC_RELAXED);
        Parts parts(block.data);
        auto buffers = make(parts);
        for (int64_t i = begin; i < end; ++i) task(i, buffers);
    });
    return done;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
