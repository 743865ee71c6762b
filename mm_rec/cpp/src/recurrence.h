// The nonlinear time loop: i_t = sigmoid(u_t + W_g h_{t-1}), h_t = i_t z_t + gamma_t h_{t-1}, per head of d.
//
// A task is one head of a group of up to GROUP sequences. W_g of the head, packed so that a step reads it in
// order, stays in the first- or second-level cache for the whole loop, and each of its vectors serves all
// sequences of the group. Groups depend on the shape alone, so results don't depend on the number of threads.
#pragma once

#include "product.h"
#include "scratch.h"

namespace mm_rec {
namespace MM_LEVEL {

#if defined(__AVX512F__)
constexpr int GROUP = 4;  // 4 sequences x 4 vectors: 16 sums, of 32 registers
constexpr int STEP_VECS = 4;
#else
constexpr int GROUP = 2;
constexpr int STEP_VECS = 4;
#endif
constexpr int64_t RECURRENCE_MIN_WORK = 1 << 18;  // multiplications under which a second thread costs more than it brings
constexpr int64_t CHUNK = 32;  // steps whose gates are recomputed at once in the backward pass

// packed[v][j][0..W) = w(v * W + lane, j) with w(i, j) = w_g[i * row + j * col]; rows past d are 0.
static void pack_columns(int64_t d, const float* w_g, int64_t row, int64_t col, float* packed) {
    const int64_t vectors = (d + W - 1) / W;
    for (int64_t v = 0; v < vectors; ++v)
        for (int64_t j = 0; j < d; ++j)
            for (int64_t lane = 0; lane < W; ++lane) {
                const int64_t i = v * W + lane;
                packed[(v * d + j) * W + lane] = i < d ? w_g[i * row + j * col] : 0.0f;
            }
}

// out[g] = packed matrix times x[g] for a group of vectors of d floats (padded to whole vectors), d apart `pitch`.
template <int G, int VECS>
MM_INLINE void group_matvec_tile(int64_t d, const float* packed, const float* x, float* out, int64_t pitch) {
    // Two partial sums each: a lone chain of d dependent additions would wait for every one of them.
    constexpr int CHAINS = G * VECS <= 8 ? 2 : 1;
    vf sums[CHAINS][G][VECS] = {};
    int64_t j = 0;
    for (; j + CHAINS <= d; j += CHAINS)
        for (int chain = 0; chain < CHAINS; ++chain)
            for (int v = 0; v < VECS; ++v) {
                const vf column = load(packed + (v * d + j + chain) * W);
                for (int g = 0; g < G; ++g) sums[chain][g][v] += splat(x[g * pitch + j + chain]) * column;
            }
    if (CHAINS == 2 && j < d)
        for (int v = 0; v < VECS; ++v) {
            const vf column = load(packed + (v * d + j) * W);
            for (int g = 0; g < G; ++g) sums[0][g][v] += splat(x[g * pitch + j]) * column;
        }
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < VECS; ++v) {
            const vf total = CHAINS == 2 ? sums[0][g][v] + sums[CHAINS - 1][g][v] : sums[0][g][v];
            store(out + g * pitch + v * W, total);
        }
}

template <int G>
MM_INLINE void group_matvec(int64_t d, const float* packed, const float* x, float* out, int64_t pitch) {
    const int64_t vectors = (d + W - 1) / W;
    int64_t v = 0;
    for (; v + STEP_VECS <= vectors; v += STEP_VECS)
        group_matvec_tile<G, STEP_VECS>(d, packed + v * d * W, x, out + v * W, pitch);
    for (; v < vectors; ++v) group_matvec_tile<G, 1>(d, packed + v * d * W, x, out + v * W, pitch);
}

// Shape and inputs of a call. Rows of z, u, gamma, dh are found as (b * time + t) * row stride.
template <class T>
struct RecurrenceInputs {
    int64_t batch, time, heads, d;
    const float* z;
    int64_t z_row;
    const T* u;
    int64_t u_row;
    const float* gamma;
    int64_t gamma_row;
    const float* w_g;      // (heads, d, d)
    const float* h0;       // (batch, heads * d) or null
    const uint8_t* reset;  // (batch, time) or null
    int64_t width() const { return heads * d; }
    int64_t work() const { return batch * time * heads * d * d; }
    int64_t pitch() const { return round_up(d, W); }
    bool starts(int64_t row) const { return reset && reset[row]; }
};

// Sequences per task: as many as share a load of W_g, but few enough that there are tasks for many cores.
MM_INLINE int recurrence_group(int64_t batch, int64_t heads) {
    int group = GROUP;
    while (group > 1 && (batch < group || batch * heads / group < 8)) group /= 2;
    return group;
}

template <int G, class T>
static void recurrence_forward_task(const RecurrenceInputs<T>& in, int64_t b, int64_t head, const float* packed,
                                    float* state, float* h, float* h_last) {
    const int64_t d = in.d, pitch = in.pitch(), width = in.width(), column = head * d;
    float* fed_back = state + G * pitch;
    memset(state, 0, G * pitch * sizeof(float));
    for (int g = 0; g < G && in.h0; ++g)
        memcpy(state + g * pitch, in.h0 + (b + g) * width + column, d * sizeof(float));
    for (int64_t t = 0; t < in.time; ++t) {
        for (int g = 0; g < G; ++g)
            if (in.starts((b + g) * in.time + t)) memset(state + g * pitch, 0, pitch * sizeof(float));
        group_matvec<G>(d, packed, state, fed_back, pitch);
        for (int g = 0; g < G; ++g) {
            const int64_t row = (b + g) * in.time + t;
            const float* z = in.z + row * in.z_row + column;
            const T* u = in.u + row * in.u_row + column;
            const float* gamma = in.gamma + row * in.gamma_row + column;
            for (int64_t i = 0; i < d; i += W) {
                const int64_t at = g * pitch + i, left = d - i;
                const vf gate = sigmoid(load(u + i, left) + load(fed_back + at));
                const vf now = gate * load(z + i, left) + load(gamma + i, left) * load(state + at);
                store(state + at, now);
                store(h + row * width + column + i, now, left);
            }
        }
    }
    for (int g = 0; g < G; ++g)
        memcpy(h_last + (b + g) * width + column, state + g * pitch, d * sizeof(float));
}

// h (batch, time, width) and h_last (batch, width) contiguous. False if there is no memory for the scratch.
template <class T>
static bool recurrence_forward(const RecurrenceInputs<T>& in, float* h, float* h_last, int threads) {
    const int64_t pitch = in.pitch();
    const int group = recurrence_group(in.batch, in.heads);
    const int64_t groups = (in.batch + group - 1) / group, tasks = groups * in.heads;
    if (in.work() < RECURRENCE_MIN_WORK) threads = 1;
    bool done = true;
#pragma omp parallel num_threads(threads) if (tasks > 1 && threads > 1) reduction(&& : done)
    {
        Scratch scratch(in.d * pitch + 2 * GROUP * pitch);
        done = scratch.data != nullptr;
        int64_t packed_head = -1;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            if (!scratch.data) continue;
            const int64_t head = task / groups, first = task % groups * group;
            float* state = scratch.data + in.d * pitch;
            if (head != packed_head) pack_columns(in.d, in.w_g + head * in.d * in.d, in.d, 1, scratch.data);
            packed_head = head;
            const int64_t end = min64(in.batch, first + group);
            int64_t b = first;
            for (; b + GROUP <= end; b += GROUP)
                recurrence_forward_task<GROUP>(in, b, head, scratch.data, state, h, h_last);
            for (; b + 2 <= end; b += 2) recurrence_forward_task<2>(in, b, head, scratch.data, state, h, h_last);
            for (; b < end; ++b) recurrence_forward_task<1>(in, b, head, scratch.data, state, h, h_last);
        }
    }
    return done;
}

