// Which tokens a head keeps when they leave the window: those of the highest scores. One task is one head of one sequence.
#pragma once

#include "heads.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t RUN = 64;  // tokens from one place to the next at which it is said what the slots hold

// The place of the lowest of n scores, the first of equal ones.
MM_INLINE int64_t lowest(int64_t n, const float* scores) {
    int64_t at = 0;
    for (int64_t j = 1; j < n; ++j)
        if (scores[j] < scores[at]) at = j;
    return at;
}

// Inputs of retain: score (batch, window + time, heads), kept_score (batch, heads, slots), -inf for an empty slot.
struct RetainInputs {
    ContextShape shape;
    int64_t slots;
    const float *score, *kept_score;
};

// Results: slot (batch, heads, time), which slot the token takes that leaves the window then, or -1; held (batch, heads,
// runs + 1, slots), what is in each slot before each run of tokens and at the end: j < slots is what was in slot j at the
// beginning, slots + c is row c of the context, -1 is nothing.
struct Retained {
    int32_t *slot, *held;
};

// What the slots of the head hold as its tokens go by.
struct RetainScratch {
    float* kept;
    int32_t* held;
    RetainScratch(int64_t slots, Parts& parts)
        : kept(parts.take(slots)), held(reinterpret_cast<int32_t*>(parts.take(slots))) {}
};

static void retain_task(const RetainInputs& in, const Retained& to, int64_t b, int64_t head, RetainScratch& w) {
    const ContextShape& s = in.shape;
    const int64_t at = b * s.heads + head, bytes = in.slots * int64_t(sizeof(int32_t));
    int32_t *held = to.held + at * ((s.time + RUN - 1) / RUN + 1) * in.slots, *slot = to.slot + at * s.time;
    memcpy(w.kept, in.kept_score + at * in.slots, in.slots * sizeof(float));
    for (int64_t j = 0; j < in.slots; ++j) w.held[j] = w.kept[j] > -__builtin_inff() ? int32_t(j) : -1;
    int64_t last = lowest(in.slots, w.kept);
    for (int64_t t = 0; t < s.time; ++t) {
        if (t % RUN == 0) {
            memcpy(held, w.held, bytes);
            held += in.slots;
        }
        const int64_t position = s.at(b, t);
        if (position == 0) {
            for (int64_t j = 0; j < in.slots; ++j) {
                w.kept[j] = -__builtin_inff();
                w.held[j] = -1;
            }
            last = 0;
        }
        const float score = in.score[(b * s.context() + t) * s.heads + head];
        slot[t] = -1;
        if (position >= s.window && score > w.kept[last]) {
            slot[t] = int32_t(last);
            w.kept[last] = score;
            w.held[last] = int32_t(in.slots + t);
            last = lowest(in.slots, w.kept);
        }
    }
    memcpy(held, w.held, bytes);
}

static int retain(const RetainInputs& in, const Retained& to, int threads) {
    const ContextShape& s = in.shape;
    for (int64_t i = 0; i < s.batch * s.time; ++i)
        if (s.position[i] < 0) return KERNEL_BAD_POSITION;
    return for_each_head(s, s.batch * s.heads * s.time * 16, threads,
                         [&](Parts& parts) { return RetainScratch(in.slots, parts); },
                         [&](int64_t b, int64_t head, RetainScratch& w) { retain_task(in, to, b, head, w); });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
