// The nonlinear time loop: i_t = sigmoid(u_t + W_g h_{t-1}), h_t = i_t z_t + gamma_t h_{t-1}, per head of d.
//
// A task is some heads of a group of up to GROUP sequences. W_g of a head, packed so that a step reads it in order,
// stays in the second-level cache for the whole loop and in the first for CHUNK steps of its head, and each of its
// vectors serves all sequences of the group. Heads that lie side by side in memory take turns after each chunk, since a
// head's own part of a row is too short to be read fast. Groups depend on the shape alone, and heads know nothing of
// each other, so results don't depend on the number of threads.
#pragma once

#include <type_traits>

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
constexpr int64_t CHUNK = 16;     // steps of a head in a row
constexpr int64_t MAX_HEADS = 8;  // of a task: their matrices share the second-level cache

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

// out[g] = packed matrix times x[g] for a group of vectors of d floats, x_pitch and out_pitch apart.
template <int G, int VECS>
MM_INLINE void group_matvec_tile(int64_t d, const float* packed, const float* x, int64_t x_pitch, float* out,
                  int64_t out_pitch) {
    // Two partial sums each: a lone chain of d dependent additions would wait for every one of them.
    constexpr int CHAINS = G * VECS <= 8 ? 2 : 1;
    vf sums[CHAINS][G][VECS] = {};
    int64_t j = 0;
    for (; j + CHAINS <= d; j += CHAINS)
        for (int chain = 0; chain < CHAINS; ++chain)
            for (int v = 0; v < VECS; ++v) {
                const vf column = in_register(load(packed + (v * d + j + chain) * W));
                for (int g = 0; g < G; ++g) sums[chain][g][v] += splat(x[g * x_pitch + j + chain]) * column;
            }
    if (CHAINS == 2 && j < d)
        for (int v = 0; v < VECS; ++v) {
            const vf column = in_register(load(packed + (v * d + j) * W));
            for (int g = 0; g < G; ++g) sums[0][g][v] += splat(x[g * x_pitch + j]) * column;
        }
    for (int g = 0; g < G; ++g)
        for (int v = 0; v < VECS; ++v) {
            const vf total = CHAINS == 2 ? sums[0][g][v] + sums[CHAINS - 1][g][v] : sums[0][g][v];
            store(out + g * out_pitch + v * W, total);
        }
}