// What the backward pass writes: dz, dgamma float32 and du in the type of u, all (batch, time, width)
// contiguous; dw_g (groups, heads, d, d), one share per group of sequences; dh0 (batch, width).
template <class T>
struct RecurrenceGradients {
    float* dz;
    T* du;
    float* dgamma;
    float* dw_g;
    float* dh0;
};

// Scratch of one backward task: two packed forms of W_g, the share of dW_g, and per sequence of the group
// CHUNK rows of h_{t-1}, of gates and of delta, and the gradient that flows back in time.
struct RecurrenceScratch {
    int64_t pitch, matrix, rows;
    RecurrenceScratch(int64_t d) : pitch(round_up(d, W)), matrix(d * pitch), rows(CHUNK * pitch) {}
    int64_t floats() const { return 3 * matrix + GROUP * (3 * rows + 3 * pitch); }
    float* transposed(float* base) const { return base; }           // rows j of W_g^T, for the gates
    float* packed(float* base) const { return base + matrix; }      // for W_g^T delta
    float* dw_g(float* base) const { return base + 2 * matrix; }    // rows of `pitch`
    float* before(float* base, int g) const { return base + 3 * matrix + g * 3 * rows; }
    float* gate(float* base, int g) const { return before(base, g) + rows; }
    float* delta(float* base, int g) const { return before(base, g) + 2 * rows; }
    float* carry(float* base) const { return base + 3 * matrix + GROUP * 3 * rows; }
    float* delta_now(float* base) const { return carry(base) + GROUP * pitch; }
    float* fed_back(float* base) const { return carry(base) + 2 * GROUP * pitch; }
};

