// Backward pass of the gated delta rule, from the last chunk to the first: each is computed again from the matrix before
// it. Letters as in delta_rule.h; X = key S, and dS' is the gradient at the matrix after the chunk:
//   dR = B^T dout + D[last] key dS';  dP = (I + A)^-T dR, the gradient at beta (v - E X);
//   dv = beta dP;  dX = -beta E dP;  dA = -dP R^T;  dB = dout R^T;  dS = E[last] dS' + q^T (E dout) + key^T dX.
#pragma once

#include "delta_rule.h"

namespace mm_rec {
namespace MM_LEVEL {

// Gradients at the result (null: none) and at the last matrix (batch, heads, d, d) (null: none), and what the forward
// pass gave: the matrices (batch, chunks + 1, heads, d, d).
template <class T>
struct DeltaFromAbove {
    HeadRows<const T> dout;
    const float *dlast, *states;
};

// Gradients of the inputs: (batch, time, heads, d), (batch, time, heads) and (batch, heads, d, d), all contiguous.
template <class T>
struct DeltaGradients {
    T *dq, *dkey, *dv;
    float *dbeta, *dlog_decay, *dstate;
};

// Buffers beyond those of the forward pass; shapes as there.
struct DeltaBackwardScratch : DeltaScratch {
    float *dout, *dwritten;               // (C, pitch): gradients at the result, and at R, then P
    float *dread, *drows;                 // (2 C, pitch): at rows times S, and at the rows
    float *da, *db;                       // (C, C)
    float *dstate, *columns_of_state;     // (d, pitch): dS'; (pitch, pitch): S, then dS', transposed
    float *dbeta, *dsums, *dlast;         // (C): at beta, at g, and R dS'^T . D[last] key of each token

