// Decay, scaling and gate of the recurrence in one pass over (rows, columns), rows = B * T.
//   p = sigmoid(decay + decay_bias);  gamma = clamp(p, 1e-6, 0.9999);  c = sqrt(1 - gamma^2)
//   x = c * candidate * sigmoid(gate + gate_bias)        the last factor only with a gate
// 1 - p is computed as such, not by a difference: for gamma near 1 most digits of the difference would be lost.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr float GAMMA_MIN = 1e-6f, GAMMA_MAX = 0.9999f, ONE_MINUS_GAMMA_MAX = 1e-4f;
constexpr int64_t MDI_MIN_WORK = 1 << 13;
constexpr int64_t MDI_CHUNKS = 64;  // most chunks of rows that bias gradients are summed in

struct Decay {
    vf p, q;  // sigmoid(logit) and 1 - sigmoid(logit), each to full precision
    vf gamma;
    vf c, inverse_c;
};

MM_INLINE Decay decay_of(vf logit) {
    Decay d;
    const vf e = exp(-at_least(logit, -80.0f));  // below, p is far under the clamp and e near overflow
    d.p = reciprocal(1.0f + e);
    d.q = e * d.p;
    d.gamma = at_most(at_least(d.p, GAMMA_MIN), GAMMA_MAX);
    const vf c_squared = at_least(d.q, ONE_MINUS_GAMMA_MAX) * (1.0f + d.gamma);
    d.inverse_c = reciprocal_sqrt(c_squared);
    d.c = c_squared * d.inverse_c;
    return d;
}

// gate and gate_bias are both null or both given. gamma and x are contiguous.
template <class T>
static void mdi_forward(int64_t rows, int64_t columns, const T* decay, int64_t decay_row, const float* decay_bias,
                        const T* candidate, int64_t candidate_row, const T* gate, int64_t gate_row,
                        const float* gate_bias, float* gamma, float* x, int threads) {
    if (rows * columns < MDI_MIN_WORK) threads = 1;
    parallel_for(rows, threads, [=](int64_t row) {
        for_vectors(columns, [&](int64_t i, auto left) {
            const Decay d = decay_of(load(decay + row * decay_row + i, left) + load(decay_bias + i, left));
            vf y = d.c * load(candidate + row * candidate_row + i, left);
            if (gate) y *= sigmoid(load(gate + row * gate_row + i, left) + load(gate_bias + i, left));
            store(gamma + row * columns + i, d.gamma, left);
            store(x + row * columns + i, y, left);
        });
    });
}

MM_INLINE int64_t mdi_chunk_rows(int64_t rows) { return max64(16, (rows + MDI_CHUNKS - 1) / MDI_CHUNKS); }

// Floats of scratch that mdi_backward needs: one partial sum of both bias gradients per chunk of rows.
static int64_t mdi_backward_scratch(int64_t rows, int64_t columns) {
    const int64_t chunk = mdi_chunk_rows(rows);
    return (rows + chunk - 1) / chunk * 2 * columns;
}

// dgamma, dx may be null (zero). ddecay, dcandidate, dgate have row stride `out_row`.
template <class T>
static void mdi_backward(int64_t rows, int64_t columns, const float* dgamma, int64_t dgamma_row, const float* dx,
                         int64_t dx_row, const T* decay, int64_t decay_row, const float* decay_bias, const T* candidate,
                         int64_t candidate_row, const T* gate, int64_t gate_row, const float* gate_bias, T* ddecay,
                         float* ddecay_bias, T* dcandidate, T* dgate, float* dgate_bias, float* scratch, int threads) {
    const int64_t chunk = mdi_chunk_rows(rows), chunks = (rows + chunk - 1) / chunk;
    if (rows * columns < MDI_MIN_WORK) threads = 1;
    parallel_for(chunks, threads, [=](int64_t k) {
        float* decay_sum = scratch + k * 2 * columns;
        float* gate_sum = decay_sum + columns;
        memset(decay_sum, 0, 2 * columns * sizeof(float));
        for (int64_t row = k * chunk; row < min64(rows, (k + 1) * chunk); ++row) {
            for_vectors(columns, [&](int64_t i, auto left) {
                const Decay d = decay_of(load(decay + row * decay_row + i, left) + load(decay_bias + i, left));
                const vf z = load(candidate + row * candidate_row + i, left);
                const vf g = dx ? load(dx + row * dx_row + i, left) : vf{};
                vf open = splat(1.0f);
                if (gate) {
                    open = sigmoid(load(gate + row * gate_row + i, left) + load(gate_bias + i, left));
                    const vf dlogit = g * d.c * z * open * (1.0f - open);
                    store(dgate + row * columns + i, dlogit, left);
                    store(gate_sum + i, load(gate_sum + i, left) + dlogit, left);
                }
                store(dcandidate + row * columns + i, g * d.c * open, left);
                vf dp = -(g * z * open) * (d.gamma * d.inverse_c);
                if (dgamma) dp += load(dgamma + row * dgamma_row + i, left);
                const vf dlogit = ((d.p >= GAMMA_MIN) & (d.p <= GAMMA_MAX)) ? dp * d.p * d.q : vf{};
                store(ddecay + row * columns + i, dlogit, left);
                store(decay_sum + i, load(decay_sum + i, left) + dlogit, left);
            });
        }
    });
    for (int64_t k = 1; k < chunks; ++k)
        for (int64_t i = 0; i < 2 * columns; ++i) scratch[i] += scratch[k * 2 * columns + i];
    memcpy(ddecay_bias, scratch, columns * sizeof(float));
    if (gate) memcpy(dgate_bias, scratch + columns, columns * sizeof(float));
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
