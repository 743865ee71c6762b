// Attention for one token: heads of one sequence append their keys and values to the ring, keep a pair that leaves the
// window or don't, and read the window and the kept pairs in one softmax.
#pragma once

#include "step_memory.h"
#include "step_product.h"

namespace mm_rec {
namespace MM_LEVEL {

// What the heads of one memory block share.
template <class T>
struct StepAttention {
    const float *cosine, *sine;          // (window, d / 2): of the distance to the key
    const float* qkv;                    // (batch, 3, heads, d), rows qkv_row apart
    int64_t qkv_row;
    const int64_t* position;             // (batch)
    StepMemory<T> memory;
};

// Buffers of one thread: a row for each head.
struct StepAttentionScratch {
    int64_t score_row;
    float *q, *out, *scores, *total;
    StepMemoryScratch memory;
    StepAttentionScratch(int64_t heads, int64_t d, int64_t window, int64_t slots, int64_t reach, Parts& parts)
        : score_row(round_up(window, W) + round_up(slots, W)), q(parts.take(heads * round_up(d, W))),
          out(parts.take(heads * round_up(d, W))), scores(parts.take(heads * score_row + W)), total(parts.take(heads)),
          memory(d, reach, parts) {}
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
    const int64_t half = in.memory.d / 2;
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

// Those of a query with a kept key.
template <class T>
MM_INLINE vf step_kept_products(int64_t d, const float* q, const T* k) {
    vf dot = {};
    for (int64_t i = 0; i < d; i += W) dot += load(q + i) * load(k + i, d - i);
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
    const StepMemory<T>& m = in.memory;
    const int64_t d = m.d, row = m.width(), at = m.ring(b) + m.window * row + head * d;
    const float* q = in.qkv + b * in.qkv_row + head * d;
    store_row(d, q + row, m.own + at, inverse_rms(d, q + row));
    store_row(d, q + 2 * row, m.v + at);
    step_key(m, in.position[b], head, m.own + at, m.k + at, w.memory);
    float* to = w.q + head * round_up(d, W);
    load_row(d, q, to);
    const vf scale = splat(inverse_rms(d, q));
    for (int64_t i = 0; i < d; i += W) store(to + i, load(to + i) * scale);
}

// Scores of the `filled` pairs that a head keeps.
template <class T>
static void step_kept_scores(const StepMemory<T>& in, int64_t b, int64_t head, int64_t filled, const float* q,
                             float* scores) {
    const int64_t first = (b * in.heads + head) * in.slots;
    for (int64_t r = 0; r < filled; r += W) {
        vf products[W] = {};
        for (int64_t i = 0; i < min64(W, filled - r); ++i)
            products[i] = step_kept_products(in.d, q, in.kept_k + (first + r + i) * in.d);
        store(scores + r, step_sums(products) + load(in.kept_score + first + r, filled - r));
    }
}

// Heads first <= head < end of sequence b; out (heads, d) is its row. The window is read in runs of W tokens, all heads
// of each, so that it comes from memory in order.
template <class T, class X>
static void step_attend(const StepAttention<T>& in, int64_t b, int64_t first, int64_t end, X* out,
                        StepAttentionScratch& w) {
    const StepMemory<T>& m = in.memory;
    const int64_t d = m.d, row = m.width(), position = in.position[b], pitch = round_up(d, W);
    const int64_t oldest = max64(1, m.window - position), keys = m.window + 1 - oldest, at = m.ring(b) + oldest * row;
    const T *k = m.k + at, *v = m.v + at;
    for (int64_t head = first; head < end; ++head) {
        step_append(in, b, head, w);
        step_retain(m, b, position, head);
    }
    for (int64_t r = 0; r < keys; r += W)
        for (int64_t head = first; head < end; ++head) {
            vf products[W] = {};
            for (int64_t i = 0; i < min64(W, keys - r); ++i) {
                const T* key = k + (r + i) * row + head * d;
                prefetch_row(key + W * row, d);
                products[i] = step_window_products(in, w.q + head * pitch, key, keys - 1 - r - i);
            }
            store(w.scores + head * w.score_row + r, step_sums(products));
        }
    for (int64_t head = first; head < end; ++head) {
        float* scores = w.scores + head * w.score_row;
        const int64_t filled = step_filled(m, b, head);
        step_kept_scores(m, b, head, filled, w.q + head * pitch, scores + keys);
        w.total[head] = exponentials(keys + filled, scores);
        memset(w.out + head * pitch, 0, pitch * sizeof(float));
        step_add_rows(filled, d, scores + keys, m.kept_v + (b * m.heads + head) * m.slots * d, d, w.out + head * pitch);
    }
    for (int64_t r = 0; r < keys; r += W)
        for (int64_t head = first; head < end; ++head)
            step_add_rows(min64(W, keys - r), d, w.scores + head * w.score_row + r, v + r * row + head * d, row,
                          w.out + head * pitch);
    for (int64_t head = first; head < end; ++head)
        store_row(d, w.out + head * pitch, out + head * d, 1.0f / w.total[head]);
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
