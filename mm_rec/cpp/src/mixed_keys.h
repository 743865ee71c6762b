// Keys of both memories: the own keys of a token and of those before it in its document, weighted and brought to
// length 1 (defined in mm_rec/ops/reference.py).
#pragma once

#include "heads.h"
#include "norm.h"

namespace mm_rec {
namespace MM_LEVEL {

template <class T>
struct KeyInputs {
    ContextShape shape;
    int64_t reach;         // tokens that a key is made of
    HeadRows<const T> k;   // (batch, context, heads, d)
    const float* taps;     // (heads, reach, d)

    int64_t work() const { return shape.batch * shape.time * shape.heads * shape.d * reach; }
    const float* tap(int64_t head, int64_t j) const { return taps + (head * reach + j) * shape.d; }
    // Tokens that the key of token t is made of.
    int64_t reach_of(int64_t b, int64_t t) const { return max64(0, min64(reach, shape.at(b, t) + 1)); }
};

// The weighted sum for token t, to `total`; returns the inverse of its length.
template <class T>
MM_INLINE float key_total(const KeyInputs<T>& in, int64_t b, int64_t t, int64_t head, float* total) {
    const ContextShape& s = in.shape;
    const int64_t reach = in.reach_of(b, t), row = s.window + t;
    const T* newest = in.k.at(b, row, s.context(), head, s.d);
    vf squares = {};
    for_vectors(s.d, [&](int64_t i, auto left) {
        vf x = {};
        for (int64_t j = 0; j < reach; ++j) x += load(in.tap(head, j) + i, left) * load(newest - j * in.k.row + i, left);
        store(total + i, x);
        squares += x * x;
    });
    return 1.0f / __builtin_sqrtf(sum(squares) + NORM_EPS);
}

// key (batch, time, heads, d), contiguous.
template <class T>
static int mixed_keys(const KeyInputs<T>& in, T* key, int threads) {
    const ContextShape& s = in.shape;
    const auto make = [&](Parts& parts) { return parts.take(s.pitch()); };
    return for_each_head(s, in.work(), threads, make, [&](int64_t b, int64_t head, float* total) {
        for (int64_t t = 0; t < s.time; ++t) {
            const float scale = key_total(in, b, t, head, total);
            store_row(s.d, total, key + ((b * s.time + t) * s.heads + head) * s.d, scale);
        }
    });
}

// Gradients: dk (batch, context, heads, d) and dtaps (batch, heads, reach, d), a share per sequence, both contiguous.
template <class T>
static int mixed_keys_backward(const KeyInputs<T>& in, HeadRows<const T> dkey, T* dk, float* dtaps, int threads) {
    const ContextShape& s = in.shape;
    const int64_t pitch = s.pitch(), width = s.heads * s.d;
    struct Buffers {
        float *total, *dtaps, *dk;  // (pitch), (reach, pitch); (reach, pitch): of context row c at c % reach
    };
    const auto make = [&](Parts& parts) {
        float *total = parts.take(pitch), *dtaps = parts.take(in.reach * pitch);
        return Buffers{total, dtaps, parts.take(in.reach * pitch)};
    };
    return for_each_head(s, in.work(), threads, make, [&](int64_t b, int64_t head, Buffers& w) {
        T* to = dk + b * s.context() * width + head * s.d;
        const auto finish = [&](int64_t row) {  // no later token sees it
            float* from = w.dk + row % in.reach * pitch;
            store_row(s.d, from, to + row * width);
            memset(from, 0, pitch * sizeof(float));
        };
        memset(w.dtaps, 0, in.reach * pitch * sizeof(float));
        memset(w.dk, 0, in.reach * pitch * sizeof(float));
        for (int64_t row = 0; row < s.window + 1 - in.reach; ++row) memset(to + row * width, 0, s.d * sizeof(T));
        for (int64_t t = 0; t < s.time; ++t) {
            const int64_t reach = in.reach_of(b, t), row = s.window + t;
            const float scale = key_total(in, b, t, head, w.total);
            const T* above = dkey.at(b, t, s.time, head, s.d);
            const T* newest = in.k.data + b * in.k.sequence + row * in.k.row + head * s.d;
            const float dot = sum_over(s.d, [&](int64_t i, auto left) {
                return load(w.total + i, left) * load(above + i, left);
            });
            const float pull = scale * scale * scale * dot;
            for_vectors(s.d, [&](int64_t i, auto left) {
                const vf dtotal = scale * load(above + i, left) - pull * load(w.total + i, left);
                for (int64_t j = 0; j < reach; ++j) {
                    float *dtap = w.dtaps + j * pitch + i, *drow = w.dk + (row - j) % in.reach * pitch + i;
                    store(dtap, load(dtap) + dtotal * load(newest - j * in.k.row + i, left));
                    store(drow, load(drow) + dtotal * load(in.tap(head, j) + i, left));
                }
            });
            finish(row + 1 - in.reach);
        }
        for (int64_t row = s.context() + 1 - in.reach; row < s.context(); ++row) finish(row);
        for (int64_t j = 0; j < in.reach; ++j)
            store_row(s.d, w.dtaps + j * pitch, dtaps + ((b * s.heads + head) * in.reach + j) * s.d);
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
