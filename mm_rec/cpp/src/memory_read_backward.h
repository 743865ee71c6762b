// Backward pass of reading the memories: weights are had again from the scores and the softmax's denominators.
#pragma once

#include "memory_read.h"

namespace mm_rec {
namespace MM_LEVEL {

// Gradients from above, and what the forward pass gave.
template <class T>
struct ReadFromAbove {
    HeadRows<const T> dout, out;
    const float* lse;
};

// Gradients of the inputs: dq (batch, time, heads, d), dk, dv (batch, context, heads, d), dmemory all versions.
template <class T>
struct ReadGradients {
    T *dq, *dk, *dv;
    Memory<float> dmemory;
};

// Buffers beyond those of the forward pass; shapes as there.
template <class T>
struct ReadBackwardScratch : ReadScratch<T> {
    typedef typename Operand<T>::Cell Cell;
    typedef typename Operand<T>::Element Element;

    float *dk, *dv, *dq, *dslot_key, *dslot_value, *dscores;
    Element *dout, *dscore_rows;
    Cell *k_pairs, *slot_key_pairs, *q_pairs, *q_rotated_pairs, *dout_pairs, *dscore_pairs;
    Cell* dout_columns;

    ReadBackwardScratch(const MemoryShape& s, Parts& parts) : ReadScratch<T>(s, parts) {
        const int64_t pitch = this->pitch, scored = this->scored, context = s.context() + 1;
        dk = parts.take(context * pitch);
        dv = parts.take(context * pitch);
        dq = parts.take(RUN * pitch);
        dslot_key = parts.take(s.slots * pitch);
        dslot_value = parts.take(s.slots * pitch);
        dscores = parts.take(scored * RUN);
        dout = this->rows(RUN, pitch, parts);
        dscore_rows = this->narrowed(dscores, scored, RUN, parts);
        k_pairs = this->paired(this->k, context, pitch, parts);
        slot_key_pairs = this->paired(this->slot_key_rows, s.slots, pitch, parts);
        q_pairs = this->paired(this->q, RUN, pitch, parts);
        q_rotated_pairs = this->paired(this->q_rotated, RUN, pitch, parts);
        dout_pairs = this->paired(dout, RUN, pitch, parts);
        dscore_pairs = this->paired(dscore_rows, scored, RUN, parts);
        dout_columns = reinterpret_cast<Cell*>(parts.take(pitch * RUN));
    }
};

// Gradients at the result of a run, and from them, into dscores, at its weights; dout . out into sums.
template <class T>
static void read_weights_backward(const ReadInputs<T>& in, const Run& run, int64_t b, int64_t head,
                                  const ReadFromAbove<T>& above, ReadBackwardScratch<T>& w) {
    const MemoryShape& s = in.shape;
    const int64_t queries = run.queries(), columns = round_up(queries, W), depth = w.cells(s.d);
    for (int64_t i = 0; i < queries; ++i) {
        const int64_t row = b * s.time + run.begin + i;
        const T* dy = above.dout.at(row, s.batch * s.time, head, s.d);
        const T* y = above.out.at(row, s.batch * s.time, head, s.d);
        vf dot = {};
        for (int64_t j = 0; j < s.d; j += W) dot += load(y + j, s.d - j) * load(dy + j, s.d - j);
        w.sums[i] = sum(dot);
        store_row(s.d, dy, w.dout + i * w.pitch);
    }
    fill(w.sums, queries, columns, 0.0f);
    pack_pairs(queries, w.pitch, w.dout, w.dout_pairs);
    const int64_t row = w.pitch / w.depth;
    transpose(queries, depth, w.as_cells(w.dout), row, w.dout_columns, RUN);
    run.for_blocks([&](int64_t begin, int64_t rows, Span some) {
        product<false>(rows, some.end - some.begin, depth, w.as_cells(w.v + (run.key_begin + begin) * w.pitch), row, 1,
                       w.dout_columns + some.begin, RUN, w.dscores + begin * RUN + some.begin, RUN);
    });
    if (run.slots)
        product<false>(s.slots, columns, depth, w.as_cells(w.slot_value_rows), row, 1, w.dout_columns, RUN,
                       w.dscores + run.keys * RUN, RUN);
}

// Scores to weights, in score_rows, and dscores = weight * (dweight - dout . out) in place, in dscore_rows and as cells.
template <class T>
static void read_softmax_backward(const MemoryShape& s, const Run& run, const float* lse, ReadBackwardScratch<T>& w) {
    run.for_queries([&](Span queries, int64_t row, int64_t count) {
        for (int64_t i = queries.begin; i < queries.end; i += W) {
            const vf log_sum = load(lse + i, run.queries() - i), pull = load(w.sums + i);
            const auto one = [&](int64_t r) {
                const int64_t at = r * RUN + i;
                const vf weight = exp(load(w.scores + at) - log_sum);
                const vf dscore = weight * (load(w.dscores + at) - pull);
                store(w.score_rows + at, weight);
                store(w.dscores + at, dscore);
                if (w.depth > 1) store(w.dscore_rows + at, dscore);
                return dscore;
            };
            for_score_rows<T>(s, run, row, count, [&](int64_t r, int64_t n) {
                const vf even = one(r), odd = n == 2 ? one(r + 1) : vf{};
                store_pairs(even, odd, w.dscore_pairs + r / 2 * RUN + i);
            });
        }
    });
}

// Gradients at normed keys and averaged values of the slots to those at one version of the memory.
template <class T>
static void read_slots_backward(const ReadInputs<T>& in, const Run& run, int64_t at, const Memory<float>& dmemory,
                                ReadBackwardScratch<T>& w) {
    const MemoryShape& s = in.shape;
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        const float mass = in.memory.mass[at + slot];
        if (!(mass > 0)) continue;
        const float inverse_mass = 1.0f / mass, rms = w.slot_rms[slot];
        const float *key = w.slot_key + slot * w.pitch, *value = w.slot_value + slot * w.pitch;
        const float *dkey = w.dslot_key + slot * w.pitch, *dvalue = w.dslot_value + slot * w.pitch;
        vf key_dot = {}, value_dot = {};
        for (int64_t i = 0; i < s.d; i += W) {
            key_dot += load(dkey + i) * load(key + i);
            value_dot += load(dvalue + i) * load(value + i);
        }
        const float pull = sum(key_dot) / float(s.d);
        for (int64_t i = 0; i < s.d; i += W) {
            float *to_key = dmemory.key + (at + slot) * s.d + i, *to_value = dmemory.value + (at + slot) * s.d + i;
            const vf g = rms * (load(dkey + i) - pull * load(key + i));
            store(to_key, load(to_key, s.d - i) + g, s.d - i);
            store(to_value, load(to_value, s.d - i) + load(dvalue + i) * inverse_mass, s.d - i);
        }
        float dlog_mass = -sum(value_dot);
        for (int64_t i = 0; i < run.queries(); ++i) dlog_mass += w.dscores[(run.keys + slot) * RUN + i];
        dmemory.mass[at + slot] += dlog_mass * inverse_mass;
    }
}

template <class T>
static void read_run_backward(const ReadInputs<T>& in, const ReadFromAbove<T>& above, const ReadGradients<T>& to,
                              const Run& run, int64_t b, int64_t head, ReadBackwardScratch<T>& w) {
    const MemoryShape& s = in.shape;
    const int64_t at = slot_index(s, b, run.version, head), pitch = w.pitch, queries = run.queries();
    const int64_t row = RUN / w.depth, paired = w.cells(queries), keys = run.keys / w.depth;
    read_queries(in, run, b, head, w);
    read_scores(in, run, at, w);
    read_weights_backward(in, run, b, head, above, w);
    read_softmax_backward(s, run, above.lse + (b * s.heads + head) * s.time + run.begin, w);

    pack_pairs(queries, pitch, w.q_rotated, w.q_rotated_pairs);
    run.for_blocks([&](int64_t begin, int64_t rows, Span some) {
        const int64_t cell = some.begin / w.depth, n = w.cells(min64(some.end, queries) - some.begin);
        float *dk = w.dk + (run.key_begin + begin) * pitch, *dv = w.dv + (run.key_begin + begin) * pitch;
        product<true>(rows, pitch, n, w.as_cells(w.score_rows + begin * RUN) + cell, row, 1, w.dout_pairs + cell * pitch,
                      pitch, dv, pitch);
        product<true>(rows, pitch, n, w.as_cells(w.dscore_rows + begin * RUN) + cell, row, 1,
                      w.q_rotated_pairs + cell * pitch, pitch, dk, pitch);
    });
    run.for_queries([&](Span some, int64_t begin, int64_t count) {
        product<false>(some.end - some.begin, pitch, count / w.depth,
                       w.dscore_pairs + begin / w.depth * RUN + some.begin, 1, RUN,
                       w.k_pairs + (run.key_begin + begin) / w.depth * pitch, pitch, w.dq + some.begin * pitch, pitch);
    });
    for (int64_t i = 0; i < queries; ++i) {
        const int64_t angle = (s.window + run.begin + i) * (s.d / 2);
        rotate_row(s.d, in.cosine + angle, in.sine + angle, -1, 1, w.dq + i * pitch, w.dq + i * pitch);
    }
    if (run.slots) {
        const auto *weights = w.as_cells(w.score_rows + run.keys * RUN), *d = w.as_cells(w.dscore_rows + run.keys * RUN);
        pack_pairs(queries, pitch, w.q, w.q_pairs);
        product<false>(s.slots, pitch, paired, weights, row, 1, w.dout_pairs, pitch, w.dslot_value, pitch);
        product<false>(s.slots, pitch, paired, d, row, 1, w.q_pairs, pitch, w.dslot_key, pitch);
        product<true>(queries, pitch, w.cells(s.slots), w.dscore_pairs + keys * RUN, 1, RUN, w.slot_key_pairs, pitch,
                      w.dq, pitch);
        read_slots_backward(in, run, at, to.dmemory, w);
    }
    for (int64_t i = 0; i < queries; ++i)
        store_row(s.d, w.dq + i * pitch, to.dq + ((b * s.time + run.begin + i) * s.heads + head) * s.d,
                  1.0f / __builtin_sqrtf(float(s.d)));
}

template <class T>
static void read_task_backward(const ReadInputs<T>& in, const ReadFromAbove<T>& above, const ReadGradients<T>& to,
                               int64_t b, int64_t head, ReadBackwardScratch<T>& w) {
    const MemoryShape& s = in.shape;
    read_context(in, b, head, w);
    pack_pairs(s.context() + 1, w.pitch, w.k, w.k_pairs);
    memset(w.dk, 0, (s.context() + 1) * w.pitch * sizeof(float));
    memset(w.dv, 0, (s.context() + 1) * w.pitch * sizeof(float));
    for (int64_t version = 0; version < s.versions(); ++version) {
        const int64_t at = slot_index(s, b, version, head);
        memset(to.dmemory.key + at * s.d, 0, s.slots * s.d * sizeof(float));
        memset(to.dmemory.value + at * s.d, 0, s.slots * s.d * sizeof(float));
        memset(to.dmemory.mass + at, 0, s.slots * sizeof(float));
    }
    int64_t prepared = -1;
    Run run{};
    while (run.end < s.time) {
        run = next_run(s, b, run.end, run.version, w.depth);
        if (run.slots && prepared != run.version) {
            read_slots(in, slot_index(s, b, run.version, head), w);
            pack_pairs(s.slots, w.pitch, w.slot_key_rows, w.slot_key_pairs);
            prepared = run.version;
        }
        read_run_backward(in, above, to, run, b, head, w);
    }
    for (int64_t c = 0; c < s.context(); ++c) {
        const int64_t row = ((b * s.context() + c) * s.heads + head) * s.d;
        rotate_row(s.d, in.cosine + c * (s.d / 2), in.sine + c * (s.d / 2), -1, 1, w.dk + c * w.pitch, to.dk + row);
        store_row(s.d, w.dv + c * w.pitch, to.dv + row);
    }
}

template <class T>
static int memory_read_backward(const ReadInputs<T>& in, const ReadFromAbove<T>& above, const ReadGradients<T>& to,
                                int threads) {
    return for_each_head(
        in.shape, threads, make_padded<ReadBackwardScratch<T>>(in.shape),
        [&](int64_t b, int64_t head, ReadBackwardScratch<T>& w) { read_task_backward(in, above, to, b, head, w); });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
