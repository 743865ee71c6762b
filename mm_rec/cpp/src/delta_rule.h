// The gated delta rule: a matrix S per head that maps keys to values, written and read token by token (defined in
// mm_rec/ops/reference.py), here a chunk of tokens at once; one task is some value columns of one head of one sequence.
//
// With g the running sum of log_decay since the chunk began, or the document if later, and of one chunk
//   D[i, j] = exp(g_i - g_j) for j <= i of one document, else 0: what token i finds of what token j wrote,
//   E[i] = exp(g_i), 0 from the first document on that begins in the chunk: what token i finds of S,
//   A[i, j] = beta_i (key_i . key_j) D[i, j] for j < i, and B[i, j] = (q_i . key_j) D[i, j],
// what the tokens write, R, their results and the next matrix are
//   R = (I + A)^-1 beta (v - E key S);  out = E q S + B R;  S' = E[last] S + (D[last] key)^T R.
// The inverse is a substitution, in blocks of rows. Exponents are differences, at most 0, so nothing overflows. A sum is
// kept in two parts, the first a multiple of 2^-10: differences of those are exact, which those of rounded sums are not.
#pragma once

#include <initializer_list>

#include "heads.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t DELTA_BLOCK = 16;  // rows of a block of the triangular matrices; a multiple of W

constexpr float LOG_ZERO = -104;         // e^x is 0 from here on; sums of a chunk stay small

struct DeltaShape {
    int64_t batch, time, heads, d, chunk;  // chunk: tokens at once, a multiple of DELTA_BLOCK
    const int64_t* position;               // (batch, time)
    int64_t pitch() const { return round_up(d, W); }  // floats from one row of d to the next
    int64_t chunks() const { return (time + chunk - 1) / chunk; }
    // Where the matrix of a head after `chunk` chunks lies in (batch, chunks + 1, heads, d, d).
    int64_t state(int64_t b, int64_t chunk, int64_t head) const {
        return ((b * (chunks() + 1) + chunk) * heads + head) * d * d;
    }
};

template <class T>
struct DeltaInputs {
    DeltaShape shape;
    HeadRows<const T> q, key, v;     // (batch, time, heads, d)
    const float *beta, *log_decay;   // (batch, time, heads)
};

// Tokens [begin, begin + n) of sequence b, one head; `rows` is n in whole blocks, and the next chunk to be computed begins
// `ahead` tokens later.
struct DeltaChunk {
    int64_t b, head, begin, n, rows, ahead;
    DeltaChunk(const DeltaShape& s, int64_t b, int64_t head, int64_t index, int64_t ahead)
        : b(b), head(head), begin(index * s.chunk), n(min64(s.chunk, s.time - begin)), rows(round_up(n, DELTA_BLOCK)),
          ahead(ahead) {}
    // Where row i lies in (batch, time, heads, d).
    int64_t at(const DeltaShape& s, int64_t i) const { return ((b * s.time + begin + i) * s.heads + head) * s.d; }
};

// Buffers of one task; C is the chunk. Rows past the last token are 0.
struct DeltaScratch {
    int64_t pitch, chunk;
    float *rows, *columns;             // (2 C, pitch): the keys, then the queries; (pitch, C): the keys transposed
    float *read, *error, *written;     // (2 C, pitch): rows times S; (C, pitch): v - E key S, and R
    float *decay, *alike, *minus_a, *b;  // (C, C): D, D key key^T under the diagonal, -A, B
    float *beta, *sums, *rest, *carried;  // (C): beta, g in two parts, E
    float* state;                      // (d, pitch)
    int64_t* first;                    // (C): the chunk's first token that is of the same document

    DeltaScratch(const DeltaShape& s, Parts& parts) : pitch(s.pitch()), chunk(s.chunk) {
        rows = parts.take(2 * chunk * pitch);
        columns = parts.take(chunk * pitch);
        read = parts.take(2 * chunk * pitch);
        error = parts.take(chunk * pitch);
        written = parts.take(chunk * pitch);
        for (float** square : {&decay, &alike, &minus_a, &b}) *square = parts.take(chunk * chunk);
        for (float** line : {&beta, &sums, &rest, &carried}) *line = parts.take(chunk);
        state = parts.take(pitch * pitch);
        first = reinterpret_cast<int64_t*>(parts.take(2 * chunk));
    }
    const float* last_decay(const DeltaChunk& c) const { return decay + (c.n - 1) * chunk; }
};

