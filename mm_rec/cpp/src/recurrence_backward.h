// Backward pass of the nonlinear time loop. Time goes backwards in chunks. Of each, h_{t-1} and the gates are had
// again by one matrix product; then the loop proper, which only carries the gradient from step to step; then what
// follows from it, all steps at once. Rows of a head lie 2 KB apart in a model of width 512, where they compete
// for the same few lines of the cache, so the loop works on copies side by side.
#pragma once

#include "recurrence.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t CHUNK = 16;  // steps

// What the backward pass writes: dz, dgamma float32 and du in the type of u, all (batch, time, width)
// contiguous; dw_g (groups, heads, d, d), one share per group of sequences; dh0 (batch, width).
template <class T>
struct RecurrenceGradients {
    float* dz;
    T* du;
    float* dgamma;
    float* dw_g;
    float* dh0;
};

// Gradients from above: dh with row stride dh_row; dh_last (batch, width) or null.
struct RecurrenceFromAbove {
    const float* dh;
    int64_t dh_row;
    const float* dh_last;
};

// Buffers of one task. Matrices have rows of `pitch` floats; each sequence of the group has CHUNK such rows of each
// of six things, `sequence` floats from one sequence to the next.
struct RecurrenceScratch {
    int64_t pitch, sequence;
    float *transposed;  // W_g^T, for the gates
    float *packed;      // W_g^T packed, for W_g^T delta
    float *dw_g;
    float *before, *gate, *slope, *gamma, *grad, *delta;  // h_{t-1}, i, z i (1 - i), gamma, gradient at h, at u
    float *carry, *fed_back;                              // (GROUP, pitch): gradient at h_{t-1}, W_g^T delta
    RecurrenceScratch(int64_t d, Parts& parts) : pitch(round_up(d, W)) {
        transposed = parts.take(d * pitch);
        packed = parts.take(d * pitch);
        dw_g = parts.take(d * pitch);
        const int64_t rows = CHUNK * pitch;
        sequence = 6 * rows;
        before = parts.take(GROUP * sequence);
        const auto part = [&](int64_t i) { return before ? before + i * rows : nullptr; };  // null while measuring
        gate = part(1);
        slope = part(2);
        gamma = part(3);
        grad = part(4);
        delta = part(5);
        carry = parts.take(GROUP * pitch);
        fed_back = parts.take(GROUP * pitch);
    }
};

// What the loop needs of steps [t0, t1) of sequence b, the g-th of its group.
template <class T>
static void recurrence_prepare(const RecurrenceInputs<T>& in, const float* h, const RecurrenceFromAbove& above, int g,
                               int64_t b, int64_t head, int64_t t0, int64_t t1, const RecurrenceScratch& w) {
    const int64_t d = in.d, width = in.width(), column = head * d, offset = g * w.sequence;
    for (int64_t t = t0; t < t1; ++t) {
        const int64_t row = b * in.time + t, at = offset + (t - t0) * w.pitch;
        const float* from = in.starts(row) ? nullptr : t ? h + (row - 1) * width + column
                                                   : in.h0 ? in.h0 + b * width + column : nullptr;
        for (int64_t i = 0; i < d; i += W) {
            const int64_t left = d - i;
            store(w.before + at + i, from ? load(from + i, left) : vf{});
            store(w.slope + at + i, load(in.z + row * in.z_row + column + i, left));
            store(w.gamma + at + i, load(in.gamma + row * in.gamma_row + column + i, left));
            store(w.grad + at + i, load(above.dh + row * above.dh_row + column + i, left));
        }
    }
    product<false>(t1 - t0, w.pitch, d, w.before + offset, w.pitch, 1, w.transposed, w.pitch, w.gate + offset, w.pitch);
    for (int64_t t = t0; t < t1; ++t) {
        const T* u = in.u + (b * in.time + t) * in.u_row + column;
        for (int64_t i = 0; i < d; i += W) {
            const int64_t at = offset + (t - t0) * w.pitch + i;
            const vf gate = sigmoid(load(w.gate + at) + load(u + i, d - i));
            store(w.gate + at, gate);
            store(w.slope + at, load(w.slope + at) * gate * (1.0f - gate));
        }
    }
}

// Gradients of steps [t0, t1), once the loop has left the gradients at h and at u.
template <class T>
static void recurrence_finish(const RecurrenceInputs<T>& in, const RecurrenceGradients<T>& out, int g, int64_t b,
                              int64_t head, int64_t t0, int64_t t1, const RecurrenceScratch& w) {
    const int64_t d = in.d, offset = g * w.sequence;
    for (int64_t t = t0; t < t1; ++t) {
        const int64_t to = (b * in.time + t) * in.width() + head * d;
        for (int64_t i = 0; i < d; i += W) {
            const int64_t at = offset + (t - t0) * w.pitch + i, left = d - i;
            const vf grad = load(w.grad + at);
            store(out.dz + to + i, grad * load(w.gate + at), left);
            store(out.dgamma + to + i, grad * load(w.before + at), left);
            store(out.du + to + i, load(w.delta + at), left);
        }
    }
    product<true>(d, w.pitch, t1 - t0, w.delta + offset, 1, w.pitch, w.before + offset, w.pitch, w.dw_g, w.pitch);
}

