// Backward pass of attention over kept pairs: weights are had again from the scores and the denominators of the whole
// softmax. What a pair gets from the runs that see it is gathered in float32, in their order.
#pragma once

#include "retained_attention.h"
#include "window_attention_backward.h"

namespace mm_rec {
namespace MM_LEVEL {

// Gradients of the inputs, in their shapes. To dq, dk and dv, which hold those of the window, they are added.
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

    float *dk, *dv, *dbias;  // of what may be kept, by owner
    float *dk_rows, *dv_rows, *dq, *dscores;
    Element *dout, *dscore_rows;
    Cell *k_pairs, *q_pairs, *dout_pairs, *dscore_pairs, *dout_columns;
    bool* kept;  // by owner: whether any query saw it

    RetainedBackwardScratch(const RetainedInputs<T>& in, Parts& parts) : RetainedScratch<T>(in, parts) {
        const int64_t pitch = this->pitch, rows = this->rows_at_most, depth = this->depth, owners = this->owners(in);
        dk = parts.take(owners * pitch);
        dv = parts.take(owners * pitch);
        dbias = parts.take(owners);
        dk_rows = parts.take(rows * pitch);
        dv_rows = parts.take(rows * pitch);
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
        kept = reinterpret_cast<bool*>(parts.take((owners + 3) / 4));
    }
    static int64_t owners(const RetainedInputs<T>& in) { return in.slots + in.shape.time; }
};

// What comes to the weights of a run, into dscores, and dout . out into sums.
template <class T>
static void retained_weights_backward(const RetainedInputs<T>& in, const AttentionFromAbove<T>& above, int64_t b,
                                      int64_t head, int64_t begin, int64_t queries, RetainedBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    load_from_above(s, b, head, begin, queries, above, w);
    product<false>(w.rows, round_up(queries, BLOCK), w.cells(s.d), w.as_cells(w.v), w.pitch / w.depth, 1, w.dout_columns,
                   RUN, w.dscores, RUN);
}

// Scores to weights and dscores = weight * (dweight - sums), as rows and as cells; their sums over queries into dbias.
template <class T>
static void retained_softmax_backward(int64_t queries, const float* lse, RetainedBackwardScratch<T>& w) {
    constexpr int64_t depth = RetainedScratch<T>::depth;
    for (int64_t i = 0; i < round_up(queries, BLOCK); i += W) {
        const vf log_sum = load(lse + i, queries - i), pull = load(w.sums + i);
        for (int64_t r = 0; r < w.rows; r += depth) {
            vf dscore[depth];
            for (int64_t j = 0; j < depth; ++j) {
                const int64_t at = (r + j) * RUN + i;
                const vf weight = exp(load(w.scores + at) - log_sum);
                dscore[j] = weight * (load(w.dscores + at) - pull);
                if (r + j < w.visible) w.dbias[w.owner[r + j]] += sum(dscore[j]);
                store(w.weight_rows + at, weight);
                store(w.dscore_rows + at, dscore[j]);
            }
            store_pairs(dscore[0], dscore[depth - 1], w.dscore_pairs + r / 2 * RUN + i);
        }
    }
}

MM_INLINE void add_to_row(int64_t n, const float* x, float* sum) {
    for (int64_t i = 0; i < n; i += W) store(sum + i, load(sum + i) + load(x + i));
}

// The first d elements of a row += x.
template <class T>
MM_INLINE void add_row_to(int64_t d, const float* x, T* to) {
    for (int64_t i = 0; i < d; i += W) store(to + i, load(to + i, d - i) + load(x + i), d - i);
}

template <class T>
static void retained_run_backward(const RetainedInputs<T>& in, const AttentionFromAbove<T>& above, T* to_dq, int64_t b,
                                  int64_t head, int64_t begin, int64_t end, RetainedBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    const int64_t pitch = w.pitch, queries = end - begin, cells = w.cells(queries), row = RUN / w.depth;
    if (!gather_run(in, b, head, begin, end, w)) return;
    retained_scores(in, queries, w);
    retained_weights_backward(in, above, b, head, begin, queries, w);
    retained_softmax_backward(queries, above.lse + in.head(b, head) * s.time + begin, w);
    pack_pairs(queries, pitch, w.q, w.q_pairs);
    pack_pairs(w.rows, pitch, w.k, w.k_pairs);
    product<false>(w.rows, pitch, cells, w.as_cells(w.weight_rows), row, 1, w.dout_pairs, pitch, w.dv_rows, pitch);
    product<false>(w.rows, pitch, cells, w.as_cells(w.dscore_rows), row, 1, w.q_pairs, pitch, w.dk_rows, pitch);
    product<false>(queries, pitch, w.rows / w.depth, w.dscore_pairs, 1, RUN, w.k_pairs, pitch, w.dq, pitch);
    for (int64_t r = 0; r < w.visible; ++r) {
        add_to_row(pitch, w.dk_rows + r * pitch, w.dk + w.owner[r] * pitch);
        add_to_row(pitch, w.dv_rows + r * pitch, w.dv + w.owner[r] * pitch);
        w.kept[w.owner[r]] = true;
    }
    for (int64_t i = 0; i < queries; ++i)
        add_row_to(s.d, w.dq + i * pitch, to_dq + ((b * s.time + begin + i) * s.heads + head) * s.d);
}

template <class T>
static void retained_task_backward(const RetainedInputs<T>& in, const AttentionFromAbove<T>& above,
                                   const RetainedGradients<T>& to, int64_t b, int64_t head,
                                   RetainedBackwardScratch<T>& w) {
    const ContextShape& s = in.shape;
    const int64_t owners = w.owners(in), pitch = w.pitch;
    memset(w.dk, 0, owners * pitch * sizeof(float));
    memset(w.dv, 0, owners * pitch * sizeof(float));
    memset(w.dbias, 0, owners * sizeof(float));
    memset(w.kept, 0, owners);
    for (int64_t begin = 0; begin < s.time; begin += RUN)
        retained_run_backward(in, above, to.dq, b, head, begin, min64(begin + RUN, s.time), w);
    for (int64_t j = 0; j < in.slots; ++j) {
        const int64_t at = in.head(b, head) * in.slots + j;
        store_row(s.d, w.dk + j * pitch, to.dkept_k + at * s.d);
        store_row(s.d, w.dv + j * pitch, to.dkept_v + at * s.d);
        to.dkept_score[at] = w.dbias[j];
    }
    for (int64_t c = 0; c < s.context(); ++c) {
        const int64_t at = (b * s.context() + c) * s.heads + head, owner = in.slots + c;
        to.dscore[at] = c < s.time ? w.dbias[owner] : 0.0f;
        if (c >= s.time || !w.kept[owner]) continue;
        add_row_to(s.d, w.dk + owner * pitch, to.dk + at * s.d);
        add_row_to(s.d, w.dv + owner * pitch, to.dv + at * s.d);
    }
}

template <class T>
static int retained_attention_backward(const RetainedInputs<T>& in, const AttentionFromAbove<T>& above,
                                       const RetainedGradients<T>& to, int threads) {
    return for_each_head(in.shape, in.work(), threads, make_zeroed<RetainedBackwardScratch<T>>(in),
                         [&](int64_t b, int64_t head, RetainedBackwardScratch<T>& w) {
                             retained_task_backward(in, above, to, b, head, w);
                         });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
