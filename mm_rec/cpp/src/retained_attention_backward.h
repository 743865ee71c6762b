// Backward pass of attention over retained pairs. The gradient at a pair is gathered in its row for as long as it is
// kept, and written once, when it gives way or at the end.
#pragma once

#include "retained_attention.h"

namespace mm_rec {
namespace MM_LEVEL {

// Gradients from above, and what the forward pass gave; dlse may be null.
template <class T>
struct RetainedFromAbove {
    HeadRows<const T> dout, out;
    const float *lse, *dlse;  // (batch, heads, time)
};

// Gradients of the inputs, in their shapes.
template <class T>
struct RetainedGradients {
    T *dq, *dk, *dv;
    float* dscore;
    T *dkept_k, *dkept_v;
    float* dkept_score;
};

template <class T>
struct RetainedBackwardScratch : RetainedScratch<T> {
    typedef typename Operand<T>::Cell Cell;
    typedef typename Operand<T>::Element Element;

    float *dk, *dv, *dbias;  // of each row, gathered
    float *dq, *dscores;
    Element *dout, *dscore_rows;
    Cell *k_pairs, *q_pairs, *dout_pairs, *dscore_pairs, *dout_columns;

    RetainedBackwardScratch(const RetainedInputs<T>& in, Parts& parts) : RetainedScratch<T>(in, parts) {
        const int64_t pitch = this->pitch, rows = this->rows_at_most, depth = this->depth;
        dk = parts.take(rows * pitch);
        dv = parts.take(rows * pitch);
        dbias = parts.take(rows);
        dq = parts.take(RUN * pitch);
        dscores = parts.take(rows * RUN);
        dout = this->elements(RUN, parts);
        dscore_rows = depth == 1 ? reinterpret_cast<Element*>(dscores)
                                 : reinterpret_cast<Element*>(parts.take(rows * RUN / depth + W));
        k_pairs = this->pairs(this->k, rows, pitch, parts);
        q_pairs = this->pairs(this->q, RUN, pitch, parts);
        dout_pairs = this->pairs(dout, RUN, pitch, parts);
        dscore_pairs = this->pairs(dscore_rows, rows, RUN, parts);
        dout_columns = reinterpret_cast<Cell*>(parts.take(pitch * RUN));
    }
};

// What comes to the weights of a run, into dscores, and into sums what is taken off it: dout . out less dlse.
template <class T>
static void retained_weights_backward(const RetainedInputs<T>& in, const RetainedFromAbove<T>& above, int64_t b,
                                      int64_t head, int64_t begin, int64_t queries, RetainedBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    for (int64_t i = 0; i < queries; ++i) {
        const T* dy = above.dout.at(b, begin + i, s.time, head, s.d);
        const T* y = above.out.at(b, begin + i, s.time, head, s.d);
        vf dot = {};
        for (int64_t j = 0; j < s.d; j += W) dot += load(y + j, s.d - j) * load(dy + j, s.d - j);
        w.sums[i] = sum(dot) - (above.dlse ? above.dlse[(b * s.heads + head) * s.time + begin + i] : 0.0f);
        store_row(s.d, dy, w.dout + i * w.pitch);
    }
    fill(w.sums, queries, round_up(queries, W), 0.0f);
    pack_pairs(queries, w.pitch, w.dout, w.dout_pairs);
    transpose(queries, w.cells(s.d), w.as_cells(w.dout), w.pitch / w.depth, w.dout_columns, RUN);
    product<false>(w.rows, round_up(queries, BLOCK), w.cells(s.d), w.as_cells(w.v), w.pitch / w.depth, 1, w.dout_columns,
                   RUN, w.dscores, RUN);
}

// Scores to weights and dscores = weight * (dweight - sums), as rows and as cells; their sums over queries into dbias.
template <class T>
static void retained_softmax_backward(int64_t queries, const float* lse, RetainedBackwardScratch<T>& w) {
    constexpr int64_t depth = RetainedScratch<T>::depth;
    for (int64_t i = 0; i < round_up(queries, BLOCK); i += W) {
        float logs[W] = {};
        for (int64_t lane = 0; lane < min64(W, queries - i); ++lane)
            logs[lane] = lse[i + lane] == -__builtin_inff() ? 0.0f : lse[i + lane];
        const vf log_sum = load(logs), pull = load(w.sums + i);
        for (int64_t r = 0; r < w.rows; r += depth) {
            vf dscore[depth];
            for (int64_t j = 0; j < depth; ++j) {
                const int64_t at = (r + j) * RUN + i;
                const vf weight = exp(load(w.scores + at) - log_sum);
                dscore[j] = weight * (load(w.dscores + at) - pull);
                w.dbias[r + j] += sum(dscore[j]);
                store(w.weight_rows + at, weight);
                store(w.dscore_rows + at, dscore[j]);
            }
            store_pairs(dscore[0], dscore[depth - 1], w.dscore_pairs + r / 2 * RUN + i);
        }
    }
}

// The gradient of the pair in `row` to where the pair comes from; the row is empty then.
template <class T>
static void retained_leave(const RetainedInputs<T>& in, const RetainedGradients<T>& to, int64_t b, int64_t head,
                           int64_t row, RetainedBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    const int64_t owner = w.owner[row], token = b * s.context() + owner - in.slots;
    const int64_t kept = (b * s.heads + head) * in.slots + owner, at = token * s.heads + head;
    const bool was_kept = owner < in.slots;
    store_row(s.d, w.dk + row * w.pitch, was_kept ? to.dkept_k + kept * s.d : to.dk + at * s.d);
    store_row(s.d, w.dv + row * w.pitch, was_kept ? to.dkept_v + kept * s.d : to.dv + at * s.d);
    (was_kept ? to.dkept_score[kept] : to.dscore[at]) = w.dbias[row];
    memset(w.dk + row * w.pitch, 0, w.pitch * sizeof(float));
    memset(w.dv + row * w.pitch, 0, w.pitch * sizeof(float));
    w.dbias[row] = 0;
}

template <class T>
static void retained_run_backward(const RetainedInputs<T>& in, const RetainedFromAbove<T>& above, T* to_dq, int64_t b,
                                  int64_t head, int64_t begin, int64_t end, RetainedBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    const int64_t pitch = w.pitch, queries = end - begin, cells = w.cells(queries), row = RUN / w.depth;
    gather_run(in, b, head, begin, end, w);
    retained_scores(in, queries, w);
    retained_weights_backward(in, above, b, head, begin, queries, w);
    retained_softmax_backward(queries, above.lse + (b * s.heads + head) * s.time + begin, w);
    pack_pairs(queries, pitch, w.q, w.q_pairs);
    pack_pairs(w.rows, pitch, w.k, w.k_pairs);
    product<true>(w.rows, pitch, cells, w.as_cells(w.weight_rows), row, 1, w.dout_pairs, pitch, w.dv, pitch);
    product<true>(w.rows, pitch, cells, w.as_cells(w.dscore_rows), row, 1, w.q_pairs, pitch, w.dk, pitch);
    product<false>(queries, pitch, w.rows / w.depth, w.dscore_pairs, 1, RUN, w.k_pairs, pitch, w.dq, pitch);
    for (int64_t i = 0; i < queries; ++i)
        store_row(s.d, w.dq + i * pitch, to_dq + ((b * s.time + begin + i) * s.heads + head) * s.d);
}

template <class T>
static void retained_task_backward(const RetainedInputs<T>& in, const RetainedFromAbove<T>& above,
                                   const RetainedGradients<T>& to, int64_t b, int64_t head,
                                   RetainedBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    for (int64_t c = 0; c < s.context(); ++c) {
        const int64_t at = (b * s.context() + c) * s.heads + head;
        memset(to.dk + at * s.d, 0, s.d * sizeof(T));
        memset(to.dv + at * s.d, 0, s.d * sizeof(T));
        to.dscore[at] = 0;
    }
    const int64_t kept = (b * s.heads + head) * in.slots;
    memset(to.dkept_k + kept * s.d, 0, in.slots * s.d * sizeof(T));
    memset(to.dkept_v + kept * s.d, 0, in.slots * s.d * sizeof(T));
    memset(to.dkept_score + kept, 0, in.slots * sizeof(float));
    memset(w.dk, 0, w.rows_at_most * w.pitch * sizeof(float));
    memset(w.dv, 0, w.rows_at_most * w.pitch * sizeof(float));
    memset(w.dbias, 0, w.rows_at_most * sizeof(float));
    const auto leave = [&](int64_t row) { retained_leave(in, to, b, head, row, w); };
    const auto move = [&](int64_t from, int64_t row) {
        memcpy(w.dk + row * w.pitch, w.dk + from * w.pitch, w.pitch * sizeof(float));
        memcpy(w.dv + row * w.pitch, w.dv + from * w.pitch, w.pitch * sizeof(float));
        w.dbias[row] = w.dbias[from];
        memset(w.dk + from * w.pitch, 0, w.pitch * sizeof(float));
        memset(w.dv + from * w.pitch, 0, w.pitch * sizeof(float));
        w.dbias[from] = 0;
    };
    fill_slots(in, b, head, w);
    for (int64_t begin = 0, end; begin < s.time; begin = end) {
        end = run_end(s, b, begin);
        if (s.at(b, begin) == 0) empty_slots(in, w, leave);
        retained_run_backward(in, above, to.dq, b, head, begin, end, w);
        settle(in, b, head, begin, end, w, leave, move);
    }
    empty_slots(in, w, leave);
}

template <class T>
static int retained_attention_backward(const RetainedInputs<T>& in, const RetainedFromAbove<T>& above,
                                       const RetainedGradients<T>& to, int threads) {
    return for_each_head(in.shape, in.work(), threads, make_zeroed<RetainedBackwardScratch<T>>(in),
                         [&](int64_t b, int64_t head, RetainedBackwardScratch<T>& w) {
                             retained_task_backward(in, above, to, b, head, w);
                         });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