// Asks for what step t, a whole chunk before it is wanted, reads, and for what this chunk's step t + CHUNK writes.
template <class T>
MM_INLINE void recurrence_prefetch(const RecurrenceInputs<T>& in, const RecurrenceFromAbove& above,
                                   const RecurrenceGradients<T>& out, const float* h, int64_t b, int64_t column, int64_t t) {
    const int64_t d = in.d, width = in.width(), to = (b * in.time + t + CHUNK) * width + column;
    prefetch_row<true>(out.dz + to, d);
    prefetch_row<true>(out.dgamma + to, d);
    prefetch_row<true>(out.du + to, d);
    if (t < 1) return;
    const int64_t row = b * in.time + t;
    prefetch_row(h + (row - 1) * width + column, d);
    prefetch_row(in.z + row * in.z_row + column, d);
    prefetch_row(in.u + row * in.u_row + column, d);
    prefetch_row(in.gamma + row * in.gamma_row + column, d);
    prefetch_row(above.dh + row * above.dh_row + column, d);
}

// Sequences b to b + G of one head.
template <int G, class T>
static void recurrence_backward_task(const RecurrenceInputs<T>& in, const RecurrenceFromAbove& above,
                                     const RecurrenceGradients<T>& out, int64_t b, int64_t head, const float* h,
                                     const RecurrenceScratch& w) {
    const int64_t d = in.d, pitch = w.pitch, width = in.width(), column = head * d;
    memset(w.carry, 0, G * pitch * sizeof(float));
    for (int g = 0; g < G && above.dh_last; ++g)
        memcpy(w.carry + g * pitch, above.dh_last + (b + g) * width + column, d * sizeof(float));
    for (int64_t t1 = in.time; t1 > 0;) {
        const int64_t t0 = max64(0, t1 - CHUNK);
        for (int g = 0; g < G; ++g) recurrence_prepare(in, h, above, g, b + g, head, t0, t1, w);
        for (int64_t t = t1 - 1; t >= t0; --t) {
            const int64_t line = (t - t0) * pitch;
            for (int g = 0; g < G; ++g) recurrence_prefetch(in, above, out, h, b + g, column, t - CHUNK);
            for (int g = 0; g < G; ++g)
                for (int64_t i = 0; i < pitch; i += W) {
                    const int64_t at = g * w.sequence + line + i;
                    const vf grad = load(w.grad + at) + load(w.carry + g * pitch + i);
                    store(w.grad + at, grad);
                    store(w.delta + at, grad * load(w.slope + at));
                    store(w.carry + g * pitch + i, grad * load(w.gamma + at));
                }
            group_matvec<G>(d, w.packed, w.delta + line, w.sequence, w.fed_back, pitch);
            for (int g = 0; g < G; ++g) {
                const bool starts = in.starts((b + g) * in.time + t);
                for (int64_t i = g * pitch; i < (g + 1) * pitch; i += W)
                    store(w.carry + i, starts ? vf{} : load(w.carry + i) + load(w.fed_back + i));
            }
        }
        for (int g = 0; g < G; ++g) recurrence_finish(in, out, g, b + g, head, t0, t1, w);
        t1 = t0;
    }
    for (int g = 0; g < G; ++g) memcpy(out.dh0 + (b + g) * width + column, w.carry + g * pitch, d * sizeof(float));
}

// h is the result of recurrence_forward. False if there is no memory for the scratch.
template <class T>
static bool recurrence_backward(const RecurrenceInputs<T>& in, const RecurrenceFromAbove& above,
                                const RecurrenceGradients<T>& out, const float* h, int threads) {
    const int64_t d = in.d;
    const int group = recurrence_group(in.batch, in.heads);
    const int64_t groups = (in.batch + group - 1) / group, tasks = groups * in.heads;
    if (in.work() < RECURRENCE_MIN_WORK) threads = 1;
    const auto make = [&](Parts& parts) { return RecurrenceScratch(d, parts); };
    return run_tasks(tasks, threads, make, [&](int64_t task, const RecurrenceScratch& w) {
        const int64_t head = task / groups, first = task % groups * group;
        const float* w_g = in.w_g + head * d * d;
        memset(w.transposed, 0, d * w.pitch * sizeof(float));
        memset(w.dw_g, 0, d * w.pitch * sizeof(float));
        for (int64_t j = 0; j < d; ++j)
            for (int64_t i = 0; i < d; ++i) w.transposed[j * w.pitch + i] = w_g[i * d + j];
        pack_columns(d, w_g, 1, d, w.packed);
        const int64_t end = min64(in.batch, first + group);
        int64_t b = first;
        for (; b + GROUP <= end; b += GROUP) recurrence_backward_task<GROUP>(in, above, out, b, head, h, w);
        for (; b + 2 <= end; b += 2) recurrence_backward_task<2>(in, above, out, b, head, h, w);
        for (; b < end; ++b) recurrence_backward_task<1>(in, above, out, b, head, h, w);
        float* dw_g = out.dw_g + (task % groups * in.heads + head) * d * d;
        for (int64_t i = 0; i < d; ++i) memcpy(dw_g + i * d, w.dw_g + i * w.pitch, d * sizeof(float));
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
