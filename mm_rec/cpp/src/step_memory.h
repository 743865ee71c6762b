// The long-term memory for one token: a head writes its matrix by the gated delta rule and reads it.
#pragma once

#include "heads.h"
#include "norm.h"

namespace mm_rec {
namespace MM_LEVEL {

// What the heads of one memory block share.
struct StepMemory {
    int64_t heads, d, reach;     // reach: tokens that a key is made of
    const float* taps;           // (heads, d, reach)
    const float* gates;          // (batch, 3, heads), rows gate_row apart: how much is written, kept and read
    int64_t gate_row;
    const float* gate_bias;      // (3, heads)
    const float* matrix;         // (batch, heads, d, d)
    float* matrix_after;         // may be matrix
    float gate(int64_t b, int64_t head, int64_t which) const {
        const int64_t at = which * heads + head;
        return sigmoid(splat(gates[b * gate_row + at] + gate_bias[at]))[0];
    }
};

// Buffers of one thread.
struct StepMemoryScratch {
    float *taps, *key, *written, *out;  // (reach, pitch), (pitch)
    StepMemoryScratch(int64_t d, int64_t reach, Parts& parts)
        : taps(parts.take(reach * round_up(d, W))), key(parts.take(round_up(d, W))),
          written(parts.take(round_up(d, W))), out(parts.take(round_up(d, W))) {}
};

// The key of a token, from its own at `newest` and those of the tokens before it, `row` apart.
template <class T>
static void step_key(const StepMemory& in, int64_t position, int64_t head, const T* newest, int64_t row, T* key,
                     StepMemoryScratch& w) {
    const int64_t d = in.d, pitch = round_up(d, W), reach = min64(in.reach, position + 1);
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

// What a matrix (d, d) holds under w.key and what q finds in it once it has been written to: both are had in one pass,
//   written = beta (v - decay S^T key);  out = decay S^T q + (key . q) written.
template <class T>
static void step_read_matrix(int64_t d, const float* matrix, float decay, float beta, const float* q, const T* v,
                             StepMemoryScratch& w) {
    constexpr int VECS = 4;
    const vf dot = splat(sum_over(d, [&](int64_t i, auto left) { return load(w.key + i, left) * load(q + i, left); }));
    for (int64_t j = 0; j < d; j += VECS * W) {
        vf held[VECS] = {}, found[VECS] = {};
        for (int64_t i = 0; i < d; ++i)
            for (int64_t vec = 0; vec < VECS && j + vec * W < d; ++vec) {
                const vf x = load(matrix + i * d + j + vec * W, d - j - vec * W);
                held[vec] += x * w.key[i];
                found[vec] += x * q[i];
            }
        for (int64_t vec = 0; vec < VECS && j + vec * W < d; ++vec) {
            const int64_t at = j + vec * W;
            const vf written = beta * (load(v + at, d - at) - decay * held[vec]);
            store(w.written + at, written);
            store(w.out + at, decay * found[vec] + dot * written);
        }
    }
}

// out (d) += what a head reads, normed and gated, after it has written the token. q is the query.
template <class T>
static void step_remember(const StepMemory& in, int64_t b, int64_t position, int64_t head, const float* q, const T* k,
                          const T* v, float* out, StepMemoryScratch& w) {
    const int64_t d = in.d, at = (b * in.heads + head) * d * d;
    const float* matrix = in.matrix + at;
    float* after = in.matrix_after + at;
    load_row(d, k, w.key);
    const float decay = position == 0 ? 0.0f : in.gate(b, head, 1);
    step_read_matrix(d, matrix, decay, in.gate(b, head, 0), q, v, w);
    for (int64_t i = 0; i < d; ++i) {
        const vf key = splat(w.key[i]);
        for_vectors(d, [&](int64_t j, auto left) {
            store(after + i * d + j, load(matrix + i * d + j, left) * decay + key * load(w.written + j, left), left);
        });
    }
    const vf scale = splat(inverse_rms(d, w.out) * 2.0f * in.gate(b, head, 2));
    for (int64_t i = 0; i < d; i += W) store(out + i, load(out + i) + load(w.out + i) * scale);
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
