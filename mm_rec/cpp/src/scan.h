// s_t = a_t * s_{t-1} + x_t, elementwise over (B, T, D); all tensors float32. Each column is one thread's.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t SCAN_MIN_WORK = 1 << 14;  // elements under which a second thread costs more than it brings

// The columns that one task owns: whole rows if there are sequences enough for the threads, else a share.
struct ScanColumns {
    int64_t parts, width;
    ScanColumns(int64_t batch, int64_t time, int64_t columns, int threads) {
        if (batch * time * columns < SCAN_MIN_WORK) threads = 1;
        parts = min64((threads + batch - 1) / batch, (columns + W - 1) / W);
        width = round_up((columns + parts - 1) / parts, W);
    }
};

MM_INLINE void scan_step(int64_t n, const float* a, const float* x, const float* before, float* s) {
    for_vectors(n, [&](int64_t i, auto left) {
        store(s + i, load(a + i, left) * load(before + i, left) + load(x + i, left), left);
    });
}

// a, x: row (b, t) at (b * time + t) times its row stride. s0 (batch, columns) and reset (batch, time) may be null.
static void scan_forward(int64_t batch, int64_t time, int64_t columns, const float* a, int64_t a_row, const float* x,
                         int64_t x_row, const float* s0, const uint8_t* reset, float* s, int threads) {
    const ScanColumns split(batch, time, columns, threads);
    const int64_t tasks = batch * split.parts;
    parallel_for(tasks, threads, [=](int64_t task) {
        const int64_t b = task / split.parts, c = task % split.parts * split.width;
        const int64_t n = min64(split.width, columns - c);
        if (n <= 0) return;
        const float* before = s0 ? s0 + b * columns + c : nullptr;
        for (int64_t row = b * time; row < (b + 1) * time; ++row) {
            float* now = s + row * columns + c;
            if (before && !(reset && reset[row]))
                scan_step(n, a + row * a_row + c, x + row * x_row + c, before, now);
            else
                memcpy(now, x + row * x_row + c, n * sizeof(float));
            before = now;
        }
    });
}

MM_INLINE void scan_step_backward(int64_t n, const float* ds, const float* a_next, const float* dx_next, const float* s_before,
                                  float* da, float* dx) {
    for_vectors(n, [&](int64_t i, auto left) {
        vf g = load(ds + i, left);
        if (a_next) g += load(a_next + i, left) * load(dx_next + i, left);
        store(dx + i, g, left);
        store(da + i, s_before ? g * load(s_before + i, left) : vf{}, left);
    });
}

// da, dx contiguous; ds0 may be null.
static void scan_backward(int64_t batch, int64_t time, int64_t columns, const float* ds, int64_t ds_row, const float* s,
                          const float* a, int64_t a_row, const float* s0, const uint8_t* reset, float* da, float* dx,
                          float* ds0, int threads) {
    const ScanColumns split(batch, time, columns, threads);
    const int64_t tasks = batch * split.parts;
    parallel_for(tasks, threads, [=](int64_t task) {
        const int64_t b = task / split.parts, c = task % split.parts * split.width;
        const int64_t n = min64(split.width, columns - c);
        if (n <= 0) return;
        const float* a_next = nullptr;  // null where nothing flows back: after the last step, and into a reset
        const float* dx_next = nullptr;
        for (int64_t t = time - 1; t >= 0; --t) {
            const int64_t row = b * time + t;
            if (t) {  // rows are read from the last to the first, which the processor does not foresee
                prefetch_row(ds + (row - 1) * ds_row + c, n);
                prefetch_row(a + row * a_row + c, n);
                if (t > 1) prefetch_row(s + (row - 2) * columns + c, n);
                prefetch_row<true>(da + (row - 1) * columns + c, n);
                prefetch_row<true>(dx + (row - 1) * columns + c, n);
            }
            const bool starts = reset && reset[row];
            const float* before = t ? s + (row - 1) * columns + c : s0 ? s0 + b * columns + c : nullptr;
            float* dx_now = dx + row * columns + c;
            scan_step_backward(n, ds + row * ds_row + c, a_next, dx_next, starts ? nullptr : before,
                               da + row * columns + c, dx_now);
            a_next = starts ? nullptr : a + row * a_row + c;
            dx_next = dx_now;
        }
        if (!ds0) return;
        for (int64_t i = 0; i < n; i += W) {
            const int64_t left = n - i;
            store(ds0 + b * columns + c + i, a_next ? load(a_next + i, left) * load(dx_next + i, left) : vf{}, left);
        }
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
