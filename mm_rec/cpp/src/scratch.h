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

}  // namespace MM_LEVEL
}  // namespace mm_rec
