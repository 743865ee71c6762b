// Softmax attention over the pairs that a head has kept of the tokens that have left the window. It goes on with the softmax
// that the window began (window_attention.h): the result of both is that of one softmax. One task is one head of one
// sequence.
//
// Queries go in runs of RUN tokens. What a run may see are the pairs in the slots at its beginning and those that come in
// while it lasts; each is a row with the span of queries that see it. Scores are kept transposed, a row per pair and a column
// per query, as in window_attention.h.
#pragma once

#include "window_attention.h"

extern "C" {
float expf(float);
}

namespace mm_rec {
namespace MM_LEVEL {

template <class T>
struct RetainedInputs {
    ContextShape shape;
    int64_t slots;
    HeadRows<const T> q, k, v;          // (batch, time, heads, d) and (batch, context, heads, d)
    const float* score;                 // (batch, context, heads), added to the logits
    const int32_t *slot, *held;         // of retain
    const T *kept_k, *kept_v;           // (batch, heads, slots, d), what the slots hold at the beginning
    const float* kept_score;            // (batch, heads, slots)

    int64_t work() const { return shape.batch * shape.heads * shape.time * (slots + RUN) * shape.d * 2; }
    int64_t head(int64_t b, int64_t head) const { return b * shape.heads + head; }
    const float& score_of(int64_t b, int64_t head, int64_t owner) const {
        return owner < slots ? kept_score[this->head(b, head) * slots + owner]
                             : score[(b * shape.context() + owner - slots) * shape.heads + head];
    }
};

// Buffers of one task; letters and layouts as in AttentionScratch.
template <class T>
struct RetainedScratch {
    typedef typename Operand<T>::Cell Cell;
    typedef typename Operand<T>::Element Element;
    static constexpr int64_t depth = DEPTH<Cell>;

    int64_t pitch, rows_at_most;
    Element *k, *v, *q, *weight_rows;
    Cell *v_pairs, *weight_pairs, *q_columns;
    float *scores, *out, *line, *top, *sums;
    float* bias;                                // of each row, its score
    int32_t *owner, *first, *end, *leaves;      // where a row comes from, as in Retained::held; the queries that see it;
                                                // of each slot, the query from which on its pair is gone
    int64_t rows = 0, visible = 0;              // those of the run: whole blocks, those that are seen

