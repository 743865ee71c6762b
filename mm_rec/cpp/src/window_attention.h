// Softmax attention over a window of recent tokens; one task is one head of one sequence.
//
// Queries go in runs of up to RUN consecutive tokens of one document. All that a run can see are rows of the context.
// Scores are kept transposed, a row per key and a column per query, so that the softmax is plain arithmetic across
// queries and no buffer is larger than (W + RUN) x RUN. Of its rows, a query sees a band: blocks of keys and queries that
// don't see each other are neither multiplied nor written.
//
// Matrix products take elements and cells (product.h), everything else is float32. Where cells are pairs of rows, a
// run's rows begin and end at an even one, and what it must not see in them is masked.
#pragma once

#include "retain.h"

extern "C" {
float logf(float);
}

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t BLOCK = 16;

template <class T>
struct AttentionInputs {
    ContextShape shape;
    HeadRows<const T> q, k, v;   // (batch, time, heads, d) and (batch, context, heads, d)
    const float *cosine, *sine;  // (context, d / 2)

    // A rough count of multiplications: reading all rows once, and every query's scores.
    int64_t work() const {
        const ContextShape& s = shape;
        return s.batch * s.heads * s.d * (2 * s.context() + 2 * s.time * s.window);
    }
    bool valid() const {
        for (int64_t i = 0; i < shape.batch * shape.time; ++i)
            if (shape.position[i] < 0) return false;
        return true;
    }
};

// to = x with its two halves rotated by the angles whose cosines and sines are given. The gradient is the rotation
// back: sign = -1. May be in place.
template <class T>
MM_INLINE void rotate_row(int64_t d, const float* cosine, const float* sine, float sign, const float* x, T* to) {
    const int64_t half = d / 2;
    for (int64_t i = 0; i < half; i += W) {
        const int64_t left = half - i;
        const vf c = load(cosine + i, left), s = load(sine + i, left) * sign;
        const vf first = load(x + i, left), second = load(x + half + i, left);
        store(to + i, first * c - second * s, left);
        store(to + half + i, first * s + second * c, left);
    }
}

// Tokens [begin, end) of the chunk and what they see.
struct Run {
    int64_t begin, end;
    int64_t first_key;        // the first row of the context that any of them sees
    int64_t key_begin, keys;  // rows [key_begin, key_begin + keys) of the context, whole cells
    int64_t window;
    int64_t queries() const { return end - begin; }
    int64_t blocks() const { return (queries() + BLOCK - 1) / BLOCK; }

    // The rows of its keys, in whole blocks, that any of queries [block * BLOCK, (block + 1) * BLOCK) sees.
    Span rows_of(int64_t block) const {
        const int64_t first = begin + block * BLOCK + 1, last = min64(end, begin + (block + 1) * BLOCK) + window;
        return {max64(first - key_begin, 0) / BLOCK * BLOCK, min64(round_up(last - key_begin, BLOCK), keys)};
    }
    // Calls body(row, n, queries) for every block of n rows of its keys with the queries, in whole blocks, that see any.
    template <class F>
    void for_blocks(F body) const {
        for (int64_t row = 0; row < keys; row += BLOCK) {
            int64_t first = 0, last = blocks();
            while (first < last && rows_of(first).end <= row) ++first;
            while (last > first && rows_of(last - 1).begin > row) --last;
            body(row, min64(BLOCK, keys - row), Span{first * BLOCK, last * BLOCK});
        }
    }
    // Calls body(queries, row, n) for every block of queries with the n rows of its keys that they see.
    template <class F>
    void for_queries(F body) const {
        for (int64_t block = 0; block < blocks(); ++block) {
            const Span rows = rows_of(block);
            body(Span{block * BLOCK, min64(queries(), (block + 1) * BLOCK)}, rows.begin, rows.end - rows.begin);
        }
    }
};

// The run that starts at token `begin`.
static Run next_run(const ContextShape& s, int64_t b, int64_t begin, int64_t depth) {
    Run run;
    run.begin = begin;
    run.window = s.window;
    int64_t t = begin + 1;
    while (t < s.time && t < begin + RUN && s.at(b, t) == s.at(b, t - 1) + 1) ++t;
    run.end = t;
    run.first_key = max64(max64(begin + 1, s.window + begin - s.at(b, begin)), 0);
    run.key_begin = run.first_key / depth * depth;
    run.keys = round_up(s.window + t - run.key_begin, depth);
    return run;
}