template <int G>
MM_INLINE void group_matvec(int64_t d, const float* packed, const float* x, int64_t x_pitch, float* out,
                  int64_t out_pitch) {
    const int64_t vectors = (d + W - 1) / W;
    int64_t v = 0;
    for (; v + STEP_VECS <= vectors; v += STEP_VECS)
        group_matvec_tile<G, STEP_VECS>(d, packed + v * d * W, x, x_pitch, out + v * W, out_pitch);
    for (; v < vectors; ++v) group_matvec_tile<G, 1>(d, packed + v * d * W, x, x_pitch, out + v * W, out_pitch);
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

// Heads of a task: as many as still leave a task for every thread.
MM_INLINE int64_t recurrence_heads(int64_t heads, int64_t groups, int threads) {
    int64_t together = min64(MAX_HEADS, max64(1, heads * groups / threads));
    while (heads % together) --together;
    return together;
}

// Calls body(integral_constant G, b) for the sequences [first, end), G at a time from b on.
template <class F>
MM_INLINE void for_sequences(int64_t first, int64_t end, F body) {
    int64_t b = first;
    for (; b + GROUP <= end; b += GROUP) body(std::integral_constant<int, GROUP>{}, b);
    for (; b + 2 <= end; b += 2) body(std::integral_constant<int, 2>{}, b);
    for (; b < end; ++b) body(std::integral_constant<int, 1>{}, b);
}

// Steps [t0, t1) of one head of G sequences from b on. Asks for the next chunk's rows.
template <int G, class T>
static void recurrence_forward_chunk(const RecurrenceInputs<T>& in, int64_t b, int64_t head, int64_t t0, int64_t t1,
                                     const float* packed, float* state, float* fed_back, float* h) {
    const int64_t d = in.d, pitch = in.pitch(), width = in.width(), column = head * d;
    for (int64_t t = t0; t < t1; ++t) {
        for (int g = 0; g < G; ++g)
            if (in.starts((b + g) * in.time + t)) memset(state + g * pitch, 0, pitch * sizeof(float));
        group_matvec<G>(d, packed, state, pitch, fed_back, pitch);
        for (int g = 0; g < G; ++g) {
            const int64_t row = (b + g) * in.time + t;
            const float* z = in.z + row * in.z_row + column;
            const T* u = in.u + row * in.u_row + column;
            const float* gamma = in.gamma + row * in.gamma_row + column;
            for_vectors(d, [&](int64_t i, auto left) {
                const int64_t at = g * pitch + i;
                const vf gate = sigmoid(load(u + i, left) + load(fed_back + at));
                const vf now = gate * load(z + i, left) + load(gamma + i, left) * load(state + at);
                store(state + at, now);
                store(h + row * width + column + i, now, left);
            });
            if (t + CHUNK < in.time) {
                prefetch_row(z + CHUNK * in.z_row, d);
                prefetch_row(u + CHUNK * in.u_row, d);
                prefetch_row(gamma + CHUNK * in.gamma_row, d);
                prefetch_row<true>(h + (row + CHUNK) * width + column, d);
            }
        }
    }
}

// h (batch, time, width) and h_last (batch, width) contiguous. False if there is no memory for the scratch.
template <class T>
static bool recurrence_forward(const RecurrenceInputs<T>& in, float* h, float* h_last, int threads) {
    const int64_t d = in.d, pitch = in.pitch(), width = in.width();
    const int group = recurrence_group(in.batch, in.heads);
    if (in.work() < RECURRENCE_MIN_WORK) threads = 1;
    const int64_t groups = (in.batch + group - 1) / group, heads = recurrence_heads(in.heads, groups, threads);
    struct Buffers {
        float *packed, *state, *fed_back;  // (heads, d, pitch); (heads, GROUP, pitch), h_{t-1}; (GROUP, pitch)
        int64_t packed_head;
    };
    const auto make = [&](Parts& parts) {
        float *packed = parts.take(heads * d * pitch), *state = parts.take(heads * GROUP * pitch);
        return Buffers{packed, state, parts.take(GROUP * pitch), -1};
    };
    return run_tasks(in.heads / heads * groups, threads, make, [&](int64_t task, Buffers& w) {
        const int64_t head = task / groups * heads, first = task % groups * group;
        for (int64_t k = 0; k < heads && head != w.packed_head; ++k)
            pack_columns(d, in.w_g + (head + k) * d * d, d, 1, w.packed + k * d * pitch);
        w.packed_head = head;
        for_sequences(first, min64(in.batch, first + group), [&](auto size, int64_t b) {
            constexpr int G = decltype(size)::value;
            const auto each_state = [&](auto body) {
                for (int64_t k = 0; k < heads; ++k)
                    for (int g = 0; g < G; ++g)
                        body(w.state + (k * GROUP + g) * pitch, (b + g) * width + (head + k) * d);
            };
            memset(w.state, 0, heads * GROUP * pitch * sizeof(float));
            if (in.h0) each_state([&](float* state, int64_t at) { memcpy(state, in.h0 + at, d * sizeof(float)); });
            for (int64_t t = 0; t < in.time; t += CHUNK)
                for (int64_t k = 0; k < heads; ++k)
                    recurrence_forward_chunk<G>(in, b, head + k, t, min64(in.time, t + CHUNK), w.packed + k * d * pitch,
                                                w.state + k * GROUP * pitch, w.fed_back, h);
            each_state([&](float* state, int64_t at) { memcpy(h_last + at, state, d * sizeof(float)); });
        });
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
