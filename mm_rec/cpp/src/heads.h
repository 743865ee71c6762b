// What kernels share that work on one head of one sequence at a time: shapes, rows in float32, transposed blocks.
#pragma once

#include "product.h"
#include "scratch.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t HEADS_MIN_WORK = 1 << 18;  // multiplications under which a second thread costs more than it brings

enum KernelResult { KERNEL_DONE = 0, KERNEL_NO_SCRATCH = 1, KERNEL_BAD_POSITION = 2 };

// Letters as in mm_rec/ops/reference.py. The context of a row is the last `window` tokens and the chunk.
struct ContextShape {
    int64_t batch, time, window, heads, d;
    const int64_t* position;  // (batch, time)
    int64_t context() const { return window + time; }
    int64_t pitch() const { return round_up(d, W); }  // floats from one row of d to the next
    int64_t at(int64_t b, int64_t t) const { return position[b * time + t]; }
};

// Calls task(b, head, buffers) for every head of every sequence, in one thread if there are few multiplications; see
// run_tasks.
template <class Shape, class Make, class Task>
static int for_each_head(const Shape& s, int64_t work, int threads, Make make, Task task) {
    const auto one = [&](int64_t i, auto& buffers) { task(i / s.heads, i % s.heads, buffers); };
    if (work < HEADS_MIN_WORK) threads = 1;
    return run_tasks(s.batch * s.heads, threads, make, one) ? KERNEL_DONE : KERNEL_NO_SCRATCH;
}

// Makes the buffers of a thread for run_tasks; where rows have ends that are not written, those are 0.
template <class Buffers, class Shape>
static auto make_padded(const Shape& s) {
    return [&s](Parts& parts) {
        const Buffers buffers(s, parts);
        if (parts.base && s.d != s.pitch()) memset(parts.base, 0, parts.used * sizeof(float));
        return buffers;
    };
}

struct Span {
    int64_t begin, end;
};

// Rows of d elements: that of (b, t, head) at data + b * sequence + t * row + head * d.
template <class T>
struct HeadRows {
    T* data;
    int64_t sequence, row;

    // The row of one head, asking for the one that will be wanted `AHEAD` rows later if that is before `end`.
    T* at(int64_t b, int64_t t, int64_t end, int64_t head, int64_t d) const {
        constexpr int64_t AHEAD = 10;
        T* here = data + b * sequence + t * row + head * d;
        if (t + AHEAD < end) prefetch_row(here + AHEAD * row, d);
        return here;
    }
};

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