    DeltaBackwardScratch(const DeltaShape& s, Parts& parts) : DeltaScratch(s, parts) {
        dout = parts.take(chunk * pitch);
        dwritten = parts.take(chunk * pitch);
        dread = parts.take(2 * chunk * pitch);
        drows = parts.take(2 * chunk * pitch);
        da = parts.take(chunk * chunk);
        db = parts.take(chunk * chunk);
        dstate = parts.take(pitch * pitch);
        columns_of_state = parts.take(pitch * pitch);
        for (float** line : {&dbeta, &dsums, &dlast}) *line = parts.take(chunk);
    }
};

MM_INLINE float delta_dot(int64_t n, const float* a, const float* b) {
    return sum_over(n, [&](int64_t i, auto) { return load(a + i) * load(b + i); });
}

// dP in w.dwritten, and in w.dlast the products of R with the share of dR that comes from the matrix after the chunk.
static void delta_written_backward(const DeltaShape& s, const DeltaChunk& c, DeltaBackwardScratch& w) {
    const int64_t pitch = w.pitch;
    const float* last = w.last_decay(c);
    product<false>(c.rows, pitch, s.d, w.rows, pitch, 1, w.dstate, pitch, w.dwritten, pitch);
    for (int64_t i = 0; i < c.rows; ++i) {
        float* row = w.dwritten + i * pitch;
        scale_row({0, pitch}, i < c.n ? last[i] : 0.0f, row);
        w.dlast[i] = delta_dot(pitch, row, w.written + i * pitch);
    }
    delta_add_product<true>(c.rows, pitch, w.b, w.chunk, w.dout, pitch, w.dwritten);
    delta_solve<true>(c.rows, pitch, w.minus_a, w.chunk, w.dwritten, pitch);
}

// Gradients at the rows times S, and from them at the rows, beta and g; dv to its place.
template <class T>
static void delta_read_backward(const DeltaShape& s, const DeltaChunk& c, const float* state, T* dv,
                                DeltaBackwardScratch& w) {
    const int64_t pitch = w.pitch;
    for (int64_t i = 0; i < c.rows; ++i) {
        const float beta = w.beta[i], carried = w.carried[i];
        const float* dp = w.dwritten + i * pitch;
        float *dkey_read = w.dread + i * pitch, *dq_read = w.dread + (c.rows + i) * pitch;
        for (int64_t j = 0; j < pitch; j += W) {
            store(dkey_read + j, load(dp + j) * (-beta * carried));
            store(dq_read + j, load(w.dout + i * pitch + j) * carried);
        }
        w.dbeta[i] = delta_dot(pitch, dp, w.error + i * pitch);
        if (i < c.n) store_row(s.d, dp, dv + c.at(s, i), beta);
    }
    transpose(s.d, s.d, state, pitch, w.columns_of_state, pitch);
    product<false>(2 * c.rows, pitch, s.d, w.dread, pitch, 1, w.columns_of_state, pitch, w.drows, pitch);
    for (int64_t i = 0; i < c.rows; ++i)
        w.dsums[i] = delta_dot(pitch, w.rows + i * pitch, w.drows + i * pitch) +
                     delta_dot(pitch, w.rows + (c.rows + i) * pitch, w.drows + (c.rows + i) * pitch);
}

// dA and dB, and from them gradients at beta, g and the products of keys and queries, which take the place of dA and dB.
static void delta_scores_backward(const DeltaShape& s, const DeltaChunk& c, DeltaBackwardScratch& w) {
    transpose(c.rows, s.d, w.written, w.pitch, w.columns, w.chunk);
    delta_triangle(c.rows, s.d, w.dwritten, w.pitch, w.columns, w.da, w.chunk);
    delta_triangle(c.rows, s.d, w.dout, w.pitch, w.columns, w.db, w.chunk);
    for (int64_t i = 0; i < c.rows; ++i) {
        const int64_t row = i * w.chunk;
        const float beta = w.beta[i];
        vf by_beta = {}, by_sum = {};
        for (int64_t j = 0; j < round_up(i + 1, DELTA_BLOCK); j += W) {
            const int64_t at = row + j;
            const vf decay = load(w.decay + at), da = -load(w.da + at), db = load(w.db + at);
            const vf through_a = da * load(w.alike + at), through = through_a * beta + db * load(w.b + at);
            by_beta += through_a;
            by_sum += through;
            store(w.dsums + j, load(w.dsums + j) - through);
            store(w.da + at, da * decay * beta);
            store(w.db + at, db * decay);
        }
        w.da[row + i] = 0;
        w.dbeta[i] += sum(by_beta);
        w.dsums[i] += sum(by_sum);
    }
}

// Gradients at keys and queries, added to w.drows.
static void delta_rows_backward(const DeltaShape& s, const DeltaChunk& c, DeltaBackwardScratch& w) {
    const int64_t pitch = w.pitch, chunk = w.chunk;
    float* dq = w.drows + c.rows * pitch;
    const float *q = w.rows + c.rows * pitch, *last = w.last_decay(c);
    delta_add_product<false>(c.rows, pitch, w.da, chunk, w.rows, pitch, w.drows);
    delta_add_product<true>(c.rows, pitch, w.da, chunk, w.rows, pitch, w.drows);
    delta_add_product<true>(c.rows, pitch, w.db, chunk, q, pitch, w.drows);
    delta_add_product<false>(c.rows, pitch, w.db, chunk, w.rows, pitch, dq);
    for (int64_t i = 0; i < c.n; ++i) scale_row({0, pitch}, last[i], w.written + i * pitch);
    transpose(s.d, s.d, w.dstate, pitch, w.columns_of_state, pitch);
    product<true>(c.n, pitch, s.d, w.written, pitch, 1, w.columns_of_state, pitch, w.drows, pitch);
}

// dS from dS', in place. Returns the gradient at the g of the last token that comes from E[last].
static float delta_state_backward(const DeltaShape& s, const DeltaChunk& c, DeltaBackwardScratch& w) {
    const int64_t pitch = w.pitch;
    const float carried = w.carried[c.n - 1];
    float dot = 0;
    for (int64_t i = 0; i < s.d; ++i) {
        if (carried != 0) dot += delta_dot(pitch, w.state + i * pitch, w.dstate + i * pitch);
        scale_row({0, pitch}, carried, w.dstate + i * pitch);
    }
    product<true>(s.d, pitch, 2 * c.rows, w.rows, 1, pitch, w.dread, pitch, w.dstate, pitch);
    return carried * dot;
}

// Gradients at beta and log_decay to their places: g sums log_decay from the token after a document's first.
static void delta_decays_backward(const DeltaShape& s, const DeltaChunk& c, float dlast, float* dbeta, float* dlog_decay,
                                  DeltaBackwardScratch& w) {
    for (int64_t i = 0; i < c.n; ++i) {
        w.dsums[i] -= w.dlast[i];
        dlast += w.dlast[i];
    }
    w.dsums[c.n - 1] += dlast;
    float sum = 0;
    for (int64_t i = c.n - 1; i >= 0; --i) {
        const int64_t token = c.b * s.time + c.begin + i, at = token * s.heads + c.head;
        sum += w.dsums[i];
        if (s.position[token] == 0) sum = 0;
        dbeta[at] = w.dbeta[i];
        dlog_decay[at] = sum;
    }
}

template <class T>
static void delta_chunk_backward(const DeltaInputs<T>& in, const DeltaChunk& c, const DeltaFromAbove<T>& above,
                                 const DeltaGradients<T>& to, DeltaBackwardScratch& w) {
    const DeltaShape& s = in.shape;
    const Span all{0, w.pitch};
    for (T* rows : {to.dv, to.dkey, to.dq}) delta_ask_for(s, c, rows);
    delta_load_state(s.d, all, above.states + s.state(c.b, c.begin / s.chunk, c.head), w.state, w.pitch);
    delta_prepare(in, c, w);
    product<false>(c.rows, w.pitch, s.d, w.rows, w.pitch, 1, w.state, w.pitch, w.read, w.pitch);
    delta_written(in, c, all, w);
    if (above.dout.data)
        delta_rows(s, c, above.dout, w.dout);
    else
        memset(w.dout, 0, c.rows * w.pitch * sizeof(float));
    delta_written_backward(s, c, w);
    delta_read_backward(s, c, w.state, to.dv, w);
    delta_scores_backward(s, c, w);
    delta_rows_backward(s, c, w);
    delta_decays_backward(s, c, delta_state_backward(s, c, w), to.dbeta, to.dlog_decay, w);
    for (int64_t i = 0; i < c.n; ++i) {
        store_row(s.d, w.drows + i * w.pitch, to.dkey + c.at(s, i));
        store_row(s.d, w.drows + (c.rows + i) * w.pitch, to.dq + c.at(s, i));
    }
}

template <class T>
static int delta_rule_backward(const DeltaInputs<T>& in, const DeltaFromAbove<T>& above, const DeltaGradients<T>& to,
                               int threads) {
    const DeltaShape& s = in.shape;
    const auto make = [&](Parts& parts) { return DeltaBackwardScratch(s, parts); };
    return for_each_head(s, delta_work(s), threads, make, [&](int64_t b, int64_t head, DeltaBackwardScratch& w) {
        const Span all{0, w.pitch};
        const int64_t matrix = (b * s.heads + head) * s.d * s.d;
        if (above.dlast)
            delta_load_state(s.d, all, above.dlast + matrix, w.dstate, w.pitch);
        else
            memset(w.dstate, 0, s.d * w.pitch * sizeof(float));
        for (int64_t chunk = s.chunks() - 1; chunk >= 0; --chunk)
            delta_chunk_backward(in, DeltaChunk(s, b, head, chunk, -s.chunk), above, to, w);
        delta_store_state(s.d, all, w.dstate, w.pitch, to.dstate + matrix);
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
