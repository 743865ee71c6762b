// The long-term memory: pairs of keys and values that a head keeps of the tokens that have left the window, and
// softmax attention over them. One task is one head of one sequence.
//
// A head has a fixed number of slots. `retain` decides which token takes which slot when it leaves the window;
// attention then reads runs of up to RUN queries of one document. What a run may see are the pairs in the slots at its
// beginning and those that come in while it lasts; each is a row with the span of queries that see it. Scores are kept
// transposed, a row per pair and a column per query, as in window_attention.h.
#pragma once

#include "window_attention.h"

namespace mm_rec {
namespace MM_LEVEL {

// The place of the lowest of n scores, the first of equal ones.
MM_INLINE int64_t lowest(int64_t n, const float* scores) {
    int64_t at = 0;
    for (int64_t j = 1; j < n; ++j)
        if (scores[j] < scores[at]) at = j;
    return at;
}

// Inputs of retain: score (batch, window + time, heads), kept (batch, heads, slots), -inf for an empty slot.
struct RetainInputs {
    ContextShape shape;
    int64_t slots;
    const float *score, *kept;
};

// Results: slot (batch, heads, time), which slot the token takes that leaves the window then, or -1; source (batch,
// heads, slots), where the pair in each slot at the end comes from: j < slots is slot j at the beginning, slots + c row
// c of the context; and the scores at the end.
struct Retained {
    int32_t* slot;
    int64_t* source;
    float* kept;
};

static void retain_task(const RetainInputs& in, const Retained& to, int64_t b, int64_t head) {
    const ContextShape& s = in.shape;
    const int64_t at = b * s.heads + head;
    float* kept = to.kept + at * in.slots;
    int64_t* source = to.source + at * in.slots;
    memcpy(kept, in.kept + at * in.slots, in.slots * sizeof(float));
    for (int64_t j = 0; j < in.slots; ++j) source[j] = j;
    int64_t last = lowest(in.slots, kept);
    for (int64_t t = 0; t < s.time; ++t) {
        const int64_t position = s.at(b, t);
        int32_t taken = -1;
        if (position == 0) {
            for (int64_t j = 0; j < in.slots; ++j) kept[j] = -__builtin_inff();
            last = 0;
        }
        const float score = in.score[(b * s.context() + t) * s.heads + head];
        if (position >= s.window && score > kept[last]) {
            taken = int32_t(last);
            kept[last] = score;
            source[last] = in.slots + t;
            last = lowest(in.slots, kept);
        }
        to.slot[at * s.time + t] = taken;
    }
}

static int retain(const RetainInputs& in, const Retained& to, int threads) {
    const ContextShape& s = in.shape;
    for (int64_t i = 0; i < s.batch * s.time; ++i)
        if (s.position[i] < 0) return KERNEL_BAD_POSITION;
    const auto none = [](Parts&) { return 0; };
    return for_each_head(s, s.batch * s.heads * s.time * 16, threads, none,
                         [&](int64_t b, int64_t head, int) { retain_task(in, to, b, head); });
}

template <class T>
struct RetainedInputs {
    ContextShape shape;
    int64_t slots;
    HeadRows<const T> q, k, v;     // (batch, time, heads, d) and (batch, context, heads, d)
    const float* score;            // (batch, context, heads), at most 0: added to the logits
    const int32_t* slot;           // of retain
    const T *kept_k, *kept_v;      // (batch, heads, slots, d), what the slots hold at the beginning
    const float* kept_score;       // (batch, heads, slots)

    int64_t work() const {
        return shape.batch * shape.heads * shape.time * (slots + RUN) * shape.d * 2;
    }
};

// Buffers of one task; letters and layouts as in AttentionScratch. The first `slots` rows are the slots, those from
// `entering` on the pairs that come in while a run lasts.
template <class T>
struct RetainedScratch {
    typedef typename Operand<T>::Cell Cell;
    typedef typename Operand<T>::Element Element;
    static constexpr int64_t depth = DEPTH<Cell>;

    int64_t pitch, entering, rows_at_most;
    Element *k, *v, *q, *weight_rows;
    Cell *v_pairs, *weight_pairs, *q_columns;
    float *scores, *out, *line, *sums;
    float* bias;                      // of each row, -inf for an empty slot
    int64_t *first, *end, *owner;     // the queries that see a row; where its pair comes from, as Retained::source
    int64_t rows;                     // those of the run, whole blocks

