// The memories of a block for one token: its key, and which pairs a head keeps of the tokens that leave the window.
#pragma once

#include "norm.h"
#include "retain.h"

extern "C" {
float expf(float);
float log1pf(float);
}

namespace mm_rec {
namespace MM_LEVEL {

// What the heads of one memory block share. The rings of a sequence are `window` rows of heads * d (of heads, of scores),
// oldest first, and room for the new one behind them.
template <class T>
struct StepMemory {
    int64_t heads, d, window, reach, slots;  // reach: tokens that a key is made of
    const float *taps, *score_bias;          // (heads, d, reach), (heads)
    const float* score;                      // (batch, heads), rows score_row apart, without their bias
    int64_t score_row;
    T *k, *v, *own;                          // the first sequence's rings: keys, values, and what keys are made of
    float* scores;                           // and of scores
    int64_t capacity;                        // rows from one sequence's ring to the next
    T *kept_k, *kept_v;                      // (batch, heads, slots, d)
    float* kept_score;                       // (batch, heads, slots), -inf for an empty slot; filled from the first on
    int64_t width() const { return heads * d; }
    int64_t ring(int64_t b) const { return b * capacity * width(); }
};

// Buffers of one thread.
struct StepMemoryScratch {
    float *taps, *key;  // (reach, pitch), (pitch)
    StepMemoryScratch(int64_t d, int64_t reach, Parts& parts)
        : taps(parts.take(reach * round_up(d, W))), key(parts.take(round_up(d, W))) {}
};

// The key of a token, from its own at `newest` and those of the tokens before it.
template <class T>
static void step_key(const StepMemory<T>& in, int64_t position, int64_t head, const T* newest, T* key,
                     StepMemoryScratch& w) {
    const int64_t d = in.d, pitch = round_up(d, W), reach = min64(in.reach, position + 1), row = in.width();
    const float* taps = in.taps + head * d * in.reach;
    for (int64_t j = 0; j < reach; ++j)
        for (int64_t i = 0; i < d; ++i) w.taps[j * pitch + i] = taps[i * in.reach + j];
    vf squares = {};
    for (int64_t i = 0; i < d; i += W) {
        vf x = {};
        for (int64_t j = 0; j < reach; ++j) x += load(w.taps + j * pitch + i, d - i) * load(newest - j * row + i, d - i);
        squares += x * x;
        store(w.key + i, x);
    }
    store_row(d, w.key, key, 1.0f / __builtin_sqrtf(sum(squares) + NORM_EPS));
}

MM_INLINE float log_sigmoid(float x) { return x < 0 ? x - log1pf(expf(x)) : -log1pf(expf(-x)); }

// The score of the new token goes to the ring; the oldest one, which leaves the window, is kept if its score is high enough.
template <class T>
static void step_retain(const StepMemory<T>& in, int64_t b, int64_t position, int64_t head) {
    const int64_t at = b * in.heads + head;
    float *scores = in.scores + b * in.capacity * in.heads + head, *kept = in.kept_score + at * in.slots;
    scores[in.window * in.heads] = log_sigmoid(in.score[b * in.score_row + head] + in.score_bias[head]);
    if (position == 0)
        for (int64_t j = 0; j < in.slots; ++j) kept[j] = -__builtin_inff();
    const int64_t slot = lowest(in.slots, kept);
    if (position < in.window || !(scores[0] > kept[slot])) return;
    const int64_t to = (at * in.slots + slot) * in.d, from = in.ring(b) + head * in.d;
    kept[slot] = scores[0];
    store_row(in.d, in.k + from, in.kept_k + to);
    store_row(in.d, in.v + from, in.kept_v + to);
}

// The slots of a head that hold something.
template <class T>
MM_INLINE int64_t step_filled(const StepMemory<T>& in, int64_t b, int64_t head) {
    const float* kept = in.kept_score + (b * in.heads + head) * in.slots;
    int64_t filled = in.slots;
    while (filled > 0 && kept[filled - 1] == -__builtin_inff()) --filled;
    return filled;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
