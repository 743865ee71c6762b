// Multi-memory attention for one token: one head of one sequence appends its key and value to the ring, writes the
// slots if it is time, and reads the window and the slots under one softmax.
#pragma once

#include "memory_update.h"
#include "norm.h"

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
    int64_t scores() const { return round_up(window + slots, W); }
    MemoryShape shape(int64_t b) const { return {1, 1, window, heads, d, slots, position + b}; }
};

// Buffers of one thread.
struct StepAttentionScratch {
    float *q, *out, *scores, *rate;
    UpdateScratch update;
    StepAttentionScratch(const MemoryShape& s, Parts& parts)
        : q(parts.take(s.pitch())), out(parts.take(s.pitch())), scores(parts.take(s.window + s.slots + W)),
          rate(parts.take(s.heads)), update(s, false, parts) {}
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

// The score of a query with the key that lies `distance` tokens before it.
template <class T>
MM_INLINE float step_window_score(const StepAttention<T>& in, const float* q, const T* k, int64_t distance) {
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
    return sum(dot);
}

// The score of a slot: its key is normed, and the log of its mass is added.
MM_INLINE float step_slot_score(int64_t d, const float* q, const float* key, float mass) {
    if (!(mass > 0)) return -__builtin_inff();
    vf dot = {}, squares = {};
    for (int64_t i = 0; i < d; i += W) {
        const vf x = load(key + i, d - i);
        dot += x * load(q + i);
        squares += x * x;
    }
    return sum(dot) / __builtin_sqrtf(sum(squares) / float(d) + NORM_EPS) + logf(mass);
}

// out += sum over n rows of weight[r] / mass[r] times row r, by columns of vectors; mass may be null.
template <class T>
MM_INLINE void step_weighted_rows(int64_t n, int64_t d, const float* weight, const float* mass, const T* rows,
                                  int64_t stride, float* out) {
    constexpr int VECS = 4;
    for (int64_t i = 0; i < d; i += VECS * W) {
        const bool whole = i + VECS * W <= d;
        vf sums[VECS] = {};
        for (int64_t r = 0; r < n; ++r) {
            if (weight[r] == 0) continue;  // masked; its mass may be 0
            const float share = mass ? weight[r] / mass[r] : weight[r];
            const T* row = rows + r * stride + i;
            for (int v = 0; v < VECS; ++v) {
                if (whole)
                    sums[v] += load(row + v * W) * share;
                else if (i + v * W < d)
                    sums[v] += load(row + v * W, d - i - v * W) * share;
            }
        }
        for (int v = 0; v < VECS && i + v * W < d; ++v) store(out + i + v * W, load(out + i + v * W) + sums[v]);
    }
}

// The result of one head of sequence b goes to out (d).
template <class T, class X>
static void step_attend(const StepAttention<T>& in, int64_t b, int64_t head, X* out, StepAttentionScratch& w) {
    const int64_t d = in.d, row = in.width(), window = in.window, position = in.position[b];
    const float* q = in.qkv + b * 3 * row + head * d;
    T *k = in.k + b * in.ring_stride + head * d, *v = in.v + b * in.ring_stride + head * d;
    store_row(d, q + row, k + window * row, inverse_rms(d, q + row));
    store_row(d, q + 2 * row, v + window * row);
    load_row(d, q, w.q);
    const vf scale = splat(inverse_rms(d, q) / __builtin_sqrtf(float(d)));
    for (int64_t i = 0; i < d; i += W) store(w.q + i, load(w.q + i) * scale);
    step_write_slots(in, b, head, w);

    const int64_t first = max64(1, window - position), keys = window + 1 - first;
    for (int64_t r = 0; r < keys; ++r) {
        if (first + r + 8 <= window) prefetch_row(k + (first + r + 8) * row, d);
        w.scores[r] = step_window_score(in, w.q, k + (first + r) * row, window - first - r);
    }
    const int64_t slots = position >= window ? in.slots : 0, at = (b * in.heads + head) * in.slots;
    const float* mass = in.memory.mass + at;
    for (int64_t slot = 0; slot < slots; ++slot)
        w.scores[keys + slot] = step_slot_score(d, w.q, in.memory.key + (at + slot) * d, mass[slot]);
    const float total = exponentials(keys + slots, w.scores);
    memset(w.out, 0, round_up(d, W) * sizeof(float));
    step_weighted_rows(keys, d, w.scores, nullptr, v + first * row, row, w.out);
    step_weighted_rows(slots, d, w.scores + keys, mass, in.memory.value + at * d, d, w.out);
    store_row(d, w.out, out, 1.0f / total);
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