// Rows of a chunk, filled up with rows of zeros. Asks for those of the next chunk: a head's own part of a row is too short
// to be read fast.
template <class T>
static void delta_rows(const DeltaShape& s, const DeltaChunk& c, const HeadRows<const T>& from, float* to) {
    const int64_t pitch = s.pitch();
    const T* row = from.data + c.b * from.sequence + c.begin * from.row + c.head * s.d;
    for (int64_t i = 0; i < c.n; ++i, row += from.row) {
        const int64_t next = c.begin + i + c.ahead;
        if (next >= 0 && next < s.time) prefetch_row(row + c.ahead * from.row, s.d);
        load_row(s.d, row, to + i * pitch);
    }
    memset(to + c.n * pitch, 0, (c.rows - c.n) * pitch * sizeof(float));
}

// Asks for the rows of a chunk that will be written.
template <class T>
static void delta_ask_for(const DeltaShape& s, const DeltaChunk& c, const T* to) {
    for (int64_t i = 0; i < c.n; ++i) prefetch_row<true>(to + c.at(s, i), s.d);
}

// beta, g, E and D.
template <class T>
static void delta_decays(const DeltaInputs<T>& in, const DeltaChunk& c, DeltaScratch& w) {
    const DeltaShape& s = in.shape;
    int64_t first = 0, carried = c.n;
    double sum = 0;
    for (int64_t i = 0; i < c.rows; ++i) {
        if (i < c.n) {
            const int64_t token = c.b * s.time + c.begin + i;
            const bool starts = s.position[token] == 0;
            if (starts) first = i, carried = min64(carried, i);
            const float log_decay = in.log_decay[token * s.heads + c.head];
            sum = starts ? 0.0 : sum + (log_decay < LOG_ZERO ? LOG_ZERO : log_decay);
            w.beta[i] = in.beta[token * s.heads + c.head];
        } else {
            w.beta[i] = 0;
        }
        w.first[i] = first;
        w.sums[i] = __builtin_rintf(float(sum) * 1024) / 1024;
        w.rest[i] = float(sum - w.sums[i]);
    }
    vi lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int64_t i = 0; i < c.rows; i += W)
        store(w.carried + i, lane + int32_t(i) < int32_t(carried) ? exp(load(w.sums + i) + load(w.rest + i)) : vf{});
    for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t j = 0; j < round_up(i + 1, DELTA_BLOCK); j += W) {
            const vi at = lane + int32_t(j);
            const vf found = exp((w.sums[i] - load(w.sums + j)) + (w.rest[i] - load(w.rest + j)));
            store(w.decay + i * w.chunk + j, ((at >= int32_t(w.first[i])) & (at <= int32_t(i))) ? found : vf{});
        }
}

// The triangle of to (C, C) = rows times columns, block by block, without the blocks over the diagonal.
static void delta_triangle(int64_t rows, int64_t d, const float* from, int64_t pitch, const float* columns, float* to,
                           int64_t chunk) {
    for (int64_t i = 0; i < rows; i += DELTA_BLOCK)
        product<false>(DELTA_BLOCK, i + DELTA_BLOCK, d, from + i * pitch, pitch, 1, columns, chunk, to + i * chunk, chunk);
}

// to (rows, n) += L x, or L^T x, of a lower triangular matrix L (C, C).
template <bool TRANSPOSED>
static void delta_add_product(int64_t rows, int64_t n, const float* lower, int64_t chunk, const float* x, int64_t pitch,
                              float* to) {
    for (int64_t i = 0; i < rows; i += DELTA_BLOCK) {
        if (TRANSPOSED)
            product<true>(DELTA_BLOCK, n, rows - i, lower + i * chunk + i, 1, chunk, x + i * pitch, pitch,
                          to + i * pitch, pitch);
        else
            product<true>(DELTA_BLOCK, n, i + DELTA_BLOCK, lower + i * chunk, chunk, 1, x, pitch, to + i * pitch, pitch);
    }
}