    RetainedScratch(const RetainedInputs<T>& in, Parts& parts)
        : pitch(in.shape.pitch()), entering(round_up(in.slots, BLOCK)), rows_at_most(entering + RUN), rows(0) {
        k = elements(rows_at_most, parts);
        v = elements(rows_at_most, parts);
        q = elements(RUN, parts);
        scores = parts.take(rows_at_most * RUN);
        weight_rows = depth == 1 ? reinterpret_cast<Element*>(scores)
                                 : reinterpret_cast<Element*>(parts.take(rows_at_most * RUN / depth + W));
        out = parts.take(RUN * pitch);
        line = parts.take(pitch);
        sums = parts.take(RUN);
        bias = parts.take(rows_at_most);
        v_pairs = pairs(v, rows_at_most, pitch, parts);
        weight_pairs = pairs(weight_rows, rows_at_most, RUN, parts);
        q_columns = reinterpret_cast<Cell*>(parts.take(pitch * RUN));
        first = places(parts);
        end = places(parts);
        owner = places(parts);
    }
    Element* elements(int64_t n, Parts& parts) {
        return reinterpret_cast<Element*>(parts.take(n * pitch / depth + W));  // a transposition reads whole vectors
    }
    static Cell* pairs(Element* same, int64_t n, int64_t pitch, Parts& parts) {
        return reinterpret_cast<Cell*>(depth == 1 ? reinterpret_cast<float*>(same) : parts.take((n + 1) / 2 * pitch));
    }
    int64_t* places(Parts& parts) { return reinterpret_cast<int64_t*>(parts.take(2 * rows_at_most)); }
    int64_t cells(int64_t n) const { return (n + depth - 1) / depth; }
    static const Cell* as_cells(const Element* rows) { return reinterpret_cast<const Cell*>(rows); }
};

// The slots as they are before the first token.
template <class T>
static void fill_slots(const RetainedInputs<T>& in, int64_t b, int64_t head, RetainedScratch<T>& w) {
    const int64_t d = in.shape.d, at = (b * in.shape.heads + head) * in.slots;
    memset(w.k, 0, w.rows_at_most * w.pitch * sizeof *w.k);
    memset(w.v, 0, w.rows_at_most * w.pitch * sizeof *w.v);
    for (int64_t j = 0; j < w.rows_at_most; ++j) {
        w.bias[j] = j < in.slots ? in.kept_score[at + j] : -__builtin_inff();
        w.owner[j] = j;
        if (j >= in.slots) continue;
        store_row(d, in.kept_k + (at + j) * d, w.k + j * w.pitch);
        store_row(d, in.kept_v + (at + j) * d, w.v + j * w.pitch);
    }
}

// The end of the run that starts at token `begin`.
static int64_t run_end(const ContextShape& s, int64_t b, int64_t begin) {
    int64_t t = begin + 1;
    while (t < s.time && t < begin + RUN && s.at(b, t) == s.at(b, t - 1) + 1) ++t;
    return t;
}

// The rows that queries [begin, end) may see, and the span of queries that see each; the queries.
template <class T>
static void gather_run(const RetainedInputs<T>& in, int64_t b, int64_t head, int64_t begin, int64_t end,
                       RetainedScratch<T>& w) {
    const ContextShape& s = in.shape;
    const int32_t* slot = in.slot + (b * s.heads + head) * s.time;
    for (int64_t j = 0; j < w.entering; ++j) {
        w.first[j] = 0;
        w.end[j] = w.bias[j] == -__builtin_inff() ? 0 : end - begin;
    }
    int64_t row = w.entering;
    for (int64_t t = begin; t < end; ++t) {
        load_row(s.d, in.q.at(b, t, s.time, head, s.d), w.line);
        store_row(s.d, w.line, w.q + (t - begin) * w.pitch);
        if (slot[t] < 0) continue;
        int64_t before = slot[t];  // the row that gives way
        for (int64_t other = w.entering; other < row; ++other)
            if (slot[w.owner[other] - in.slots] == slot[t]) before = other;
        w.end[before] = min64(w.end[before], t - begin);
        store_row(s.d, in.k.at(b, t, 0, head, s.d), w.k + row * w.pitch);
        store_row(s.d, in.v.at(b, t, 0, head, s.d), w.v + row * w.pitch);
        w.bias[row] = in.score[(b * s.context() + t) * s.heads + head];
        w.owner[row] = in.slots + t;
        w.first[row] = t - begin;
        w.end[row] = end - begin;
        ++row;
    }
    w.rows = round_up(row, BLOCK);
    for (; row < w.rows; ++row) w.first[row] = w.end[row] = 0;
    pack_pairs(w.rows, w.pitch, w.v, w.v_pairs);
    transpose(end - begin, w.cells(s.d), w.as_cells(w.q), w.pitch / w.depth, w.q_columns, RUN);
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

constexpr float NO_SCORE = -1e30f;  // stands for the highest score where there is none

template <class T>
static void retained_softmax(int64_t queries, float* lse, RetainedScratch<T>& w) {
    constexpr int64_t depth = RetainedScratch<T>::depth;
    for (int64_t i = 0; i < queries; i += W) {
        vf top = splat(NO_SCORE), total = {};
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
        store(w.sums + i, total);
        for (int64_t lane = i; lane < min64(i + W, queries); ++lane)
            lse[lane] = w.sums[lane] > 0 ? logf(w.sums[lane]) + top[lane - i] : -__builtin_inff();
    }
}

// The pairs that came in while the run lasted take their slots. `leave(row)` is told of each pair that gives way, and
// `move(from, to)` of each that goes to another row.
template <class T, class Leave, class Move>
static void settle(const RetainedInputs<T>& in, int64_t b, int64_t head, int64_t begin, int64_t end,
                   RetainedScratch<T>& w, Leave leave, Move move) {
    const int32_t* slot = in.slot + (b * in.shape.heads + head) * in.shape.time;
    int64_t row = w.entering;
    for (int64_t t = begin; t < end; ++t) {
        const int64_t j = slot[t];
        if (j < 0) continue;
        if (w.bias[j] != -__builtin_inff()) leave(j);
        memcpy(w.k + j * w.pitch, w.k + row * w.pitch, w.pitch * sizeof *w.k);
        memcpy(w.v + j * w.pitch, w.v + row * w.pitch, w.pitch * sizeof *w.v);
        w.bias[j] = w.bias[row];
        w.owner[j] = w.owner[row];
        move(row, j);
        ++row;
    }
}

// Empties the slots; `leave(row)` is told of each pair.
template <class T, class Leave>
static void empty_slots(const RetainedInputs<T>& in, RetainedScratch<T>& w, Leave leave) {
    for (int64_t j = 0; j < in.slots; ++j) {
        if (w.bias[j] != -__builtin_inff()) leave(j);
        w.bias[j] = -__builtin_inff();
    }
}

template <class T>
static void retained_task(const RetainedInputs<T>& in, int64_t b, int64_t head, T* out, float* lse,
                          RetainedScratch<T>& w) {
    const ContextShape& s = in.shape;
    fill_slots(in, b, head, w);
    for (int64_t begin = 0, end; begin < s.time; begin = end) {
        end = run_end(s, b, begin);
        if (s.at(b, begin) == 0) empty_slots(in, w, [](int64_t) {});
        gather_run(in, b, head, begin, end, w);
        const int64_t queries = end - begin;
        retained_scores(in, queries, w);
        retained_softmax(queries, lse + (b * s.heads + head) * s.time + begin, w);
        product<false>(queries, w.pitch, w.rows / w.depth, w.weight_pairs, 1, RUN, w.v_pairs, w.pitch, w.out, w.pitch);
        for (int64_t i = 0; i < queries; ++i)
            store_row(s.d, w.out + i * w.pitch, out + ((b * s.time + begin + i) * s.heads + head) * s.d,
                      w.sums[i] > 0 ? 1.0f / w.sums[i] : 0.0f);
        settle(in, b, head, begin, end, w, [](int64_t) {}, [](int64_t, int64_t) {});
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

// out (batch, time, heads, d), 0 where nothing is kept, and lse (batch, heads, time), -inf there.
template <class T>
static int retained_attention(const RetainedInputs<T>& in, T* out, float* lse, int threads) {
    return for_each_head(in.shape, in.work(), threads, make_zeroed<RetainedScratch<T>>(in),
                         [&](int64_t b, int64_t head, RetainedScratch<T>& w) {
                             retained_task(in, b, head, out, lse, w);
                         });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
