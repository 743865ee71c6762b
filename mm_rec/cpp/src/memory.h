// What reading and writing the memories share: shapes, positions, rows in float32.
#pragma once

#include "product.h"
#include "scratch.h"

extern "C" {
float logf(float);
}

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t MEMORY_MIN_WORK = 1 << 18;  // multiplications under which a second thread costs more than it brings

enum MemoryResult { MEMORY_DONE = 0, MEMORY_NO_SCRATCH = 1, MEMORY_BAD_POSITION = 2 };

// Letters as in mm_rec/ops/reference.py. The context of a row is the ring of `window` tokens and the chunk.
struct MemoryShape {
    int64_t batch, time, window, heads, d, slots;
    const int64_t* position;  // (batch, time)
    int64_t block() const { return window / 2; }
    int64_t context() const { return window + time; }
    int64_t versions() const { return (time + block() - 1) / block() + 1; }
    int64_t pitch() const { return round_up(d, W); }            // floats from one row of d to the next
    int64_t slot_pitch() const { return round_up(slots, W); }   // floats from one row of slots to the next
    int64_t at(int64_t b, int64_t t) const { return position[b * time + t]; }
    bool writes(int64_t b, int64_t t) const { return at(b, t) >= window && at(b, t) % block() == 0; }

    // Threads worth using, from a rough count of multiplications: reading all rows once, and every query's scores.
    int useful_threads(int threads) const {
        return batch * heads * d * (2 * context() + 2 * time * (window + slots)) < MEMORY_MIN_WORK ? 1 : threads;
    }

    // Whether no row has a negative position or more writes than there are versions for.
    bool valid() const {
        for (int64_t b = 0; b < batch; ++b) {
            int64_t count = 0;
            for (int64_t t = 0; t < time; ++t) {
                if (at(b, t) < 0) return false;
                count += writes(b, t);
            }
            if (count >= versions()) return false;
        }
        return true;
    }
};

// Calls task(b, head, buffers) for every head of every sequence; see run_tasks.
template <class Make, class Task>
static int for_each_head(const MemoryShape& s, int threads, Make make, Task task) {
    if (!s.valid()) return MEMORY_BAD_POSITION;
    const auto one = [&](int64_t i, auto& buffers) { task(i / s.heads, i % s.heads, buffers); };
    return run_tasks(s.batch * s.heads, s.useful_threads(threads), make, one) ? MEMORY_DONE : MEMORY_NO_SCRATCH;
}

// The memory, or its gradient: key, value (batch, versions, heads, slots, d) and mass (batch, versions, heads, slots).
template <class F>
struct Memory {
    F* key;
    F* value;
    F* mass;
};

MM_INLINE int64_t slot_index(const MemoryShape& s, int64_t b, int64_t version, int64_t head) {
    return ((b * s.versions() + version) * s.heads + head) * s.slots;
}

// Rows of d elements: that of (b, t, head) at data + (b * time + t) * row + head * d.
template <class T>
struct HeadRows {
    T* data;
    int64_t row;

    // The row of one head, asking for the one that will be wanted `AHEAD` rows later if that is before `end`.
    T* at(int64_t index, int64_t end, int64_t head, int64_t d) const {
        constexpr int64_t AHEAD = 10;
        if (index + AHEAD < end) prefetch_row(data + (index + AHEAD) * row + head * d, d);
        return data + index * row + head * d;
    }
};

// Scores to exponentials, with the highest score taken off, in place; returns their sum. Scores past n, up to a whole vector, become 0.
MM_INLINE float exponentials(int64_t n, float* scores) {
    for (int64_t i = n; i < round_up(n, W); ++i) scores[i] = -__builtin_inff();
    vf top = load(scores);
    for (int64_t i = W; i < n; i += W) top = max(load(scores + i), top);
    const float highest = max(top);
    vf total = {};
    for (int64_t i = 0; i < n; i += W) {
        const vf e = exp(load(scores + i) - highest);
        total += e;
        store(scores + i, e);
    }
    return sum(total);
}

// A row of d elements to a row of floats, filled up with zeros to whole vectors.
template <class T>
MM_INLINE void load_row(int64_t d, const T* from, float* to) {
    for (int64_t i = 0; i < d; i += W) store(to + i, load(from + i, d - i));
}
// The first d elements of a row, times scale.
template <class T, class U>
MM_INLINE void store_row(int64_t d, const T* from, U* to, float scale = 1) {
    for (int64_t i = 0; i < d; i += W) store(to + i, load(from + i, d - i) * scale, d - i);
}

// to = x with its two halves rotated by the angles whose cosines and sines are given, times scale. The gradient is
// the rotation back: sign = -1. May be in place.
template <class T>
MM_INLINE void rotate_row(int64_t d, const float* cosine, const float* sine, float sign, float scale, const float* x,
                          T* to) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i += W) {
        const int64_t left = half - i;
        const vf c = load(cosine + i, left) * scale, s = load(sine + i, left) * (sign * scale);
        const vf first = load(x + i, left), second = load(x + half + i, left);
        store(to + i, first * c - second * s, left);
        store(to + half + i, first * s + second * c, left);
    }
}

// to[c][r] = from[r][c] for r < rows, c < columns; columns of `to` past `rows`, up to to_pitch, are 0. The rows of
// both are whole vectors of cells of 4 bytes: `columns` is rounded up to one.
template <class Cell>
static void transpose(int64_t rows, int64_t columns, const Cell* from, int64_t from_pitch, Cell* to, int64_t to_pitch) {
    for (int64_t r = 0; r < to_pitch; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            vu block[W] = {};
            for (int64_t i = 0; i < min64(W, rows - r); ++i) memcpy(&block[i], from + (r + i) * from_pitch + c, sizeof(vu));
            transpose(block);
            for (int64_t i = 0; i < W; ++i) memcpy(to + (c + i) * to_pitch + r, &block[i], sizeof(vu));
        }
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