// h_{t-1} and the gates of steps [t0, t1) of sequence b.
template <class T>
static void recurrence_recompute(const RecurrenceInputs<T>& in, const RecurrenceScratch& at, float* base, int g,
                                 int64_t b, int64_t head, int64_t t0, int64_t t1, const float* h) {
    const int64_t d = in.d, pitch = at.pitch, width = in.width(), column = head * d;
    float *before = at.before(base, g), *gate = at.gate(base, g);
    for (int64_t t = t0; t < t1; ++t) {
        const int64_t row = b * in.time + t;
        const float* from = in.starts(row) ? nullptr : t ? h + (row - 1) * width + column
                                                   : in.h0 ? in.h0 + b * width + column : nullptr;
        float* to = before + (t - t0) * pitch;
        memset(to, 0, pitch * sizeof(float));
        if (from) memcpy(to, from, d * sizeof(float));
    }
    product<false>(t1 - t0, pitch, d, before, pitch, 1, at.transposed(base), pitch, gate, pitch);
    for (int64_t t = t0; t < t1; ++t) {
        const T* u = in.u + (b * in.time + t) * in.u_row + column;
        float* line = gate + (t - t0) * pitch;
        for (int64_t i = 0; i < d; i += W) store(line + i, sigmoid(load(line + i) + load(u + i, d - i)));
    }
}

// One step back in time of sequence b: from dh_t + carry to the gradients of the step's inputs, delta_t and
// the part of the next carry that goes through the decay.
template <class T>
static void recurrence_step_back(const RecurrenceInputs<T>& in, const RecurrenceGradients<T>& out,
                                 const RecurrenceScratch& at, float* base, int g, int64_t b, int64_t head, int64_t t,
                                 int64_t t0, const float* dh, int64_t dh_row) {
    const int64_t d = in.d, pitch = at.pitch, width = in.width(), column = head * d, row = b * in.time + t;
    const float* z = in.z + row * in.z_row + column;
    const float* gamma = in.gamma + row * in.gamma_row + column;
    const float* before = at.before(base, g) + (t - t0) * pitch;
    const float* gate = at.gate(base, g) + (t - t0) * pitch;
    float* delta = at.delta(base, g) + (t - t0) * pitch;
    float* carry = at.carry(base) + g * pitch;
    const int64_t to = row * width + column;
    for (int64_t i = 0; i < d; i += W) {
        const int64_t left = d - i;
        const vf grad = load(dh + row * dh_row + column + i, left) + load(carry + i);
        const vf open = load(gate + i);
        const vf du = grad * load(z + i, left) * open * (1.0f - open);
        store(out.dz + to + i, grad * open, left);
        store(out.dgamma + to + i, grad * load(before + i), left);
        store(out.du + to + i, du, left);
        store(delta + i, du);
        store(at.delta_now(base) + g * pitch + i, du);
        store(carry + i, grad * load(gamma + i, left));
    }
}

