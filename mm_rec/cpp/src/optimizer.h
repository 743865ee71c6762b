// AdamW in one pass over memory, the two passes of Muon around its orthogonal matrices, and sums of squares.
#pragma once

#include "parallel.h"
#include "vec.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t PIECE = 1 << 14;  // elements that one task takes at a time
constexpr int64_t AHEAD = 256;      // elements between what is computed and what is asked for: four streams are many

// Settings of one tensor's update, seven floats also in the C interface.
struct AdamW {
    float beta1, beta2, eps, decay;  // decay = 1 - lr * weight_decay
    float rate;                      // lr / (1 - beta1^step)
    float inverse_bias2;             // 1 / (1 - beta2^step)
    float grad_scale;
};

// Many tensors as one row of pieces, so that all of them are one parallel region. A thread's pieces follow each other.
struct PieceCursor {
    const int64_t* sizes;
    int64_t tensor = 0, first = 0;  // and the number of its first piece
    int64_t begin = 0, end = 0;     // elements of the piece found last
    explicit PieceCursor(const int64_t* sizes) : sizes(sizes) {}
    static int64_t pieces(int64_t size) { return (size + PIECE - 1) / PIECE; }
    void find(int64_t piece) {
        while (piece >= first + pieces(sizes[tensor])) first += pieces(sizes[tensor++]);
        begin = (piece - first) * PIECE;
        end = min64(sizes[tensor], begin + PIECE);
    }
};

static int64_t count_pieces(int64_t tensors, const int64_t* sizes) {
    int64_t total = 0;
    for (int64_t k = 0; k < tensors; ++k) total += PieceCursor::pieces(sizes[k]);
    return total;
}

// Calls body(k, begin, end) for all pieces of the tensors.
template <class F>
static void for_pieces(int64_t tensors, const int64_t* sizes, int threads, F body) {
    parallel_ranges(count_pieces(tensors, sizes), threads, [=](int64_t first, int64_t last) {
        PieceCursor at(sizes);
        for (int64_t piece = first; piece < last; ++piece) {
            at.find(piece);
            body(at.tensor, at.begin, at.end);
        }
    });
}

// Calls `body` with the tensor's data in its type: 0 is float32, 1 bfloat16.
template <class F>
MM_INLINE auto with_data(const void* data, int32_t type, F body) {
    return type == 0 ? body(static_cast<const float*>(data)) : body(static_cast<const bf16*>(data));
}

// out may be null; `past_caches` says how to write it.
template <class T>
MM_INLINE void adamw_piece(int64_t begin, int64_t end, float* master, float* m, float* v, const T* grad, bf16* out,
                           bool past_caches, AdamW p) {
    for_vectors(end - begin, [&](int64_t offset, auto left) {
        const int64_t i = begin + offset;
        __builtin_prefetch(master + i + AHEAD, 1);
        __builtin_prefetch(m + i + AHEAD, 1);
        __builtin_prefetch(v + i + AHEAD, 1);
        __builtin_prefetch(grad + i + AHEAD);
        const vf g = load(grad + i, left) * p.grad_scale;
        const vf m_new = p.beta1 * load(m + i, left) + (1.0f - p.beta1) * g;
        const vf v_new = p.beta2 * load(v + i, left) + (1.0f - p.beta2) * (g * g);
        const vf step = p.rate * m_new / (sqrt(v_new * p.inverse_bias2) + p.eps);
        const vf x = p.decay * load(master + i, left) - step;
        store(m + i, m_new, left);
        store(v + i, v_new, left);
        store(master + i, x, left);
        if (past_caches && left == W)
            stream(out + i, x);
        else if (out)
            store(out + i, x, left);
    });
}

// The tensors of a model and what AdamW keeps for each; out[k] may be null, types are those of the gradients.
struct AdamWTensors {
    int64_t count;
    const int64_t* sizes;
    float *const *master, *const *m, *const *v;
    const void* const* grad;
    const int32_t* types;
    bf16* const* out;
    const AdamW* settings;
};

static void adamw(AdamWTensors all, int threads) {
    for_pieces(all.count, all.sizes, threads, [=](int64_t k, int64_t begin, int64_t end) {
        const bool past_caches = all.out[k] && streams(all.out[k], W, all.sizes[k]);
        with_data(all.grad[k], all.types[k], [&](auto grad) {
            adamw_piece(begin, end, all.master[k], all.m[k], all.v[k], grad, all.out[k], past_caches, all.settings[k]);
        });
        if (past_caches) end_streams();
    });
}

