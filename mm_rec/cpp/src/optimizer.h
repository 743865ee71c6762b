// AdamW in one pass over memory, and sums of squares.
#pragma once

#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t PIECE = 1 << 14;  // elements that one task takes at a time

struct AdamW {
    float beta1, beta2, eps, decay;  // decay = 1 - lr * weight_decay
    float rate;                      // lr / (1 - beta1^step)
    float inverse_bias2;             // 1 / (1 - beta2^step)
    float grad_scale;
};

// out may be null.
template <class T>
static void adamw(int64_t n, float* master, float* m, float* v, const T* grad, bf16* out, AdamW p, int threads) {
    const int64_t pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static) if (pieces > 1 && threads > 1)
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t end = min64(n, (piece + 1) * PIECE);
        for (int64_t i = piece * PIECE; i < end; i += W) {
            const int64_t left = end - i;
            const vf g = load(grad + i, left) * p.grad_scale;
            const vf m_new = p.beta1 * load(m + i, left) + (1.0f - p.beta1) * g;
            const vf v_new = p.beta2 * load(v + i, left) + (1.0f - p.beta2) * (g * g);
            const vf step = p.rate * m_new / (sqrt(v_new * p.inverse_bias2) + p.eps);
            const vf x = p.decay * load(master + i, left) - step;
            store(m + i, m_new, left);
            store(v + i, v_new, left);
            store(master + i, x, left);
            if (out) store(out + i, x, left);
        }
    }
}

template <class T>
MM_INLINE double piece_sum_of_squares(int64_t n, const T* x) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += 64 * W) {  // short enough for float32 sums
        vf squares = {};
        const int64_t end = min64(n, begin + 64 * W);
        for (int64_t i = begin; i < end; i += W) {
            const vf v = load(x + i, end - i);
            squares += v * v;
        }
        total += sum(squares);
    }
    return total;
}

// The pieces are added in order, a batch of them at a time, whatever the number of threads.
template <class T>
static double sum_of_squares(int64_t n, const T* x, int threads) {
    constexpr int64_t BATCH = 256;
    double total = 0;
    const int64_t pieces = (n + PIECE - 1) / PIECE;
    for (int64_t first = 0; first < pieces; first += BATCH) {
        double partial[BATCH];
        const int64_t count = min64(BATCH, pieces - first);
#pragma omp parallel for num_threads(threads) schedule(static) if (count > 1 && threads > 1)
        for (int64_t k = 0; k < count; ++k) {
            const int64_t begin = (first + k) * PIECE;
            partial[k] = piece_sum_of_squares(min64(PIECE, n - begin), x + begin);
        }
        for (int64_t k = 0; k < count; ++k) total += partial[k];
    }
    return total;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