template <int G, class T>
static void recurrence_backward_task(const RecurrenceInputs<T>& in, const RecurrenceGradients<T>& out,
                                     const RecurrenceScratch& at, float* base, int64_t b, int64_t head, const float* h,
                                     const float* dh, int64_t dh_row, const float* dh_last) {
    const int64_t d = in.d, pitch = at.pitch, width = in.width(), column = head * d;
    float* carry = at.carry(base);
    float* fed_back = at.fed_back(base);
    memset(carry, 0, G * pitch * sizeof(float));
    for (int g = 0; g < G && dh_last; ++g)
        memcpy(carry + g * pitch, dh_last + (b + g) * width + column, d * sizeof(float));
    for (int64_t t1 = in.time; t1 > 0;) {
        const int64_t t0 = max64(0, t1 - CHUNK);
        for (int g = 0; g < G; ++g) recurrence_recompute(in, at, base, g, b + g, head, t0, t1, h);
        for (int64_t t = t1 - 1; t >= t0; --t) {
            for (int g = 0; g < G; ++g)
                recurrence_step_back(in, out, at, base, g, b + g, head, t, t0, dh, dh_row);
            group_matvec<G>(d, at.packed(base), at.delta_now(base), fed_back, pitch);
            for (int g = 0; g < G; ++g) {
                const bool starts = in.starts((b + g) * in.time + t);
                for (int64_t i = g * pitch; i < (g + 1) * pitch; i += W)
                    store(carry + i, starts ? vf{} : load(carry + i) + load(fed_back + i));
            }
        }
        for (int g = 0; g < G; ++g)  // dW_g += delta^T h_{t-1}
            product<true>(d, pitch, t1 - t0, at.delta(base, g), 1, pitch, at.before(base, g), pitch, at.dw_g(base), pitch);
        t1 = t0;
    }
    for (int g = 0; g < G; ++g)
        memcpy(out.dh0 + (b + g) * width + column, carry + g * pitch, d * sizeof(float));
}

// dh has row stride dh_row; dh_last (batch, width) may be null. False if there is no memory for the scratch.
template <class T>
static bool recurrence_backward(const RecurrenceInputs<T>& in, const RecurrenceGradients<T>& out, const float* h,
                                const float* dh, int64_t dh_row, const float* dh_last, int threads) {
    const int64_t d = in.d;
    const RecurrenceScratch at(d);
    const int group = recurrence_group(in.batch, in.heads);
    const int64_t groups = (in.batch + group - 1) / group, tasks = groups * in.heads;
    if (in.work() < RECURRENCE_MIN_WORK) threads = 1;
    bool done = true;
#pragma omp parallel num_threads(threads) if (tasks > 1 && threads > 1) reduction(&& : done)
    {
        Scratch scratch(at.floats());
        float* base = scratch.data;
        done = base != nullptr;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            if (!base) continue;
            const int64_t head = task / groups, first = task % groups * group;
            const float* w_g = in.w_g + head * d * d;
            memset(base, 0, at.floats() * sizeof(float));
            for (int64_t j = 0; j < d; ++j)
                for (int64_t i = 0; i < d; ++i) at.transposed(base)[j * at.pitch + i] = w_g[i * d + j];
            pack_columns(d, w_g, 1, d, at.packed(base));
            const int64_t end = min64(in.batch, first + group);
            int64_t b = first;
            for (; b + GROUP <= end; b += GROUP)
                recurrence_backward_task<GROUP>(in, out, at, base, b, head, h, dh, dh_row, dh_last);
            for (; b + 2 <= end; b += 2) recurrence_backward_task<2>(in, out, at, base, b, head, h, dh, dh_row, dh_last);
            for (; b < end; ++b) recurrence_backward_task<1>(in, out, at, base, b, head, h, dh, dh_row, dh_last);
            float* dw_g = out.dw_g + (task % groups * in.heads + head) * d * d;
            for (int64_t i = 0; i < d; ++i) memcpy(dw_g + i * d, at.dw_g(base) + i * at.pitch, d * sizeof(float));
        }
    }
    return done;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
