// Root-mean-square norms over rows, the gated readout, the sum of the two memories, and relu squared.
//
// A row is found by two counts: row r of `inner` per outer step at (r / inner) * outer_stride + (r % inner) *
// inner_stride, so that the heads of a slice of a wide product are rows without a copy.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr float NORM_EPS = 1e-6f;
constexpr int64_t NORM_MIN_WORK = 1 << 14;

template <class T>
struct Rows {
    T* data;
    int64_t inner, outer_stride, inner_stride;
    T* operator[](int64_t r) const { return data + r / inner * outer_stride + r % inner * inner_stride; }
};

template <class T>
MM_INLINE float inverse_rms(int64_t n, const T* x) {
    const float squares = sum_over(n, [&](int64_t i, auto left) {
        const vf v = load(x + i, left);
        return v * v;
    });
    return 1.0f / __builtin_sqrtf(squares / float(n) + NORM_EPS);
}

// Gradient of y = x * scale(x) at x: scale * dy - x * scale^3 * mean(dy * x).
template <class T, class U>
MM_INLINE float norm_pull(int64_t n, const T* x, const U* dy, float scale) {
    const float dot = sum_over(n, [&](int64_t i, auto left) { return load(x + i, left) * load(dy + i, left); });
    return scale * scale * scale * (dot / float(n));
}

// y is contiguous.
template <class T, class U>
static void rms_norm_forward(int64_t rows, int64_t n, Rows<const T> x, U* y, int threads) {
    if (rows * n < NORM_MIN_WORK) threads = 1;
    parallel_for(rows, threads, [=](int64_t r) {
        const T* from = x[r];
        const vf scale = splat(inverse_rms(n, from));
        for_vectors(n, [&](int64_t i, auto left) { store(y + r * n + i, load(from + i, left) * scale, left); });
    });
}

// dx is contiguous, in the type of x.
template <class T, class U>
static void rms_norm_backward(int64_t rows, int64_t n, Rows<const U> dy, Rows<const T> x, T* dx, int threads) {
    if (rows * n < NORM_MIN_WORK) threads = 1;
    parallel_for(rows, threads, [=](int64_t r) {
        const T* at = x[r];
        const U* above = dy[r];
        const float scale = inverse_rms(n, at), pull = norm_pull(n, at, above, scale);
        for_vectors(n, [&](int64_t i, auto left) {
            store(dx + r * n + i, scale * load(above + i, left) - pull * load(at + i, left), left);
        });
    });
}

// total = x + delta and normed = rms_norm(total); total and normed contiguous.
template <class T>
static void add_rms_norm_forward(int64_t rows, int64_t n, const float* x, int64_t x_row, const T* delta,
                                 int64_t delta_row, float* total, T* normed, int threads) {
    if (rows * n < NORM_MIN_WORK) threads = 1;
    parallel_for(rows, threads, [=](int64_t r) {
        float* to = total + r * n;
        const float squares = sum_over(n, [&](int64_t i, auto left) {
            const vf v = load(x + r * x_row + i, left) + load(delta + r * delta_row + i, left);
            store(to + i, v, left);
            return v * v;
        });
        const float scale = 1.0f / __builtin_sqrtf(squares / float(n) + NORM_EPS);
        for_vectors(n, [&](int64_t i, auto left) { store(normed + r * n + i, load(to + i, left) * scale, left); });
    });
}

// dx = dtotal + norm's gradient, also rounded into ddelta; dtotal may be null.
template <class T>
static void add_rms_norm_backward(int64_t rows, int64_t n, const float* dtotal, int64_t dtotal_row, const T* dn,
                                  int64_t dn_row, const float* total, float* dx, T* ddelta, int threads) {
    if (rows * n < NORM_MIN_WORK) threads = 1;
    parallel_for(rows, threads, [=](int64_t r) {
        const float* x = total + r * n;
        const T* dy = dn + r * dn_row;
        const float scale = inverse_rms(n, x), pull = norm_pull(n, x, dy, scale);
        for_vectors(n, [&](int64_t i, auto left) {
            vf g = scale * load(dy + i, left) - pull * load(x + i, left);
            if (dtotal) g += load(dtotal + r * dtotal_row + i, left);
            store(dx + r * n + i, g, left);
            store(ddelta + r * n + i, g, left);
        });
    });
}

// y = rms_norm(h) * silu(r) per head of n columns; y contiguous (rows, heads * n).
template <class T>
static void readout_forward(int64_t rows, int64_t heads, int64_t n, const float* h, int64_t h_row, const T* gate,
                            int64_t gate_row, T* y, int threads) {
    if (rows * heads * n < NORM_MIN_WORK) threads = 1;
    parallel_for(rows, threads, [=](int64_t row) {
        for (int64_t k = 0; k < heads; ++k) {
            const float* state = h + row * h_row + k * n;
            const T* logit = gate + row * gate_row + k * n;
            const float scale = inverse_rms(n, state);
            for_vectors(n, [&](int64_t i, auto left) {
                const vf r = load(logit + i, left);
                store(y + (row * heads + k) * n + i, load(state + i, left) * scale * (r * sigmoid(r)), left);
            });
        }
    });
}

// dh and dr contiguous.
template <class T>
static void readout_backward(int64_t rows, int64_t heads, int64_t n, const T* dy, int64_t dy_row, const float* h,
                             int64_t h_row, const T* gate, int64_t gate_row, float* dh, T* dr, int threads) {
    if (rows * heads * n < NORM_MIN_WORK) threads = 1;
    parallel_for(rows, threads, [=](int64_t row) {
        for (int64_t k = 0; k < heads; ++k) {
            const float* state = h + row * h_row + k * n;
            const T* logit = gate + row * gate_row + k * n;
            const T* from = dy + row * dy_row + k * n;
            float* dstate = dh + (row * heads + k) * n;  // holds the gradient at the normed state first
            const float scale = inverse_rms(n, state);
            for_vectors(n, [&](int64_t i, auto left) {
                const vf r = load(logit + i, left), s = sigmoid(r), g = load(from + i, left);
                const vf normed = load(state + i, left) * scale;
                store(dr + (row * heads + k) * n + i, g * normed * (s + r * s * (1.0f - s)), left);
                store(dstate + i, g * r * s, left);
            });
            const float pull = norm_pull(n, state, dstate, scale);
            for_vectors(n, [&](int64_t i, auto left) {
                store(dstate + i, scale * load(dstate + i, left) - pull * load(state + i, left), left);
            });
        }
    });
}

template <class T>
static void relu_squared_forward(int64_t n, const T* x, T* y, int threads) {
    const int64_t vectors = (n + W - 1) / W;
    if (n < NORM_MIN_WORK) threads = 1;
    parallel_for(vectors, threads, [=](int64_t v) {
        const vf r = at_least(load(x + v * W, n - v * W), 0.0f);
        store(y + v * W, r * r, n - v * W);
    });
}

template <class T>
static void relu_squared_backward(int64_t n, const T* dy, const T* x, T* dx, int threads) {
    const int64_t vectors = (n + W - 1) / W;
    if (n < NORM_MIN_WORK) threads = 1;
    parallel_for(vectors, threads, [=](int64_t v) {
        const vf r = at_least(load(x + v * W, n - v * W), 0.0f);
        store(dx + v * W, 2.0f * r * load(dy + v * W, n - v * W), n - v * W);
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
