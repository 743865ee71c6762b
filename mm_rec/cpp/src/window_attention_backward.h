// Backward pass of window attention: weights are had again from the scores and the softmax's denominators.
#pragma once

#include "window_attention.h"

namespace mm_rec {
namespace MM_LEVEL {

// Gradients from above, and what the forward pass gave.
template <class T>
struct AttentionFromAbove {
    HeadRows<const T> dout, out;
    const float* lse;
};

// Gradients of the inputs: dq (batch, time, heads, d), dk, dv (batch, context, heads, d).
template <class T>
struct AttentionGradients {
    T *dq, *dk, *dv;
};

// Buffers beyond those of the forward pass; shapes as there.
template <class T>
struct AttentionBackwardScratch : AttentionScratch<T> {
    typedef typename Operand<T>::Cell Cell;
    typedef typename Operand<T>::Element Element;

    float *dk, *dv, *dq, *dscores;
    Element *dout, *dscore_rows;
    Cell *k_pairs, *q_pairs, *dout_pairs, *dscore_pairs;
    Cell* dout_columns;

    AttentionBackwardScratch(const ContextShape& s, Parts& parts) : AttentionScratch<T>(s, parts) {
        const int64_t pitch = this->pitch, scored = this->scored, context = s.context() + 1;
        dk = parts.take(context * pitch);
        dv = parts.take(context * pitch);
        dq = parts.take(RUN * pitch);
        dscores = parts.take(scored * RUN);
        dout = this->rows(RUN, pitch, parts);
        dscore_rows = this->narrowed(dscores, scored, RUN, parts);
        k_pairs = this->paired(this->k, context, pitch, parts);
        q_pairs = this->paired(this->q, RUN, pitch, parts);
        dout_pairs = this->paired(dout, RUN, pitch, parts);
        dscore_pairs = this->paired(dscore_rows, scored, RUN, parts);
        dout_columns = reinterpret_cast<Cell*>(parts.take(pitch * RUN));
    }
};

// Gradients at the result of `queries` queries from `begin` on, and dout . out into sums. `w` are buffers of either softmax.
template <class T, class Buffers>
static void load_from_above(const ContextShape& s, int64_t b, int64_t head, int64_t begin, int64_t queries,
                            const AttentionFromAbove<T>& above, Buffers& w) {
    for (int64_t i = 0; i < queries; ++i) {
        const T* dy = above.dout.at(b, begin + i, s.time, head, s.d);
        const T* y = above.out.at(b, begin + i, s.time, head, s.d);
        vf dot = {};
        for (int64_t j = 0; j < s.d; j += W) dot += load(y + j, s.d - j) * load(dy + j, s.d - j);
        w.sums[i] = sum(dot);
        store_row(s.d, dy, w.dout + i * w.pitch);
    }
    fill(w.sums, queries, round_up(queries, W), 0.0f);
    pack_pairs(queries, w.pitch, w.dout, w.dout_pairs);
    transpose(queries, w.cells(s.d), w.as_cells(w.dout), w.pitch / w.depth, w.dout_columns, RUN);
}

// Gradients at the result of a run, and from them, into dscores, at its weights; dout . out into sums.
template <class T>
static void attention_weights_backward(const ContextShape& s, const Run& run, int64_t b, int64_t head,
                                       const AttentionFromAbove<T>& above, AttentionBackwardScratch<T>& w) {
    const int64_t depth = w.cells(s.d), row = w.pitch / w.depth;
    load_from_above(s, b, head, run.begin, run.queries(), above, w);
    run.for_blocks([&](int64_t begin, int64_t rows, Span some) {
        product<false>(rows, some.end - some.begin, depth, w.as_cells(w.v + (run.key_begin + begin) * w.pitch), row, 1,
                       w.dout_columns + some.begin, RUN, w.dscores + begin * RUN + some.begin, RUN);
    });
}

// Scores to weights, in score_rows, and dscores = weight * (dweight - dout . out) in place, in dscore_rows and as cells.
template <class T>
static void attention_softmax_backward(const Run& run, const float* lse, AttentionBackwardScratch<T>& w) {
    constexpr int64_t depth = AttentionScratch<T>::depth;
    run.for_queries([&](Span queries, int64_t row, int64_t count) {
        for (int64_t i = queries.begin; i < queries.end; i += W) {
            const vf log_sum = load(lse + i, run.queries() - i), pull = load(w.sums + i);
            for (int64_t r = row; r < row + count; r += depth) {
                vf dscore[depth];
                for (int64_t j = 0; j < depth; ++j) {
                    const int64_t at = (r + j) * RUN + i;
                    const vf weight = exp(load(w.scores + at) - log_sum);
                    dscore[j] = weight * (load(w.dscores + at) - pull);
                    store(w.score_rows + at, weight);
                    store(w.dscore_rows + at, dscore[j]);
                }
                store_pairs(dscore[0], dscore[depth - 1], w.dscore_pairs + r / 2 * RUN + i);
            }
        }
    });
}

template <class T>
static void attention_run_backward(const AttentionInputs<T>& in, const AttentionFromAbove<T>& above, T* to_dq,
                                   const Run& run, int64_t b, int64_t head, AttentionBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    const int64_t pitch = w.pitch, queries = run.queries(), row = RUN / w.depth;
    attention_queries(in, run, b, head, w);
    attention_scores(s, run, w);
    attention_weights_backward(s, run, b, head, above, w);
    attention_softmax_backward(run, above.lse + (b * s.heads + head) * s.time + run.begin, w);

    pack_pairs(queries, pitch, w.q, w.q_pairs);
    run.for_blocks([&](int64_t begin, int64_t rows, Span some) {
        const int64_t cell = some.begin / w.depth, n = w.cells(min64(some.end, queries) - some.begin);
        float *dk = w.dk + (run.key_begin + begin) * pitch, *dv = w.dv + (run.key_begin + begin) * pitch;
        product<true>(rows, pitch, n, w.as_cells(w.score_rows + begin * RUN) + cell, row, 1, w.dout_pairs + cell * pitch,
                      pitch, dv, pitch);
        product<true>(rows, pitch, n, w.as_cells(w.dscore_rows + begin * RUN) + cell, row, 1, w.q_pairs + cell * pitch,
                      pitch, dk, pitch);
    });
    run.for_queries([&](Span some, int64_t begin, int64_t count) {
        product<false>(some.end - some.begin, pitch, count / w.depth,
                       w.dscore_pairs + begin / w.depth * RUN + some.begin, 1, RUN,
                       w.k_pairs + (run.key_begin + begin) / w.depth * pitch, pitch, w.dq + some.begin * pitch, pitch);
    });
    for (int64_t i = 0; i < queries; ++i) {
        const int64_t t = run.begin + i, angle = (s.window + t) * (s.d / 2);
        rotate_row(s.d, in.cosine + angle, in.sine + angle, -1, w.dq + i * pitch,
                   to_dq + ((b * s.time + t) * s.heads + head) * s.d);
    }
}

template <class T>
static void attention_task_backward(const AttentionInputs<T>& in, const AttentionFromAbove<T>& above,
                                    const AttentionGradients<T>& to, int64_t b, int64_t head,
                                    AttentionBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    attention_context(in, b, head, w);
    pack_pairs(s.context() + 1, w.pitch, w.k, w.k_pairs);
    memset(w.dk, 0, (s.context() + 1) * w.pitch * sizeof(float));
    memset(w.dv, 0, (s.context() + 1) * w.pitch * sizeof(float));
    Run run{};
    while (run.end < s.time) {
        run = next_run(s, b, run.end, w.depth);
        attention_run_backward(in, above, to.dq, run, b, head, w);
    }
    for (int64_t c = 0; c < s.context(); ++c) {
        const int64_t row = ((b * s.context() + c) * s.heads + head) * s.d;
        rotate_row(s.d, in.cosine + c * (s.d / 2), in.sine + c * (s.d / 2), -1, w.dk + c * w.pitch, to.dk + row);
        store_row(s.d, w.dv + c * w.pitch, to.dv + row);
    }
}

template <class T>
static int window_attention_backward(const AttentionInputs<T>& in, const AttentionFromAbove<T>& above,
                                     const AttentionGradients<T>& to, int threads) {
    if (!in.valid()) return KERNEL_BAD_POSITION;
    return for_each_head(in.shape, in.work(), threads, make_padded<AttentionBackwardScratch<T>>(in.shape),
                         [&](int64_t b, int64_t head, AttentionBackwardScratch<T>& w) {
                             attention_task_backward(in, above, to, b, head, w);
                         });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