// One block of delta_solve, whose corner of L is given, on W columns in registers. The transpose goes from the last row up.
template <bool TRANSPOSED>
MM_INLINE void delta_solve_block(const float* corner, int64_t chunk, float* x, int64_t pitch) {
    constexpr int LAST = DELTA_BLOCK - 1;
    vf row[DELTA_BLOCK];
    for (int r = 0; r < DELTA_BLOCK; ++r) row[r] = load(x + (TRANSPOSED ? LAST - r : r) * pitch);
#pragma GCC unroll 16
    for (int j = 0; j < DELTA_BLOCK; ++j)
#pragma GCC unroll 16
        for (int r = j + 1; r < DELTA_BLOCK; ++r)
            row[r] += splat(TRANSPOSED ? corner[(LAST - j) * chunk + LAST - r] : corner[r * chunk + j]) * row[j];
    for (int r = 0; r < DELTA_BLOCK; ++r) store(x + (TRANSPOSED ? LAST - r : r) * pitch, row[r]);
}

// x (rows, n) to (I - L)^-1 x, or its transpose times x, of a matrix L (C, C) that is 0 on and over the diagonal.
template <bool TRANSPOSED>
static void delta_solve(int64_t rows, int64_t n, const float* lower, int64_t chunk, float* x, int64_t pitch) {
    for (int64_t done = 0; done < rows; done += DELTA_BLOCK) {
        const int64_t i = TRANSPOSED ? rows - DELTA_BLOCK - done : done;
        const float* corner = lower + i * chunk + i;
        float* block = x + i * pitch;
        if (TRANSPOSED)
            product<true>(DELTA_BLOCK, n, done, corner + DELTA_BLOCK * chunk, 1, chunk, block + DELTA_BLOCK * pitch,
                          pitch, block, pitch);
        else
            product<true>(DELTA_BLOCK, n, done, lower + i * chunk, chunk, 1, x, pitch, block, pitch);
        for (int64_t column = 0; column < n; column += W)
            delta_solve_block<TRANSPOSED>(corner, chunk, block + column, pitch);
    }
}

// What of a chunk does not depend on the matrix: keys and queries, D and from it -A and B.
template <class T>
static void delta_prepare(const DeltaInputs<T>& in, const DeltaChunk& c, DeltaScratch& w) {
    const DeltaShape& s = in.shape;
    float* q = w.rows + c.rows * w.pitch;
    delta_rows(s, c, in.key, w.rows);
    delta_rows(s, c, in.q, q);
    delta_decays(in, c, w);
    transpose(c.rows, s.d, w.rows, w.pitch, w.columns, w.chunk);
    delta_triangle(c.rows, s.d, w.rows, w.pitch, w.columns, w.alike, w.chunk);
    delta_triangle(c.rows, s.d, q, w.pitch, w.columns, w.b, w.chunk);
    for (int64_t i = 0; i < c.rows; ++i) {
        float *alike = w.alike + i * w.chunk, *minus_a = w.minus_a + i * w.chunk, *b = w.b + i * w.chunk;
        for (int64_t j = 0; j < round_up(i + 1, DELTA_BLOCK); j += W) {
            const vf decay = load(w.decay + i * w.chunk + j);
            const vf x = load(alike + j) * decay;
            store(alike + j, x);
            store(minus_a + j, x * -w.beta[i]);
            store(b + j, load(b + j) * decay);
        }
        alike[i] = minus_a[i] = 0;
    }
}

// v - E key S and R, of some columns, given the rows times S.
template <class T>
static void delta_written(const DeltaInputs<T>& in, const DeltaChunk& c, Span columns, DeltaScratch& w) {
    delta_rows(in.shape, c, in.v, w.error);
    for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t j = columns.begin; j < columns.end; j += W) {
            const int64_t at = i * w.pitch + j;
            const vf error = load(w.error + at) - w.carried[i] * load(w.read + at);
            store(w.error + at, error);
            store(w.written + at, error * w.beta[i]);
        }
    delta_solve<false>(c.rows, columns.end - columns.begin, w.minus_a, w.chunk, w.written + columns.begin, w.pitch);
}

MM_INLINE void scale_row(Span columns, float scale, float* row) {
    for (int64_t j = columns.begin; j < columns.end; j += W) store(row + j, load(row + j) * scale);
}

