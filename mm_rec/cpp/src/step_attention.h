// Multi-memory attention for one token: heads of one sequence append their keys and values to the ring, write the
// slots if it is time, and read the window and the slots under one softmax.
#pragma once

#include "memory_update.h"
#include "norm.h"
#include "step_product.h"

namespace mm_rec {
namespace MM_LEVEL {

// What the heads of one memory block share. The ring of a sequence is `window` rows of heads * d, oldest first, and
// room for the new one behind them.
template <class T>
struct StepAttention {
    int64_t heads, d, window, slots;
    const float *address, *rate_logit;   // (heads, slots, d), (heads)
    const float *cosine, *sine;          // (window, d / 2): of the distance to the key
    const float* qkv;                    // (batch, 3, heads, d)
    T *k, *v;                            // the first sequence's rings
    int64_t ring_stride;                 // elements from one sequence's ring to the next
    Memory<float> memory;                // (batch, heads, slots[, d]), updated in place
    const int64_t* position;             // (batch)
    int64_t width() const { return heads * d; }
    MemoryShape shape(int64_t b) const { return {1, 1, window, heads, d, slots, position + b}; }
};

// Buffers of one thread: a row for each head.
struct StepAttentionScratch {
    float *q, *out, *scores, *rate;
    UpdateScratch update;
    StepAttentionScratch(const MemoryShape& s, Parts& parts)
        : q(parts.take(s.heads * s.pitch())), out(parts.take(s.heads * s.pitch())),
          scores(parts.take(s.heads * score_row(s))), rate(parts.take(s.heads)), update(s, false, parts) {}
    // Scores of the window, then from a whole vector on those of the slots.
    static int64_t score_row(const MemoryShape& s) { return round_up(s.window, W) + s.slot_pitch(); }
};

template <class T>
static void step_write_slots(const StepAttention<T>& in, int64_t b, int64_t head, StepAttentionScratch& w) {
    const MemoryShape s = in.shape(b);
    if (!s.writes(0, 0)) return;
    const int64_t row = in.width(), first = (b * in.heads + head) * in.slots;
    w.rate[head] = sigmoid(splat(in.rate_logit[head]))[0];
    const UpdateInputs<T> update{s, {in.k + b * in.ring_stride, row}, {in.v + b * in.ring_stride, row}, in.address,
                                 w.rate};
    load_address(update, head, w.update);
    load_memory(s, first, {in.memory.key, in.memory.value, in.memory.mass}, w.update);
    update_write(update, 0, 0, head, w.update);
    store_version(s, w.update, first, in.memory);
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

// Scores of n slots: each key is normed; -inf for an empty slot.
static void step_slot_scores(int64_t n, int64_t d, const float* q, const float* key, const float* mass, float* scores) {
    for (int64_t slot = 0; slot < n; slot += W) {
        vf dots[W] = {}, squares[W] = {};
        for (int64_t r = 0; r < min64(W, n - slot); ++r) {
            const float* row = key + (slot + r) * d;
            prefetch_row(row + W * d, d);
            for (int64_t i = 0; i < d; i += W) {
                const vf x = load(row + i, d - i);
                dots[r] += x * load(q + i);
                squares[r] += x * x;
            }
        }
        const vf dot = step_sums(dots), norm = sqrt(step_sums(squares) / float(d) + NORM_EPS);
        const vf score = dot / norm;
        store(scores + slot, load(mass + slot, n - slot) > 0.0f ? score : splat(-__builtin_inff()));
    }
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
            if (weight[r] == 0) continue;  // empty; what it holds may be anything
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

// The new token's key and value go to the ring, its query, normed and scaled, to w.q.
template <class T>
static void step_append(const StepAttention<T>& in, int64_t b, int64_t head, StepAttentionScratch& w) {
    const int64_t d = in.d, row = in.width(), at = in.window * row + b * in.ring_stride + head * d;
    const float* q = in.qkv + b * 3 * row + head * d;
    store_row(d, q + row, in.k + at, inverse_rms(d, q + row));
    store_row(d, q + 2 * row, in.v + at);
    float* to = w.q + head * round_up(d, W);
    load_row(d, q, to);
    const vf scale = splat(inverse_rms(d, q) / __builtin_sqrtf(float(d)));
    for (int64_t i = 0; i < d; i += W) store(to + i, load(to + i) * scale);
}

// Scores to e^(score - top) in place, those of the window at `scores` and of slots at `slot_scores`; returns the
// softmax's denominator, in which a slot counts `mass` times: queries and keys are normed, so no score is large.
static float step_softmax(int64_t keys, float* scores, int64_t slots, float* slot_scores, const float* mass) {
    const float none = -__builtin_inff();
    vf top = splat(none);
    for (int64_t i = keys; i < round_up(keys, W); ++i) scores[i] = none;
    for (int64_t i = slots; i < round_up(slots, W); ++i) slot_scores[i] = none;
    for (int64_t i = 0; i < keys; i += W) top = max(load(scores + i), top);
    for (int64_t i = 0; i < slots; i += W) top = max(load(slot_scores + i), top);
    const float largest = max(top);
    vf total = {};
    for (int64_t i = 0; i < keys; i += W) {
        const vf e = exp(load(scores + i) - largest);
        total += e;
        store(scores + i, e);
    }
    for (int64_t i = 0; i < slots; i += W) {
        const vf e = exp(load(slot_scores + i) - largest);
        total += e * load(mass + i, slots - i);
        store(slot_scores + i, e);
    }
    return sum(total);
}

// Heads first <= head < end of sequence b; out (heads, d) is its row. The window is read in runs of W tokens, all heads
// of each, so that it comes from memory in order.
template <class T, class X>
static void step_attend(const StepAttention<T>& in, int64_t b, int64_t first, int64_t end, X* out,
                        StepAttentionScratch& w) {
    const int64_t d = in.d, row = in.width(), window = in.window, position = in.position[b], pitch = round_up(d, W);
    const int64_t oldest = max64(1, window - position), keys = window + 1 - oldest;
    const int64_t slots = position >= window ? in.slots : 0;
    const int64_t score_row = w.score_row(in.shape(b)), slot_scores = round_up(window, W);
    const T *k = in.k + b * in.ring_stride + oldest * row, *v = in.v + b * in.ring_stride + oldest * row;
    for (int64_t head = first; head < end; ++head) {
        step_append(in, b, head, w);
        step_write_slots(in, b, head, w);
    }
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
        const int64_t at = (b * in.heads + head) * in.slots;
        float* scores = w.scores + head * score_row;
        step_slot_scores(slots, d, w.q + head * pitch, in.memory.key + at * d, in.memory.mass + at, scores + slot_scores);
        const float total = step_softmax(keys, scores, slots, scores + slot_scores, in.memory.mass + at);
        memset(w.out + head * pitch, 0, pitch * sizeof(float));
        step_add_rows(slots, d, scores + slot_scores, in.memory.value + at * d, d, w.out + head * pitch);
        w.q[head * pitch] = total;  // the query is done with
    }
    for (int64_t r = 0; r < keys; r += W)
        for (int64_t head = first; head < end; ++head)
            step_add_rows(min64(W, keys - r), d, w.scores + head * score_row + r, v + r * row + head * d, row,
                          w.out + head * pitch);
    for (int64_t head = first; head < end; ++head)
        store_row(d, w.out + head * pitch, out + head * d, 1.0f / w.q[head * pitch]);
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
