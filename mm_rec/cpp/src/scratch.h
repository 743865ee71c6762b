// Working memory of a kernel.
#pragma once

#include <stdlib.h>

#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

// A 64-byte aligned block of floats, freed at the end of its scope; null if there is no memory.
struct Scratch {
    float* data;
    explicit Scratch(int64_t floats)
        : data(static_cast<float*>(aligned_alloc(64, round_up(floats * int64_t(sizeof(float)), 64)))) {}
    ~Scratch() { free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
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
#pragma omp parallel num_threads(threads) if (tasks > 1 && threads > 1) reduction(&& : done)
    {
        const Scratch block(size.used);
        Parts parts(block.data);
        auto buffers = make(parts);
        done = block.data != nullptr;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tasks; ++i)
            if (block.data) task(i, buffers);
    }
    return done;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
