// What a block that is linear in its state does between its matrix products, in one pass over time: decay and gate
// (mdi.h), the scan, and the gated readout of the state (norm.h).
//   gamma, x = mdi(decay, z, gate u);  h_t = gamma_t * h_{t-1} + x_t;  y = rms_norm(h) * silu(r) per head
// Of all this only h and y are written; the backward pass computes the rest again. A task is one sequence and some of
// its heads, so results don't depend on the number of threads.
#pragma once

#include "mdi.h"
#include "norm.h"
#include "scratch.h"

namespace mm_rec {
namespace MM_LEVEL {

// Shape and inputs of a call. z, u and r are slices of one product, so they share a row stride.
template <class T>
struct GatedScanInputs {
    int64_t batch, time, heads, d;
    const T *z, *u, *r;
    int64_t row;
    const T* decay;
    int64_t decay_row;
    const float *decay_bias, *gate_bias;  // (heads * d)
    const float* h0;                      // (batch, heads * d) or null
    const uint8_t* reset;                 // (batch, time) or null
    int64_t width() const { return heads * d; }
    bool starts(int64_t row_of_time) const { return reset && reset[row_of_time]; }
};

// The heads that one task owns.
struct GatedScanHeads {
    int64_t parts, count;
    template <class T>
    GatedScanHeads(const GatedScanInputs<T>& in, int threads) {
        if (in.batch * in.time * in.width() < NORM_MIN_WORK) threads = 1;
        parts = min64((threads + in.batch - 1) / in.batch, in.heads);
        count = (in.heads + parts - 1) / parts;
    }
};

constexpr int64_t HEADS_AT_ONCE = 8;  // of a row, so that their sums don't wait for each other

struct Integration {
    Decay decay;
    vf z, open;  // candidate, and how far its gate is open
};

template <class T, class Left>
MM_INLINE Integration integration_of(const GatedScanInputs<T>& in, int64_t row, int64_t column, Left left) {
    const vf logit = load(in.decay + row * in.decay_row + column, left) + load(in.decay_bias + column, left);
    const vf gate = load(in.u + row * in.row + column, left) + load(in.gate_bias + column, left);
    return {decay_of(logit), load(in.z + row * in.row + column, left), sigmoid(gate)};
}

// Up to HEADS_AT_ONCE heads of one row, from the state before it (null for none) to the state and the readout.
template <class T>
MM_INLINE void gated_scan_row(const GatedScanInputs<T>& in, int64_t row, int64_t first, int64_t last, const float* before,
                              float* h, T* y) {
    float scale[HEADS_AT_ONCE];
    const int64_t d = in.d;
    for (int64_t head = first; head < last; ++head) {
        const float squares = sum_over(d, [&](int64_t i, auto left) {
            const int64_t column = head * d + i;
            const Integration now = integration_of(in, row, column, left);
            vf state = now.decay.c * now.z * now.open;
            if (before) state += now.decay.gamma * load(before + column, left);
            store(h + column, state, left);
            return state * state;
        });
        scale[head - first] = 1.0f / __builtin_sqrtf(squares / float(d) + NORM_EPS);
    }
    for (int64_t head = first; head < last; ++head)
        for_vectors(d, [&](int64_t i, auto left) {
            const int64_t column = head * d + i;
            const vf r = load(in.r + row * in.row + column, left);
            store(y + column, load(h + column, left) * scale[head - first] * (r * sigmoid(r)), left);
        });
}

// h and y (batch, time, width) contiguous.
template <class T>
static void gated_scan_forward(const GatedScanInputs<T>& in, float* h, T* y, int threads) {
    const GatedScanHeads split(in, threads);
    const int64_t width = in.width(), tasks = in.batch * split.parts;
    parallel_for(tasks, threads, [=](int64_t task) {
        const int64_t b = task / split.parts, first = task % split.parts * split.count;
        const int64_t last = min64(in.heads, first + split.count);
        const float* before = in.h0 ? in.h0 + b * width : nullptr;
        for (int64_t row = b * in.time; row < (b + 1) * in.time; ++row) {
            if (in.starts(row)) before = nullptr;
            for (int64_t head = first; head < last; head += HEADS_AT_ONCE)
                gated_scan_row(in, row, head, min64(last, head + HEADS_AT_ONCE), before, h + row * width, y + row * width);
            before = h + row * width;
        }
    });
}

// What the backward pass writes: dz, du and dr with one row stride, ddecay contiguous; a share of the bias gradients
// per sequence, (batch, width) each; dh0 (batch, width).
template <class T>
struct GatedScanGradients {
    T *dz, *du, *dr;
    int64_t row;
    T* ddecay;
    float *ddecay_bias, *dgate_bias, *dh0;
};

// Gradients from above: dy with row stride dy_row; dh_last (batch, width) or null.
template <class T>
struct GatedScanFromAbove {
    const T* dy;
    int64_t dy_row;
    const float* dh_last;
};

// Up to HEADS_AT_ONCE heads of one row of sequence b: `carry` (width) holds the gradient at the row's state that comes
// from the rows after it, and then the one at the state before. pulled, gated: HEADS_AT_ONCE times `pitch` floats.
template <class T>
MM_INLINE void gated_scan_row_backward(const GatedScanInputs<T>& in, const GatedScanFromAbove<T>& above,
                                       const GatedScanGradients<T>& out, int64_t b, int64_t row, int64_t first,
                                       int64_t last, const float* before, const float* h, float* carry, float* pulled,
                                       float* gated, int64_t pitch) {
    float scale[HEADS_AT_ONCE], pull[HEADS_AT_ONCE];
    const int64_t d = in.d;
    for (int64_t head = first, at = 0; head < last; ++head, at += pitch) {
        const float squares = sum_over(d, [&](int64_t i, auto left) {
            const vf state = load(h + head * d + i, left);
            return state * state;
        });
        const float dot = sum_over(d, [&](int64_t i, auto left) {
            const int64_t column = head * d + i;
            const vf r = load(in.r + row * in.row + column, left), s = sigmoid(r), state = load(h + column, left);
            const vf g = load(above.dy + row * above.dy_row + column, left), normed = g * (r * s);
            store(pulled + at + i, normed);
            store(gated + at + i, g * state * (s + r * s * (1.0f - s)));
            return state * normed;
        });
        const float inverse = 1.0f / __builtin_sqrtf(squares / float(d) + NORM_EPS);
        scale[head - first] = inverse;
        pull[head - first] = inverse * inverse * inverse * (dot / float(d));
    }
    float* decay_sum = out.ddecay_bias + b * in.width();
    float* gate_sum = out.dgate_bias + b * in.width();
    for (int64_t head = first, at = 0; head < last; ++head, at += pitch)
        for_vectors(d, [&](int64_t i, auto left) {
            const int64_t column = head * d + i, to = row * out.row + column;
            const float normed = scale[head - first];
            store(out.dr + to, load(gated + at + i) * normed, left);
            const vf dh = load(pulled + at + i) * normed - pull[head - first] * load(h + column, left) +
                          load(carry + column, left);
            const Integration now = integration_of(in, row, column, left);
            const Decay& decay = now.decay;
            const vf scaled = dh * now.open, dz = scaled * decay.c, dgate = dz * now.z * (1.0f - now.open);
            store(out.dz + to, dz, left);
            store(out.du + to, dgate, left);
            vf dp = -(scaled * now.z) * (decay.gamma * decay.inverse_c);
            if (before) dp += dh * load(before + column, left);
            const vf ddecay = ((decay.p >= GAMMA_MIN) & (decay.p <= GAMMA_MAX)) ? dp * decay.p * decay.q : vf{};
            store(out.ddecay + row * in.width() + column, ddecay, left);
            store(carry + column, before ? dh * decay.gamma : vf{}, left);
            store(decay_sum + column, load(decay_sum + column, left) + ddecay, left);
            store(gate_sum + column, load(gate_sum + column, left) + dgate, left);
        });
}

// h is the result of gated_scan_forward. False if there is no memory for the scratch.
template <class T>
static bool gated_scan_backward(const GatedScanInputs<T>& in, const GatedScanFromAbove<T>& above,
                                const GatedScanGradients<T>& out, const float* h, int threads) {
    const GatedScanHeads split(in, threads);
    const int64_t width = in.width(), tasks = in.batch * split.parts, pitch = round_up(in.d, W);
    const auto make = [&](Parts& parts) { return parts.take(2 * HEADS_AT_ONCE * pitch); };
    return run_tasks(tasks, threads, make, [&](int64_t task, float* pulled) {
        const int64_t b = task / split.parts, head0 = task % split.parts * split.count;
        const int64_t head1 = min64(in.heads, head0 + split.count), first = head0 * in.d, n = (head1 - head0) * in.d;
        if (n <= 0) return;
        float* carry = out.dh0 + b * width;
        memset(out.ddecay_bias + b * width + first, 0, n * sizeof(float));
        memset(out.dgate_bias + b * width + first, 0, n * sizeof(float));
        if (above.dh_last)
            memcpy(carry + first, above.dh_last + b * width + first, n * sizeof(float));
        else
            memset(carry + first, 0, n * sizeof(float));
        for (int64_t t = in.time - 1; t >= 0; --t) {
            const int64_t row = b * in.time + t;
            if (t) {  // rows are read from the last to the first, which the processor does not foresee
                prefetch_row(above.dy + (row - 1) * above.dy_row + first, n);
                prefetch_row(in.r + (row - 1) * in.row + first, n);
                prefetch_row(in.z + (row - 1) * in.row + first, n);
                prefetch_row(in.u + (row - 1) * in.row + first, n);
                prefetch_row(in.decay + (row - 1) * in.decay_row + first, n);
                if (t > 1) prefetch_row(h + (row - 2) * width + first, n);
            }
            const float* before = t ? h + (row - 1) * width : in.h0 ? in.h0 + b * width : nullptr;
            if (in.starts(row)) before = nullptr;
            for (int64_t head = head0; head < head1; head += HEADS_AT_ONCE)
                gated_scan_row_backward(in, above, out, b, row, head, min64(head1, head + HEADS_AT_ONCE), before,
                                        h + row * width, carry, pulled, pulled + HEADS_AT_ONCE * pitch, pitch);
        }
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
