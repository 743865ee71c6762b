// One softmax over the window and the slots; one task is one head of one sequence.
//
// Queries go in runs of up to RUN consecutive tokens of one document that see the same version of the memory.
// All that a run can see are rows: its window first, then the slots. Scores are kept transposed, a row per key
// and a column per query, so that the softmax is plain arithmetic across queries and no buffer is larger than
// (W + RUN + S) x RUN. Of the window, a query sees a band: blocks of keys and queries that don't see each other are
// neither multiplied nor written.
//
// Matrix products take elements and cells (product.h), everything else is float32. Where cells are pairs of rows, a
// window begins and ends at an even row, and what it must not see in them is masked.
#pragma once

#include "memory.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t RUN = 64, BLOCK = 16;

struct Span {
    int64_t begin, end;
};

template <class T>
struct ReadInputs {
    MemoryShape shape;
    HeadRows<const T> q, k, v;   // (batch, time, heads, d) and (batch, context, heads, d)
    Memory<const float> memory;  // all versions
    const float *cosine, *sine;  // (context, d / 2)
};

// Tokens [begin, end) of the chunk and what they see.
struct Run {
    int64_t begin, end, version;
    int64_t first_key;        // the first row of the context that any of them sees
    int64_t key_begin, keys;  // rows [key_begin, key_begin + keys) of the context, whole cells
    bool slots;               // whether the long-term memory is read
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

// The run that starts at token `begin`, where `version` writes have happened before it.
static Run next_run(const MemoryShape& s, int64_t b, int64_t begin, int64_t version, int64_t depth) {
    Run run;
    run.begin = begin;
    run.window = s.window;
    run.version = version + s.writes(b, begin);
    run.slots = s.at(b, begin) >= s.window;
    int64_t t = begin + 1;
    while (t < s.time && t < begin + RUN && s.at(b, t) == s.at(b, t - 1) + 1 && !s.writes(b, t) &&
           (s.at(b, t) >= s.window) == run.slots)
        ++t;
    run.end = t;
    run.first_key = max64(max64(begin + 1, s.window + begin - s.at(b, begin)), 0);
    run.key_begin = run.first_key / depth * depth;
    run.keys = round_up(s.window + t - run.key_begin, depth);
    return run;
}

// Buffers of one task. Rows of d are `pitch` elements apart, rows of scores RUN. Of the operands, `_rows` are as in
// memory, `_pairs` are rows of B and `_columns` are transposed; with floats as cells, pairs are the rows themselves.
template <class T>
struct ReadScratch {
    typedef typename Operand<T>::Cell Cell;
    typedef typename Operand<T>::Element Element;
    static constexpr int64_t depth = DEPTH<Cell>;

    int64_t pitch, scored;                        // scored: rows of scores at most
    Element *k, *v;                               // (context + 1, pitch): rotated keys, values, a row of zeros
    Element *slot_key_rows, *slot_value_rows;     // (slots, pitch)
    Element *q, *q_rotated;                       // (RUN, pitch), scaled by 1 / sqrt(d)
    Element* score_rows;                          // (scored, RUN): weights
    Cell *v_pairs, *slot_value_pairs, *score_pairs;
    Cell *q_columns, *q_rotated_columns;          // (d / depth, RUN)
    float *slot_key, *slot_value;                 // (slots, pitch): normed keys, values over mass
    float *scores, *out, *line;                   // (scored, RUN), (RUN, pitch), (pitch)
    float *sums, *slot_rms;                       // (RUN) and (slots): inverse root mean square of the keys