struct MuonMomentum {
    float momentum, grad_scale;
};

// m <- mu m + (1 - mu) g, and the direction u = mu m + (1 - mu) g (Nesterov).
template <class T, class U>
MM_INLINE void muon_momentum_piece(int64_t begin, int64_t end, float* m, const T* grad, U* u, MuonMomentum p) {
    for_vectors(end - begin, [&](int64_t offset, auto left) {
        const int64_t i = begin + offset;
        __builtin_prefetch(m + i + AHEAD, 1);
        __builtin_prefetch(grad + i + AHEAD);
        const vf g = (1.0f - p.momentum) * p.grad_scale * load(grad + i, left);
        const vf m_new = p.momentum * load(m + i, left) + g;
        store(m + i, m_new, left);
        store(u + i, p.momentum * m_new + g, left);
    });
}

// Gradients have types of their own; all u have the type `u_type`.
static void muon_momentum(int64_t tensors, const int64_t* sizes, float* const* m, const void* const* grad,
                          const int32_t* types, void* const* u, int32_t u_type, MuonMomentum p, int threads) {
    for_pieces(tensors, sizes, threads, [=](int64_t k, int64_t begin, int64_t end) {
        with_data(grad[k], types[k], [&](auto g) {
            u_type == 0 ? muon_momentum_piece(begin, end, m[k], g, static_cast<float*>(u[k]), p)
                        : muon_momentum_piece(begin, end, m[k], g, static_cast<bf16*>(u[k]), p);
        });
    });
}

// Settings of one tensor, two floats also in the C interface: 1 - lr * weight_decay, and lr times its scale.
struct MuonStep {
    float decay, rate;
};

// master <- decay master - rate u; out, which may be null, is set to that.
template <class U>
MM_INLINE void muon_step_piece(int64_t begin, int64_t end, float* master, const U* u, bf16* out, MuonStep p) {
    for_vectors(end - begin, [&](int64_t offset, auto left) {
        const int64_t i = begin + offset;
        __builtin_prefetch(master + i + AHEAD, 1);
        const vf x = p.decay * load(master + i, left) - p.rate * load(u + i, left);
        store(master + i, x, left);
        if (out) store(out + i, x, left);
    });
}

static void muon_step(int64_t tensors, const int64_t* sizes, float* const* master, const void* const* u, int32_t u_type,
                      bf16* const* out, const MuonStep* settings, int threads) {
    for_pieces(tensors, sizes, threads, [=](int64_t k, int64_t begin, int64_t end) {
        with_data(u[k], u_type, [&](auto x) { muon_step_piece(begin, end, master[k], x, out[k], settings[k]); });
    });
}

template <class T>
MM_INLINE double piece_sum_of_squares(int64_t n, const T* x) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += 64 * W)  // short enough for float32 sums
        total += sum_over(min64(n - begin, 64 * W), [&](int64_t i, auto left) {
            __builtin_prefetch(x + begin + i + 4 * AHEAD);
            const vf v = load(x + begin + i, left);
            return v * v;
        });
    return total;
}

// The pieces are added in order, a batch of them at a time, whatever the number of threads.
static double sum_of_squares(int64_t tensors, const void* const* data, const int64_t* sizes, const int32_t* types,
                             int threads) {
    constexpr int64_t BATCH = 4096;
    double total = 0;
    const int64_t pieces = count_pieces(tensors, sizes);
    for (int64_t first = 0; first < pieces; first += BATCH) {
        double partial[BATCH];
        const int64_t count = min64(BATCH, pieces - first);
        parallel_ranges(count, threads, [&](int64_t begin, int64_t end) {
            PieceCursor at(sizes);
            for (int64_t i = begin; i < end; ++i) {
                at.find(first + i);
                partial[i] = with_data(data[at.tensor], types[at.tensor], [&](auto x) {
                    return piece_sum_of_squares(at.end - at.begin, x + at.begin);
                });
            }
        });
        for (int64_t i = 0; i < count; ++i) total += partial[i];
    }
    return total;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