    RetainedScratch(const RetainedInputs<T>& in, Parts& parts)
        : pitch(in.shape.pitch()), rows_at_most(round_up(in.slots + RUN, BLOCK)) {
        k = elements(rows_at_most, parts);
        v = elements(rows_at_most, parts);
        q = elements(RUN, parts);
        scores = parts.take(rows_at_most * RUN);
        weight_rows = depth == 1 ? reinterpret_cast<Element*>(scores)
                                 : reinterpret_cast<Element*>(parts.take(rows_at_most * RUN / depth + W));
        out = parts.take(RUN * pitch);
        line = parts.take(pitch);
        top = parts.take(RUN);
        sums = parts.take(RUN);
        bias = parts.take(rows_at_most);
        v_pairs = pairs(v, rows_at_most, pitch, parts);
        weight_pairs = pairs(weight_rows, rows_at_most, RUN, parts);
        q_columns = reinterpret_cast<Cell*>(parts.take(pitch * RUN));
        owner = places(rows_at_most, parts);
        first = places(rows_at_most, parts);
        end = places(rows_at_most, parts);
        leaves = places(in.slots, parts);
    }
    Element* elements(int64_t n, Parts& parts) {
        return reinterpret_cast<Element*>(parts.take(n * pitch / depth + W));  // a transposition reads whole vectors
    }
    static Cell* pairs(Element* same, int64_t n, int64_t pitch, Parts& parts) {
        return reinterpret_cast<Cell*>(depth == 1 ? reinterpret_cast<float*>(same) : parts.take((n + 1) / 2 * pitch));
    }
    static int32_t* places(int64_t n, Parts& parts) { return reinterpret_cast<int32_t*>(parts.take(n)); }
    int64_t cells(int64_t n) const { return (n + depth - 1) / depth; }
    static const Cell* as_cells(const Element* rows) { return reinterpret_cast<const Cell*>(rows); }
};

// A row of the run, unless no query sees it.
template <class T>
static void add_row(const RetainedInputs<T>& in, int64_t b, int64_t head, int64_t owner, int64_t first, int64_t end,
                    RetainedScratch<T>& w) {
    if (first >= end) return;
    const ContextShape& s = in.shape;
    const int64_t row = w.visible++, kept = (in.head(b, head) * in.slots + owner) * s.d, c = owner - in.slots;
    const bool was_kept = owner < in.slots;
    store_row(s.d, was_kept ? in.kept_k + kept : in.k.at(b, c, 0, head, s.d), w.k + row * w.pitch);
    store_row(s.d, was_kept ? in.kept_v + kept : in.v.at(b, c, 0, head, s.d), w.v + row * w.pitch);
    w.bias[row] = in.score_of(b, head, owner);
    w.owner[row] = int32_t(owner);
    w.first[row] = int32_t(first);
    w.end[row] = int32_t(end);
}

// The rows of the run of tokens [begin, end), and the queries; false if no query sees any.
template <class T>
static bool gather_run(const RetainedInputs<T>& in, int64_t b, int64_t head, int64_t begin, int64_t end,
                       RetainedScratch<T>& w) {
    const ContextShape& s = in.shape;
    const int64_t at = in.head(b, head), runs = (s.time + RUN - 1) / RUN;
    const int32_t *slot = in.slot + at * s.time, *held = in.held + (at * (runs + 1) + begin / RUN) * in.slots;
    w.visible = 0;
    for (int64_t j = 0; j < in.slots; ++j) w.leaves[j] = int32_t(end - begin);
    for (int64_t t = end - 1; t >= begin; --t) {  // backwards, so that it is known when the next one takes the slot
        if (slot[t] >= 0) {
            add_row(in, b, head, in.slots + t, t - begin, w.leaves[slot[t]], w);
            w.leaves[slot[t]] = int32_t(t - begin);
        }
        if (s.at(b, t) == 0)
            for (int64_t j = 0; j < in.slots; ++j) w.leaves[j] = int32_t(t - begin);
    }
    for (int64_t j = 0; j < in.slots; ++j)
        if (held[j] >= 0) add_row(in, b, head, held[j], 0, w.leaves[j], w);
    if (w.visible == 0) return false;
    w.rows = round_up(w.visible, BLOCK);
    for (int64_t row = w.visible; row < w.rows; ++row) w.first[row] = w.end[row] = 0;
    memset(w.k + w.visible * w.pitch, 0, (w.rows - w.visible) * w.pitch * sizeof *w.k);
    memset(w.v + w.visible * w.pitch, 0, (w.rows - w.visible) * w.pitch * sizeof *w.v);
    pack_pairs(w.rows, w.pitch, w.v, w.v_pairs);
    for (int64_t t = begin; t < end; ++t)
        store_row(s.d, in.q.at(b, t, s.time, head, s.d), w.q + (t - begin) * w.pitch);
    transpose(end - begin, w.cells(s.d), w.as_cells(w.q), w.pitch / w.depth, w.q_columns, RUN);
    return true;
}

// Scores of `queries` queries, in whole blocks, masked with -inf.
template <class T>
static void retained_scores(const RetainedInputs<T>& in, int64_t queries, RetainedScratch<T>& w) {
    const int64_t columns = round_up(queries, BLOCK);
    product<false>(w.rows, columns, w.cells(in.shape.d), w.as_cells(w.k), w.pitch / w.depth, 1, w.q_columns, RUN, w.scores,
                   RUN);
    for (int64_t r = 0; r < w.rows; ++r) {
        float* row = w.scores + r * RUN;
        for (int64_t i = w.first[r]; i < w.end[r]; ++i) row[i] += w.bias[r];
        fill(row, 0, w.first[r], -__builtin_inff());
        fill(row, w.end[r], columns, -__builtin_inff());
    }
}

// Scores to exponentials, less the highest of a query's pairs and of its window's denominator: into `top`; their sums.
template <class T>
static void retained_softmax(int64_t queries, const float* lse, RetainedScratch<T>& w) {
    constexpr int64_t depth = RetainedScratch<T>::depth;
    for (int64_t i = 0; i < queries; i += W) {
        vf top = load(lse + i, queries - i), total = {};
        for (int64_t r = 0; r < w.rows; ++r) top = max(load(w.scores + r * RUN + i), top);
        for (int64_t r = 0; r < w.rows; r += depth) {
            vf e[depth];
            for (int64_t j = 0; j < depth; ++j) {
                e[j] = exp(load(w.scores + (r + j) * RUN + i) - top);
                total += e[j];
            }
            if (depth == 1)
                store(w.scores + r * RUN + i, e[0]);
            else
                store_pairs(e[0], e[depth - 1], w.weight_pairs + r / 2 * RUN + i);
        }
        store(w.top + i, top);
        store(w.sums + i, total);
    }
}

template <class T>
static void retained_task(const RetainedInputs<T>& in, int64_t b, int64_t head, T* out, float* lse,
                          RetainedScratch<T>& w) {
    const ContextShape& s = in.shape;
    for (int64_t begin = 0; begin < s.time; begin += RUN) {
        const int64_t end = min64(begin + RUN, s.time), queries = end - begin;
        if (!gather_run(in, b, head, begin, end, w)) continue;
        float* denominator = lse + in.head(b, head) * s.time + begin;
        retained_scores(in, queries, w);
        retained_softmax(queries, denominator, w);
        product<false>(queries, w.pitch, w.rows / w.depth, w.weight_pairs, 1, RUN, w.v_pairs, w.pitch, w.out, w.pitch);
        for (int64_t i = 0; i < queries; ++i) {
            T* to = out + ((b * s.time + begin + i) * s.heads + head) * s.d;
            const float near = expf(denominator[i] - w.top[i]), whole = near + w.sums[i];
            const vf keep = splat(near / whole), add = splat(1.0f / whole);
            for (int64_t j = 0; j < s.d; j += W)
                store(to + j, load(to + j, s.d - j) * keep + load(w.out + i * w.pitch + j) * add, s.d - j);
            denominator[i] = w.top[i] + logf(whole);
        }
    }
}

// Makes the buffers of a thread, all of them 0.
template <class Buffers, class T>
static auto make_zeroed(const RetainedInputs<T>& in) {
    return [&in](Parts& parts) {
        const Buffers buffers(in, parts);
        if (parts.base) memset(parts.base, 0, parts.used * sizeof(float));
        return buffers;
    };
}

// out (batch, time, heads, d) and lse (batch, heads, time): what the window gave, and then what both give.
template <class T>
static int retained_attention(const RetainedInputs<T>& in, T* out, float* lse, int threads) {
    return for_each_head(in.shape, in.work(), threads, make_zeroed<RetainedScratch<T>>(in),
                         [&](int64_t b, int64_t head, RetainedScratch<T>& w) {
                             retained_task(in, b, head, out, lse, w);
                         });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
