// Backward pass of the nonlinear time loop. Time goes backwards in chunks. Of each, h_{t-1} and the gates are had
// again by one matrix product; then the loop, which carries the gradient from step to step and writes what follows from
// it; then the chunk's share of dW_g, another product. Rows of a head lie 2 KB apart in a model of width 512, where
// they compete for the same few lines of the cache, so what is read more than once is copied side by side.
#pragma once

#include "recurrence.h"

namespace mm_rec {
namespace MM_LEVEL {

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

// Buffers of a chunk. Matrices have rows of `pitch` floats, one for each of the chunk's steps, sequence by sequence.
struct RecurrenceScratch {
    int64_t pitch;
    float *before, *gate, *delta;  // h_{t-1}, i, gradient at u
    float* fed_back;               // (GROUP, pitch): W_g^T delta
    float* heads;                  // RecurrenceHead of each
    RecurrenceScratch(int64_t d, int64_t heads_together, Parts& parts) : pitch(round_up(d, W)) {
        before = parts.take(GROUP * CHUNK * pitch);
        gate = parts.take(GROUP * CHUNK * pitch);
        delta = parts.take(GROUP * CHUNK * pitch);
        fed_back = parts.take(GROUP * pitch);
        heads = parts.take(heads_together * (3 * d + GROUP) * pitch);
    }
};

// What a head keeps from chunk to chunk.
struct RecurrenceHead {
    int64_t head;
    float *transposed;  // W_g^T, for the gates
    float *packed;      // W_g^T packed, for W_g^T delta
    float *dw_g, *carry;  // carry (GROUP, pitch): gradient at h_{t-1}
    RecurrenceHead(int64_t head, int64_t index, int64_t d, const RecurrenceScratch& w) : head(head) {
        transposed = w.heads + index * (3 * d + GROUP) * w.pitch;
        packed = transposed + d * w.pitch;
        dw_g = packed + d * w.pitch;
        carry = dw_g + d * w.pitch;
    }
    void begin(int64_t d, const float* w_g, const RecurrenceScratch& w) const {
        memset(transposed, 0, d * w.pitch * sizeof(float));
        memset(dw_g, 0, d * w.pitch * sizeof(float));
        for (int64_t j = 0; j < d; ++j)
            for (int64_t i = 0; i < d; ++i) transposed[j * w.pitch + i] = w_g[i * d + j];
        pack_columns(d, w_g, 1, d, packed);
    }
};

// h_{t-1} and the gates of steps [t0, t1) of G sequences from b on.
template <int G, class T>
static void recurrence_gates(const RecurrenceInputs<T>& in, const float* h, int64_t b, const RecurrenceHead& head,
                             int64_t t0, int64_t t1, const RecurrenceScratch& w) {
    const int64_t d = in.d, width = in.width(), column = head.head * d;
    float* before = w.before;
    for (int g = 0; g < G; ++g)
        for (int64_t t = t0; t < t1; ++t, before += w.pitch) {
            const int64_t row = (b + g) * in.time + t;
            const float* from = t ? h + (row - 1) * width + column : in.h0 ? in.h0 + (b + g) * width + column : nullptr;
            if (in.starts(row) || !from)
                memset(before, 0, w.pitch * sizeof(float));
            else
                for_vectors(d, [&](int64_t i, auto left) { store(before + i, load(from + i, left)); });
        }
    product<false>(G * (t1 - t0), w.pitch, d, w.before, w.pitch, 1, head.transposed, w.pitch, w.gate, w.pitch);
    float* gate = w.gate;
    for (int g = 0; g < G; ++g)
        for (int64_t t = t0; t < t1; ++t, gate += w.pitch) {
            const T* u = in.u + ((b + g) * in.time + t) * in.u_row + column;
            for_vectors(d, [&](int64_t i, auto left) { store(gate + i, sigmoid(load(gate + i) + load(u + i, left))); });
        }
}

// Asks for what step t, a whole chunk before it is its turn, reads.
template <class T>
MM_INLINE void recurrence_prefetch(const RecurrenceInputs<T>& in, const RecurrenceFromAbove& above,
                                   const float* h, int64_t b, int64_t column, int64_t t) {
    if (t < 1) return;
    const int64_t d = in.d, width = in.width(), row = b * in.time + t;
    prefetch_row(h + (row - 1) * width + column, d);
    prefetch_row(in.z + row * in.z_row + column, d);
    prefetch_row(in.u + row * in.u_row + column, d);
    prefetch_row(in.gamma + row * in.gamma_row + column, d);
    prefetch_row(above.dh + row * above.dh_row + column, d);
}

// Steps [t0, t1) of one head of G sequences from b on.
template <int G, bool STREAM, class T>
static void recurrence_backward_chunk(const RecurrenceInputs<T>& in, const RecurrenceFromAbove& above,
                                      const RecurrenceGradients<T>& out, int64_t b, const RecurrenceHead& head,
                                      const float* h, int64_t t0, int64_t t1, const RecurrenceScratch& w) {
    const int64_t d = in.d, pitch = w.pitch, sequence = (t1 - t0) * pitch, width = in.width(), column = head.head * d;
    recurrence_gates<G>(in, h, b, head, t0, t1, w);
    for (int64_t t = t1 - 1; t >= t0; --t) {
        const int64_t step = (t - t0) * pitch;
        for (int g = 0; g < G; ++g) {
            const int64_t row = (b + g) * in.time + t, to = row * width + column, at = g * sequence + step;
            const float *z = in.z + row * in.z_row + column, *gamma = in.gamma + row * in.gamma_row + column;
            const float* dh = above.dh + row * above.dh_row + column;
            float* carry = head.carry + g * pitch;
            for_vectors(d, [&](int64_t i, auto left) {
                const vf grad = load(dh + i, left) + load(carry + i), gate = load(w.gate + at + i);
                const vf dz = grad * gate, delta = dz * (load(z + i, left) * (1.0f - gate));
                store(w.delta + at + i, delta);
                store(carry + i, grad * load(gamma + i, left));
                const vf dgamma = grad * load(w.before + at + i);
                if constexpr (STREAM) {
                    stream(out.dz + to + i, dz);
                    stream(out.dgamma + to + i, dgamma);
                    stream(out.du + to + i, delta);
                } else {
                    store(out.dz + to + i, dz, left);
                    store(out.dgamma + to + i, dgamma, left);
                    store(out.du + to + i, delta, left);
                }
            });
        }
        for (int g = 0; g < G; ++g) recurrence_prefetch(in, above, h, b + g, column, t - CHUNK);
        group_matvec<G>(d, head.packed, w.delta + step, sequence, w.fed_back, pitch);
        for (int g = 0; g < G; ++g) {
            const bool starts = in.starts((b + g) * in.time + t);
            for (int64_t i = 0; i < pitch; i += W) {
                const int64_t at = g * pitch + i;
                store(head.carry + at, starts ? vf{} : load(head.carry + at) + load(w.fed_back + at));
            }
        }
    }
    product<true>(d, pitch, G * (t1 - t0), w.delta, 1, pitch, w.before, pitch, head.dw_g, pitch);
}

// h is the result of recurrence_forward. False if there is no memory for the scratch.
template <class T>
static bool recurrence_backward(const RecurrenceInputs<T>& in, const RecurrenceFromAbove& above,
                                const RecurrenceGradients<T>& out, const float* h, int threads) {
    const int64_t d = in.d, width = in.width(), time = in.time;
    const int group = recurrence_group(in.batch, in.heads);
    if (in.work() < RECURRENCE_MIN_WORK) threads = 1;
    const int64_t groups = (in.batch + group - 1) / group, heads = recurrence_heads(in.heads, groups, threads);
    const int64_t size = in.batch * time * width;
    const bool past_caches = streams(out.dz, d, size) && streams(out.dgamma, d, size) && streams(out.du, d, size);
    const auto make = [&](Parts& parts) { return RecurrenceScratch(d, heads, parts); };
    return run_tasks(in.heads / heads * groups, threads, make, [&](int64_t task, const RecurrenceScratch& w) {
        const int64_t first_head = task / groups * heads, first = task % groups * group;
        const auto each_head = [&](auto body) {
            for (int64_t k = 0; k < heads; ++k) body(RecurrenceHead(first_head + k, k, d, w));
        };
        each_head([&](const RecurrenceHead& head) { head.begin(d, in.w_g + head.head * d * d, w); });
        for_sequences(first, min64(in.batch, first + group), [&](auto size, int64_t b) {
            constexpr int G = decltype(size)::value;
            each_head([&](const RecurrenceHead& head) {
                memset(head.carry, 0, G * w.pitch * sizeof(float));
                for (int g = 0; g < G && above.dh_last; ++g)
                    memcpy(head.carry + g * w.pitch, above.dh_last + (b + g) * width + head.head * d, d * sizeof(float));
            });
            for (int64_t t1 = time; t1 > 0; t1 -= CHUNK)
                each_head([&](const RecurrenceHead& head) {
                    const auto chunk = past_caches ? recurrence_backward_chunk<G, true, T>
                                                   : recurrence_backward_chunk<G, false, T>;
                    chunk(in, above, out, b, head, h, max64(0, t1 - CHUNK), t1, w);
                });
            each_head([&](const RecurrenceHead& head) {
                for (int g = 0; g < G; ++g)
                    memcpy(out.dh0 + (b + g) * width + head.head * d, head.carry + g * w.pitch, d * sizeof(float));
            });
        });
        each_head([&](const RecurrenceHead& head) {
            float* dw_g = out.dw_g + (task % groups * in.heads + head.head) * d * d;
            for (int64_t i = 0; i < d; ++i) memcpy(dw_g + i * d, head.dw_g + i * w.pitch, d * sizeof(float));
        });
        end_streams();
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