    ReadScratch(const MemoryShape& s, Parts& parts) : pitch(s.pitch()), scored(s.window + RUN + s.slots + 4) {
        k = rows(s.context() + 1, pitch, parts);
        v = rows(s.context() + 1, pitch, parts);
        q = rows(RUN, pitch, parts);
        q_rotated = rows(RUN, pitch, parts);
        slot_key = parts.take(s.slots * pitch);
        slot_value = parts.take(s.slots * pitch);
        scores = parts.take(scored * RUN);
        out = parts.take(RUN * pitch);
        line = parts.take(pitch);
        sums = parts.take(RUN);
        slot_rms = parts.take(s.slots);
        slot_key_rows = narrowed(slot_key, s.slots, pitch, parts);
        slot_value_rows = narrowed(slot_value, s.slots, pitch, parts);
        score_rows = narrowed(scores, scored, RUN, parts);
        v_pairs = paired(v, s.context() + 1, pitch, parts);
        slot_value_pairs = paired(slot_value_rows, s.slots, pitch, parts);
        score_pairs = paired(score_rows, scored, RUN, parts);
        q_columns = reinterpret_cast<Cell*>(parts.take(pitch * RUN));
        q_rotated_columns = reinterpret_cast<Cell*>(parts.take(pitch * RUN));
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
static void read_context(const ReadInputs<T>& in, int64_t b, int64_t head, ReadScratch<T>& w) {
    const MemoryShape& s = in.shape;
    for (int64_t c = 0; c < s.context(); ++c) {
        const int64_t row = b * s.context() + c, end = s.batch * s.context();
        load_row(s.d, in.k.at(row, end, head, s.d), w.line);
        rotate_row(s.d, in.cosine + c * (s.d / 2), in.sine + c * (s.d / 2), 1, 1, w.line, w.k + c * w.pitch);
        store_row(s.d, in.v.at(row, end, head, s.d), w.v + c * w.pitch);
    }
    memset(w.k + s.context() * w.pitch, 0, w.pitch * sizeof *w.k);
    memset(w.v + s.context() * w.pitch, 0, w.pitch * sizeof *w.v);
    pack_pairs(s.context() + 1, w.pitch, w.v, w.v_pairs);
}

// Normed keys and averaged values of the slots of one version. Empty slots become zeros.
template <class T>
static void read_slots(const ReadInputs<T>& in, int64_t at, ReadScratch<T>& w) {
    const MemoryShape& s = in.shape;
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        const float* key = in.memory.key + (at + slot) * s.d;
        const float* value = in.memory.value + (at + slot) * s.d;
        const float mass = in.memory.mass[at + slot], inverse_mass = mass > 0 ? 1.0f / mass : 0.0f;
        vf squares = {};
        for (int64_t i = 0; i < s.d; i += W) squares += load(key + i, s.d - i) * load(key + i, s.d - i);
        w.slot_rms[slot] = 1.0f / __builtin_sqrtf(sum(squares) / float(s.d) + 1e-6f);
        for (int64_t i = 0; i < s.d; i += W) {
            const int64_t to = slot * w.pitch + i;
            const vf normed = load(key + i, s.d - i) * w.slot_rms[slot];
            const vf mean = mass > 0 ? load(value + i, s.d - i) * inverse_mass : vf{};
            store(w.slot_key + to, normed);
            store(w.slot_value + to, mean);
            if (w.depth > 1) store(w.slot_key_rows + to, normed);
            if (w.depth > 1) store(w.slot_value_rows + to, mean);
        }
    }
    pack_pairs(s.slots, w.pitch, w.slot_value_rows, w.slot_value_pairs);
}

template <class T>
static void read_queries(const ReadInputs<T>& in, const Run& run, int64_t b, int64_t head, ReadScratch<T>& w) {
    const MemoryShape& s = in.shape;
    const float scale = 1.0f / __builtin_sqrtf(float(s.d));
    for (int64_t i = 0; i < run.queries(); ++i) {
        const int64_t t = run.begin + i, angle = (s.window + t) * (s.d / 2);
        load_row(s.d, in.q.at(b * s.time + t, s.batch * s.time, head, s.d), w.line);
        rotate_row(s.d, in.cosine + angle, in.sine + angle, 1, scale, w.line, w.q_rotated + i * w.pitch);
        store_row(s.d, w.line, w.q + i * w.pitch, scale);
    }
    const int64_t row = w.pitch / w.depth;
    transpose(run.queries(), w.cells(s.d), w.as_cells(w.q_rotated), row, w.q_rotated_columns, RUN);
    if (run.slots) transpose(run.queries(), w.cells(s.d), w.as_cells(w.q), row, w.q_columns, RUN);
}

MM_INLINE void fill(float* x, int64_t begin, int64_t end, float value) {
    for (int64_t i = begin; i < end; ++i) x[i] = value;
}

// Scores of a run: a row per key of its window, then a row per slot, masked with -inf. Returns the rows.
template <class T>
static int64_t read_scores(const ReadInputs<T>& in, const Run& run, int64_t at, ReadScratch<T>& w) {
    const MemoryShape& s = in.shape;
    const int64_t columns = round_up(run.queries(), W), depth = w.cells(s.d), row = w.pitch / w.depth;
    run.for_blocks([&](int64_t begin, int64_t rows, Span queries) {
        product<false>(rows, queries.end - queries.begin, depth, w.as_cells(w.k + (run.key_begin + begin) * w.pitch), row,
                       1, w.q_rotated_columns + queries.begin, RUN, w.scores + begin * RUN + queries.begin, RUN);
        for (int64_t r = begin; r < begin + rows; ++r) {  // query i sees rows (begin + i, window + begin + i] of the context
            const int64_t key = run.key_begin + r;
            const int64_t first = key < run.first_key ? queries.end : min64(key - s.window - run.begin, queries.end);
            fill(w.scores + r * RUN, queries.begin, first, -__builtin_inff());
            fill(w.scores + r * RUN, max64(key - run.begin, queries.begin), queries.end, -__builtin_inff());
        }
    });
    if (!run.slots) return run.keys;
    float* slots = w.scores + run.keys * RUN;
    product<false>(s.slots, columns, depth, w.as_cells(w.slot_key_rows), row, 1, w.q_columns, RUN, slots, RUN);
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        const float mass = in.memory.mass[at + slot];
        const float bias = mass > 0 ? logf(mass) : -__builtin_inff();
        for (int64_t i = 0; i < columns; i += W) store(slots + slot * RUN + i, load(slots + slot * RUN + i) + bias);
    }
    return run.keys + s.slots;
}

// Calls body(r, n) for rows [row, row + count) and, of a run that reads slots, theirs; n = 2 rows at once where cells
// are pairs, if there are two.
template <class T, class F>
MM_INLINE void for_score_rows(const MemoryShape& s, const Run& run, int64_t row, int64_t count, F body) {
    constexpr int64_t step = DEPTH<typename Operand<T>::Cell>;
    const int64_t end = row + count, slots = run.slots ? run.keys + s.slots : run.keys;
    for (int64_t r = row; r < end; r += step) body(r, min64(step, end - r));
    for (int64_t r = run.keys; r < slots; r += step) body(r, min64(step, slots - r));
}

// Scores to exponentials, as cells of score_pairs; sums (columns) of them, and the log of the softmax's denominators to
// lse.
template <class T>
static void read_softmax(const MemoryShape& s, const Run& run, float* lse, ReadScratch<T>& w) {
    run.for_queries([&](Span queries, int64_t row, int64_t count) {
        for (int64_t i = queries.begin; i < queries.end; i += W) {
            vf top = load(w.scores + row * RUN + i), total = {};
            for_score_rows<T>(s, run, row, count, [&](int64_t r, int64_t n) {
                top = max(load(w.scores + r * RUN + i), top);
                if (n == 2) top = max(load(w.scores + (r + 1) * RUN + i), top);
            });
            for_score_rows<T>(s, run, row, count, [&](int64_t r, int64_t n) {
                const vf e = exp(load(w.scores + r * RUN + i) - top);
                const vf other = n == 2 ? exp(load(w.scores + (r + 1) * RUN + i) - top) : vf{};
                total += e + other;
                if (w.depth == 1)
                    store(w.scores + r * RUN + i, e);
                else
                    store_pairs(e, other, w.score_pairs + r / 2 * RUN + i);
            });
            store(w.sums + i, total);
            for (int64_t lane = i; lane < min64(i + W, queries.end); ++lane)
                lse[lane] = logf(w.sums[lane]) + top[lane - i];
        }
    });
}

template <class T>
static void read_task(const ReadInputs<T>& in, int64_t b, int64_t head, T* out, float* lse, ReadScratch<T>& w) {
    const MemoryShape& s = in.shape;
    read_context(in, b, head, w);
    int64_t prepared = -1;
    Run run{};
    while (run.end < s.time) {
        run = next_run(s, b, run.end, run.version, w.depth);
        const int64_t at = slot_index(s, b, run.version, head);
        if (run.slots && prepared != run.version) {
            read_slots(in, at, w);
            prepared = run.version;
        }
        read_queries(in, run, b, head, w);
        read_scores(in, run, at, w);
        read_softmax(s, run, lse + (b * s.heads + head) * s.time + run.begin, w);

        const int64_t queries = run.queries(), keys = run.keys / w.depth;
        run.for_queries([&](Span some, int64_t row, int64_t count) {
            product<false>(some.end - some.begin, w.pitch, count / w.depth,
                           w.score_pairs + row / w.depth * RUN + some.begin, 1, RUN,
                           w.v_pairs + (run.key_begin + row) / w.depth * w.pitch, w.pitch, w.out + some.begin * w.pitch,
                           w.pitch);
        });
        if (run.slots)
            product<true>(queries, w.pitch, w.cells(s.slots), w.score_pairs + keys * RUN, 1, RUN, w.slot_value_pairs,
                          w.pitch, w.out, w.pitch);
        for (int64_t i = 0; i < queries; ++i)
            store_row(s.d, w.out + i * w.pitch, out + ((b * s.time + run.begin + i) * s.heads + head) * s.d,
                      1.0f / w.sums[i]);
    }
}

// Makes the buffers of a thread for run_tasks; where rows have ends that are not written, those are 0.
template <class Buffers>
static auto make_padded(const MemoryShape& s) {
    return [&s](Parts& parts) {
        const Buffers buffers(s, parts);
        if (parts.base && s.d != s.pitch()) memset(parts.base, 0, parts.used * sizeof(float));
        return buffers;
    };
}

// out (batch, time, heads, d) and lse (batch, heads, time), contiguous.
template <class T>
static int memory_read(const ReadInputs<T>& in, T* out, float* lse, int threads) {
    return for_each_head(in.shape, threads, make_padded<ReadScratch<T>>(in.shape),
                         [&](int64_t b, int64_t head, ReadScratch<T>& w) { read_task(in, b, head, out, lse, w); });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