// Buffers of one task. Rows of d are `pitch` elements apart, rows of scores RUN. Of the operands, `_rows` are as in
// memory, `_pairs` are rows of B and `_columns` are transposed; with floats as cells, pairs are the rows themselves.
template <class T>
struct AttentionScratch {
    typedef typename Operand<T>::Cell Cell;
    typedef typename Operand<T>::Element Element;
    static constexpr int64_t depth = DEPTH<Cell>;

    int64_t pitch, scored;         // scored: rows of scores at most
    Element *k, *v;                // (context + 1, pitch): rotated keys, values, a row of zeros
    Element* q;                    // (RUN, pitch), rotated
    Element* score_rows;           // (scored, RUN): weights
    Cell *v_pairs, *score_pairs;
    Cell* q_columns;               // (d / depth, RUN)
    float *scores, *out, *line;    // (scored, RUN), (RUN, pitch), (pitch)
    float* sums;                   // (RUN)

    AttentionScratch(const ContextShape& s, Parts& parts) : pitch(s.pitch()), scored(s.window + RUN + 4) {
        k = rows(s.context() + 1, pitch, parts);
        v = rows(s.context() + 1, pitch, parts);
        q = rows(RUN, pitch, parts);
        scores = parts.take(scored * RUN);
        out = parts.take(RUN * pitch);
        line = parts.take(pitch);
        sums = parts.take(RUN);
        score_rows = narrowed(scores, scored, RUN, parts);
        v_pairs = paired(v, s.context() + 1, pitch, parts);
        score_pairs = paired(score_rows, scored, RUN, parts);
        q_columns = reinterpret_cast<Cell*>(parts.take(pitch * RUN));
    }

    static Element* rows(int64_t n, int64_t pitch, Parts& parts) {
        return reinterpret_cast<Element*>(parts.take(n * pitch / depth + W));  // a transposition reads whole vectors
    }
    // Rows of elements beside rows of floats, and rows of B beside rows of elements: the same where types are.
    static Element* narrowed(float* same, int64_t n, int64_t pitch, Parts& parts) {
        return depth == 1 ? reinterpret_cast<Element*>(same) : rows(n, pitch, parts);
    }
    static Cell* paired(Element* same, int64_t n, int64_t pitch, Parts& parts) {
        return reinterpret_cast<Cell*>(depth == 1 ? reinterpret_cast<float*>(same) : parts.take((n + 1) / 2 * pitch));
    }

    static int64_t cells(int64_t n) { return (n + depth - 1) / depth; }  // that n elements take
    static const Cell* as_cells(const Element* rows) { return reinterpret_cast<const Cell*>(rows); }
};

template <class T>
static void attention_context(const AttentionInputs<T>& in, int64_t b, int64_t head, AttentionScratch<T>& w) {
    const ContextShape& s = in.shape;
    for (int64_t c = 0; c < s.context(); ++c) {
        load_row(s.d, in.k.at(b, c, s.context(), head, s.d), w.line);
        rotate_row(s.d, in.cosine + c * (s.d / 2), in.sine + c * (s.d / 2), 1, w.line, w.k + c * w.pitch);
        store_row(s.d, in.v.at(b, c, s.context(), head, s.d), w.v + c * w.pitch);
    }
    memset(w.k + s.context() * w.pitch, 0, w.pitch * sizeof *w.k);
    memset(w.v + s.context() * w.pitch, 0, w.pitch * sizeof *w.v);
    pack_pairs(s.context() + 1, w.pitch, w.v, w.v_pairs);
}

template <class T>
static void attention_queries(const AttentionInputs<T>& in, const Run& run, int64_t b, int64_t head,
                              AttentionScratch<T>& w) {
    const ContextShape& s = in.shape;
    for (int64_t i = 0; i < run.queries(); ++i) {
        const int64_t t = run.begin + i, angle = (s.window + t) * (s.d / 2);
        load_row(s.d, in.q.at(b, t, s.time, head, s.d), w.line);
        rotate_row(s.d, in.cosine + angle, in.sine + angle, 1, w.line, w.q + i * w.pitch);
    }
    transpose(run.queries(), w.cells(s.d), w.as_cells(w.q), w.pitch / w.depth, w.q_columns, RUN);
}

