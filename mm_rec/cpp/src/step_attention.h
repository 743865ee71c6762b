// Multi-memory attention for one token: heads of one sequence append their keys and values to the ring, and read the
// window and the long-term memory.
#pragma once

#include "step_memory.h"
#include "step_product.h"

namespace mm_rec {
namespace MM_LEVEL {

// What the heads of one memory block share. The ring of a sequence is `window` rows of heads * d, oldest first, and
// room for the new one behind them.
template <class T>
struct StepAttention {
    int64_t heads, d, window;
    const float *cosine, *sine;          // (window, d / 2): of the distance to the key
    const float* qkv;                    // (batch, 3, heads, d), rows qkv_row apart
    int64_t qkv_row;
    T *k, *v, *own;                      // the first sequence's rings: keys, values, and what keys are made of
    int64_t ring_stride;                 // elements from one sequence's ring to the next
    const int64_t* position;             // (batch)
    StepMemory memory;
    int64_t width() const { return heads * d; }
};

// Buffers of one thread: a row for each head.
struct StepAttentionScratch {
    float *q, *out, *scores, *total;
    StepMemoryScratch memory;
    StepAttentionScratch(int64_t heads, int64_t d, int64_t window, int64_t reach, Parts& parts)
        : q(parts.take(heads * round_up(d, W))), out(parts.take(heads * round_up(d, W))),
          scores(parts.take(heads * round_up(window, W))), total(parts.take(heads)), memory(d, reach, parts) {}
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

// The products, to be added up, of a query with the key that lies `distance` tokens before it.
template <class T>
MM_INLINE vf step_window_products(const StepAttention<T>& in, const float* q, const T* k, int64_t distance) {
    const int64_t half = in.d / 2;
    const float *cosine = in.cosine + distance * half, *sine = in.sine + distance * half;
    vf dot = {};
    for (int64_t i = 0; i < half; i += W) {
        const int64_t left = half - i;
        const vf c = load(cosine + i, left), s = load(sine + i, left);
        const vf first = load(q + i, left), second = load(q + half + i, left);
        dot += (first * c - second * s) * load(k + i, left);
        dot += (first * s + second * c) * load(k + half + i, left);
    }
    return dot;
}

// out (d) += sum over n rows of weight[r] times row r, one chain of additions a column.
template <class T>
MM_INLINE void step_add_rows(int64_t n, int64_t d, const float* weight, const T* rows, int64_t stride, float* out) {
    constexpr int VECS = 4;
    for (int64_t i = 0; i < d; i += VECS * W) {
        const bool whole = i + VECS * W <= d;
        vf sums[VECS];
        for (int v = 0; v < VECS; ++v) sums[v] = i + v * W < d ? load(out + i + v * W) : vf{};
        for (int64_t r = 0; r < n; ++r) {
            const T* row = rows + r * stride + i;
            prefetch_row(row + W * stride, min64(d - i, VECS * W));
            for (int v = 0; v < VECS; ++v) {
                if (whole)
                    sums[v] += load(row + v * W) * weight[r];
                else if (i + v * W < d)
                    sums[v] += load(row + v * W, d - i - v * W) * weight[r];
            }
        }
        for (int v = 0; v < VECS && i + v * W < d; ++v) store(out + i + v * W, sums[v]);
    }
}

// The new token's keys and value go to the ring, its query, normed, to w.q.
template <class T>
static void step_append(const StepAttention<T>& in, int64_t b, int64_t head, StepAttentionScratch& w) {
    const int64_t d = in.d, row = in.width(), at = in.window * row + b * in.ring_stride + head * d;
    const float* q = in.qkv + b * in.qkv_row + head * d;
    store_row(d, q + row, in.own + at, inverse_rms(d, q + row));
    store_row(d, q + 2 * row, in.v + at);
    step_key(in.memory, in.position[b], head, in.own + at, row, in.k + at, w.memory);
    float* to = w.q + head * round_up(d, W);
    load_row(d, q, to);
    const vf scale = splat(inverse_rms(d, q));
    for (int64_t i = 0; i < d; i += W) store(to + i, load(to + i) * scale);
}

// Heads first <= head < end of sequence b; out (heads, d) is its row. The window is read in runs of W tokens, all heads
// of each, so that it comes from memory in order.
template <class T, class X>
static void step_attend(const StepAttention<T>& in, int64_t b, int64_t first, int64_t end, X* out,
                        StepAttentionScratch& w) {
    const int64_t d = in.d, row = in.width(), window = in.window, position = in.position[b], pitch = round_up(d, W);
    const int64_t oldest = max64(1, window - position), keys = window + 1 - oldest, score_row = round_up(window, W);
    const T *k = in.k + b * in.ring_stride + oldest * row, *v = in.v + b * in.ring_stride + oldest * row;
    for (int64_t head = first; head < end; ++head) step_append(in, b, head, w);
    for (int64_t r = 0; r < keys; r += W)
        for (int64_t head = first; head < end; ++head) {
            vf products[W] = {};
            for (int64_t i = 0; i < min64(W, keys - r); ++i) {
                const T* key = k + (r + i) * row + head * d;
                prefetch_row(key + W * row, d);
                products[i] = step_window_products(in, w.q + head * pitch, key, keys - 1 - r - i);
            }
            store(w.scores + head * score_row + r, step_sums(products));
        }
    for (int64_t head = first; head < end; ++head) {
        w.total[head] = exponentials(keys, w.scores + head * score_row);
        memset(w.out + head * pitch, 0, pitch * sizeof(float));
    }
    for (int64_t r = 0; r < keys; r += W)
        for (int64_t head = first; head < end; ++head)
            step_add_rows(min64(W, keys - r), d, w.scores + head * score_row + r, v + r * row + head * d, row,
                          w.out + head * pitch);
    const T *newest = in.k + b * in.ring_stride + window * row, *value = in.v + b * in.ring_stride + window * row;
    for (int64_t head = first; head < end; ++head) {
        float* sum = w.out + head * pitch;
        store_row(d, sum, sum, 1.0f / w.total[head]);
        step_remember(in.memory, b, position, head, w.q + head * pitch, newest + head * d, value + head * d, sum,
                      w.memory);
        store_row(d, sum, out + head * d);
    }
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