// One chunk: from the matrix before it in w.state to its results in w.read, under the keys' rows, and the matrix after it.
template <class T>
static void delta_chunk(const DeltaInputs<T>& in, const DeltaChunk& c, Span columns, DeltaScratch& w) {
    const DeltaShape& s = in.shape;
    const int64_t n = columns.end - columns.begin, pitch = w.pitch;
    float *state = w.state + columns.begin, *written = w.written + columns.begin;
    float* out = w.read + c.rows * pitch;
    delta_prepare(in, c, w);
    product<false>(2 * c.rows, n, s.d, w.rows, pitch, 1, state, pitch, w.read + columns.begin, pitch);
    delta_written(in, c, columns, w);
    for (int64_t i = 0; i < c.n; ++i) scale_row(columns, w.carried[i], out + i * pitch);
    delta_add_product<false>(c.rows, n, w.b, w.chunk, written, pitch, out + columns.begin);

    const float* last = w.last_decay(c);
    for (int64_t i = 0; i < c.n; ++i) scale_row(columns, last[i], w.written + i * pitch);
    for (int64_t i = 0; i < s.d; ++i) scale_row(columns, w.carried[c.n - 1], w.state + i * pitch);
    product<true>(s.d, n, c.n, w.rows, 1, pitch, written, pitch, state, pitch);
}

// Some columns of a matrix, between its rows of d and rows of whole vectors.
static void delta_load_state(int64_t d, Span columns, const float* from, float* to, int64_t pitch) {
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = columns.begin; j < columns.end; j += W) store(to + i * pitch + j, load(from + i * d + j, d - j));
}
static void delta_store_state(int64_t d, Span columns, const float* from, int64_t pitch, float* to) {
    for (int64_t i = 0; i < d; ++i)
        for (int64_t j = columns.begin; j < columns.end; j += W) store(to + i * d + j, load(from + i * pitch + j), d - j);
}

// Columns of a task: all, or with more threads than heads parts of whole blocks.
MM_INLINE int64_t delta_task_columns(const DeltaShape& s, int threads) {
    const int64_t parts = max64(1, threads / (s.batch * s.heads));
    return round_up((s.pitch() + parts - 1) / parts, DELTA_BLOCK);
}

// A rough count of multiplications.
MM_INLINE int64_t delta_work(const DeltaShape& s) { return s.batch * s.heads * s.time * s.d * (3 * s.d + 2 * s.chunk); }

// out (batch, time, heads, d) and states (batch, chunks + 1, heads, d, d), both contiguous, of state (batch, heads, d, d).
template <class T>
static int delta_rule(const DeltaInputs<T>& in, const float* state, T* out, float* states, int threads) {
    const DeltaShape& s = in.shape;
    if (delta_work(s) < HEADS_MIN_WORK) threads = 1;
    const int64_t part = delta_task_columns(s, threads), parts = (s.pitch() + part - 1) / part;
    const auto make = [&](Parts& parts) { return DeltaScratch(s, parts); };
    const auto task = [&](int64_t index, DeltaScratch& w) {
        const int64_t head = index / parts % s.heads, b = index / parts / s.heads, first = index % parts * part;
        const Span columns{first, min64(first + part, w.pitch)};
        delta_load_state(s.d, columns, state + (b * s.heads + head) * s.d * s.d, w.state, w.pitch);
        delta_store_state(s.d, columns, w.state, w.pitch, states + s.state(b, 0, head));
        for (int64_t chunk = 0; chunk < s.chunks(); ++chunk) {
            const DeltaChunk c(s, b, head, chunk, s.chunk);
            delta_ask_for(s, c, out);
            delta_chunk(in, c, columns, w);
            for (int64_t i = 0; i < c.n; ++i) {
                T* to = out + c.at(s, i);
                for (int64_t j = columns.begin; j < columns.end; j += W)
                    store(to + j, load(w.read + (c.rows + i) * w.pitch + j), s.d - j);
            }
            delta_store_state(s.d, columns, w.state, w.pitch, states + s.state(b, chunk + 1, head));
        }
    };
    return run_tasks(s.batch * s.heads * parts, threads, make, task) ? KERNEL_DONE : KERNEL_NO_SCRATCH;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