MM_INLINE void fill(float* x, int64_t begin, int64_t end, float value) {
    for (int64_t i = begin; i < end; ++i) x[i] = value;
}

// Scores of a run, a row per key, masked with -inf.
template <class T>
static void attention_scores(const ContextShape& s, const Run& run, AttentionScratch<T>& w) {
    const int64_t depth = w.cells(s.d), row = w.pitch / w.depth;
    run.for_blocks([&](int64_t begin, int64_t rows, Span queries) {
        product<false>(rows, queries.end - queries.begin, depth, w.as_cells(w.k + (run.key_begin + begin) * w.pitch), row,
                       1, w.q_columns + queries.begin, RUN, w.scores + begin * RUN + queries.begin, RUN);
        for (int64_t r = begin; r < begin + rows; ++r) {  // query i sees rows (begin + i, window + begin + i] of the context
            const int64_t key = run.key_begin + r;
            const int64_t first = key < run.first_key ? queries.end : min64(key - s.window - run.begin, queries.end);
            fill(w.scores + r * RUN, queries.begin, first, -__builtin_inff());
            fill(w.scores + r * RUN, max64(key - run.begin, queries.begin), queries.end, -__builtin_inff());
        }
    });
}

// Scores to exponentials, as cells of score_pairs; sums (columns) of them, and the log of the softmax's denominators to
// lse.
template <class T>
static void attention_softmax(const Run& run, float* lse, AttentionScratch<T>& w) {
    constexpr int64_t depth = AttentionScratch<T>::depth;
    run.for_queries([&](Span queries, int64_t row, int64_t count) {
        for (int64_t i = queries.begin; i < queries.end; i += W) {
            vf top = load(w.scores + row * RUN + i), total = {};
            for (int64_t r = row + 1; r < row + count; ++r) top = max(load(w.scores + r * RUN + i), top);
            for (int64_t r = row; r < row + count; r += depth) {
                vf e[depth];
                for (int64_t j = 0; j < depth; ++j) {
                    e[j] = exp(load(w.scores + (r + j) * RUN + i) - top);
                    total += e[j];
                }
                if (depth == 1)
                    store(w.scores + r * RUN + i, e[0]);
                else
                    store_pairs(e[0], e[depth - 1], w.score_pairs + r / 2 * RUN + i);
            }
            store(w.sums + i, total);
            for (int64_t lane = i; lane < min64(i + W, queries.end); ++lane)
                lse[lane] = logf(w.sums[lane]) + top[lane - i];
        }
    });
}

template <class T>
static void attention_task(const AttentionInputs<T>& in, int64_t b, int64_t head, T* out, float* lse,
                           AttentionScratch<T>& w) {
    const ContextShape& s = in.shape;
    attention_context(in, b, head, w);
    Run run{};
    while (run.end < s.time) {
        run = next_run(s, b, run.end, w.depth);
        attention_queries(in, run, b, head, w);
        attention_scores(s, run, w);
        attention_softmax(run, lse + (b * s.heads + head) * s.time + run.begin, w);
        run.for_queries([&](Span some, int64_t row, int64_t count) {
            product<false>(some.end - some.begin, w.pitch, count / w.depth,
                           w.score_pairs + row / w.depth * RUN + some.begin, 1, RUN,
                           w.v_pairs + (run.key_begin + row) / w.depth * w.pitch, w.pitch, w.out + some.begin * w.pitch,
                           w.pitch);
        });
        for (int64_t i = 0; i < run.queries(); ++i)
            store_row(s.d, w.out + i * w.pitch, out + ((b * s.time + run.begin + i) * s.heads + head) * s.d,
                      1.0f / w.sums[i]);
    }
}

// out (batch, time, heads, d) and lse (batch, heads, time), contiguous.
template <class T>
static int window_attention(const AttentionInputs<T>& in, T* out, float* lse, int threads) {
    if (!in.valid()) return KERNEL_BAD_POSITION;
    return for_each_head(in.shape, in.work(), threads, make_padded<AttentionScratch<T>>(in.shape),
                         [&](int64_t b, int64_t head, AttentionScratch<T>& w) { attention_task(in, b, head, out, lse, w); });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
