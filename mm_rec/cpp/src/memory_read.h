// One softmax over the window and the slots, forward and backward; one task is one head of one sequence.
//
// Queries go in runs of up to RUN consecutive tokens of one document that see the same version of the memory.
// All that a run can see are rows: its window first, then the slots. Scores are kept transposed, a row per key
// and a column per query, so that the softmax is plain arithmetic across queries and no buffer is larger than
// (W + RUN + S) x RUN.
#pragma once

#include "memory.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t RUN = 64;

template <class T>
struct ReadInputs {
    MemoryShape shape;
    HeadRows<const T> q, k, v;      // (batch, time, heads, d) and (batch, context, heads, d)
    Memory<const float> memory;     // all versions
    const float *cosine, *sine;     // (context, d / 2)
};

// Tokens [begin, end) of the chunk, what they see, and how much of it.
struct Run {
    int64_t begin, end, version;
    int64_t key_begin, keys;  // context rows [key_begin, key_begin + keys)
    bool slots;               // whether the long-term memory is read
    int64_t queries() const { return end - begin; }
};

// The run that starts at token `begin`, where `version` writes have happened before it.
static Run next_run(const MemoryShape& s, int64_t b, int64_t begin, int64_t version) {
    Run run;
    run.begin = begin;
    run.version = version + s.writes(b, begin);
    run.slots = s.at(b, begin) >= s.window;
    int64_t t = begin + 1;
    while (t < s.time && t < begin + RUN && s.at(b, t) == s.at(b, t - 1) + 1 && !s.writes(b, t) &&
           (s.at(b, t) >= s.window) == run.slots)
        ++t;
    run.end = t;
    run.key_begin = max64(max64(begin + 1, s.window + begin - s.at(b, begin)), 0);
    run.keys = s.window + t - run.key_begin;
    return run;
}

// Buffers of one task. Rows of d are `pitch` apart, rows of scores RUN.
struct ReadScratch {
    float *k, *v;                       // (context, pitch): rotated keys, values
    float *slot_key, *slot_value;       // (slots, pitch): normed keys, values over mass
    float *q, *q_rotated;               // (RUN, pitch), scaled by 1 / sqrt(d)
    float *q_columns, *rotated_columns; // (d, RUN), the same transposed
    float *scores;                      // (window + RUN + slots, RUN)
    float *out;                         // (RUN, pitch)
    float *sums;                        // (RUN)
    float *slot_rms;                    // (slots): inverse root mean square of the keys
    float *dk, *dv, *dq;                // backward, as k, v, out
    float *dslot_key, *dslot_value;     // backward
    float *dout_columns, *dscores;      // backward, as q_columns, scores
    int64_t pitch;

    ReadScratch(const MemoryShape& s, bool backward, Parts& parts) : pitch(s.pitch()) {
        const int64_t scored = (s.window + RUN + s.slots) * RUN;
        k = parts.take(s.context() * pitch);
        v = parts.take(s.context() * pitch);
        slot_key = parts.take(s.slots * pitch);
        slot_value = parts.take(s.slots * pitch);
        q = parts.take(RUN * pitch);
        q_rotated = parts.take(RUN * pitch);
        q_columns = parts.take(s.d * RUN);
        rotated_columns = parts.take(s.d * RUN);
        scores = parts.take(scored);
        out = parts.take(RUN * pitch);
        sums = parts.take(RUN);
        slot_rms = parts.take(s.slots);
        if (!backward) return;
        dk = parts.take(s.context() * pitch);
        dv = parts.take(s.context() * pitch);
        dq = parts.take(RUN * pitch);
        dslot_key = parts.take(s.slots * pitch);
        dslot_value = parts.take(s.slots * pitch);
        dout_columns = parts.take(s.d * RUN);
        dscores = parts.take(scored);
    }
};

template <class T>
static void read_context(const ReadInputs<T>& in, int64_t b, int64_t head, ReadScratch& w) {
    const MemoryShape& s = in.shape;
    for (int64_t c = 0; c < s.context(); ++c) {
        const int64_t row = b * s.context() + c;
        widen_row(s.d, in.k.data + row * in.k.row + head * s.d, w.k + c * w.pitch);
        rotate_row(s.d, in.cosine + c * (s.d / 2), in.sine + c * (s.d / 2), 1, 1, w.k + c * w.pitch);
        widen_row(s.d, in.v.data + row * in.v.row + head * s.d, w.v + c * w.pitch);
    }
}

// Normed keys and averaged values of the slots of one version. Empty slots become zeros.
template <class T>
static void read_slots(const ReadInputs<T>& in, int64_t at, ReadScratch& w) {
    const MemoryShape& s = in.shape;
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        const float* key = in.memory.key + (at + slot) * s.d;
        const float* value = in.memory.value + (at + slot) * s.d;
        const float mass = in.memory.mass[at + slot], inverse_mass = mass > 0 ? 1.0f / mass : 0.0f;
        vf squares = {};
        for (int64_t i = 0; i < s.d; i += W) squares += load(key + i, s.d - i) * load(key + i, s.d - i);
        w.slot_rms[slot] = 1.0f / __builtin_sqrtf(sum(squares) / float(s.d) + 1e-6f);
        for (int64_t i = 0; i < s.d; i += W) {
            store(w.slot_key + slot * w.pitch + i, load(key + i, s.d - i) * w.slot_rms[slot]);
            store(w.slot_value + slot * w.pitch + i, mass > 0 ? load(value + i, s.d - i) * inverse_mass : vf{});
        }
    }
}

template <class T>
static void read_queries(const ReadInputs<T>& in, const Run& run, int64_t b, int64_t head, ReadScratch& w) {
    const MemoryShape& s = in.shape;
    const float scale = 1.0f / __builtin_sqrtf(float(s.d));
    for (int64_t i = 0; i < run.queries(); ++i) {
        const int64_t t = run.begin + i;
        float *q = w.q + i * w.pitch, *rotated = w.q_rotated + i * w.pitch;
        widen_row(s.d, in.q.data + (b * s.time + t) * in.q.row + head * s.d, rotated);
        for (int64_t j = 0; j < w.pitch; j += W) store(q + j, load(rotated + j) * scale);
        const int64_t angle = (s.window + t) * (s.d / 2);
        rotate_row(s.d, in.cosine + angle, in.sine + angle, 1, scale, rotated);
    }
    transpose(run.queries(), s.d, w.q_rotated, w.pitch, w.rotated_columns, RUN);
    if (run.slots) transpose(run.queries(), s.d, w.q, w.pitch, w.q_columns, RUN);
}

// Scores of a run: a row per key of its window, then a row per slot, masked with -inf. Returns the rows.
template <class T>
static int64_t read_scores(const ReadInputs<T>& in, const Run& run, int64_t at, ReadScratch& w) {
    const MemoryShape& s = in.shape;
    const int64_t columns = round_up(run.queries(), W);
    product<false>(run.keys, columns, s.d, w.k + run.key_begin * w.pitch, w.pitch, 1, w.rotated_columns, RUN, w.scores, RUN);
    for (int64_t r = 0; r < run.keys; ++r) {  // query i sees context rows (begin + i, window + begin + i]
        const int64_t key = run.key_begin + r, first = key - s.window - run.begin, last = key - run.begin - 1;
        float* line = w.scores + r * RUN;
        for (int64_t i = 0; i < min64(first, columns); ++i) line[i] = -__builtin_inff();
        for (int64_t i = last + 1; i < columns; ++i) line[i] = -__builtin_inff();
    }
    if (!run.slots) return run.keys;
    float* slots = w.scores + run.keys * RUN;
    product<false>(s.slots, columns, s.d, w.slot_key, w.pitch, 1, w.q_columns, RUN, slots, RUN);
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        const float mass = in.memory.mass[at + slot];
        const float bias = mass > 0 ? logf(mass) : -__builtin_inff();
        for (int64_t i = 0; i < columns; i += W) store(slots + slot * RUN + i, load(slots + slot * RUN + i) + bias);
    }
    return run.keys + s.slots;
}

// Scores to exponentials in place; sums (columns) of them, and the log of the softmax's denominators to lse.
static void read_softmax(int64_t rows, int64_t queries, float* scores, float* sums, float* lse) {
    for (int64_t i = 0; i < queries; i += W) {
        vf top = load(scores + i);
        for (int64_t r = 1; r < rows; ++r) top = max(load(scores + r * RUN + i), top);
        vf total = {};
        for (int64_t r = 0; r < rows; ++r) {
            const vf e = exp(load(scores + r * RUN + i) - top);
            total += e;
            store(scores + r * RUN + i, e);
        }
        store(sums + i, total);
        for (int64_t lane = i; lane < min64(i + W, queries); ++lane) lse[lane] = logf(sums[lane]) + top[lane - i];
    }
}

template <class T>
static void read_task(const ReadInputs<T>& in, int64_t b, int64_t head, T* out, float* lse, ReadScratch& w) {
    const MemoryShape& s = in.shape;
    read_context(in, b, head, w);
    int64_t prepared = -1;
    Run run{0, 0, 0, 0, 0, false};
    while (run.end < s.time) {
        run = next_run(s, b, run.end, run.version);
        const int64_t at = slot_index(s, b, run.version, head);
        if (run.slots && prepared != run.version) read_slots(in, at, w);
        if (run.slots) prepared = run.version;
        read_queries(in, run, b, head, w);
        const int64_t rows = read_scores(in, run, at, w), queries = run.queries();
        read_softmax(rows, queries, w.scores, w.sums, lse + (b * s.heads + head) * s.time + run.begin);
        product<false>(queries, w.pitch, run.keys, w.scores, 1, RUN, w.v + run.key_begin * w.pitch, w.pitch, w.out, w.pitch);
        if (run.slots)
            product<true>(queries, w.pitch, s.slots, w.scores + run.keys * RUN, 1, RUN, w.slot_value, w.pitch, w.out, w.pitch);
        for (int64_t i = 0; i < queries; ++i) {
            T* to = out + ((b * s.time + run.begin + i) * s.heads + head) * s.d;
            const float scale = 1.0f / w.sums[i];
            for (int64_t j = 0; j < s.d; j += W) store(to + j, load(w.out + i * w.pitch + j) * scale, s.d - j);
        }
    }
}

// out (batch, time, heads, d) and lse (batch, heads, time), contiguous.
template <class T>
static int memory_read(const ReadInputs<T>& in, T* out, float* lse, int threads) {
    const MemoryShape& s = in.shape;
    if (!s.valid()) return MEMORY_BAD_POSITION;
    Parts size(nullptr);
    ReadScratch(s, false, size);
    bool done = true;
    threads = s.useful_threads(threads);
    const int64_t tasks = s.batch * s.heads;
#pragma omp parallel num_threads(threads) if (tasks > 1 && threads > 1) reduction(&& : done)
    {
        const Scratch block(size.used);
        Parts parts(block.data);
        ReadScratch w(s, false, parts);
        done = block.data != nullptr;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task)
            if (block.data) read_task(in, task / s.heads, task % s.heads, out, lse, w);
    }
    return done ? MEMORY_DONE : MEMORY_NO_SCRATCH;
}

// Gradients of the inputs: dq (batch, time, heads, d), dk, dv (batch, context, heads, d), dmemory all versions.
template <class T>
struct ReadGradients {
    T *dq, *dk, *dv;
    Memory<float> dmemory;
};

// Scores to weights in place (lse is the forward pass's), and dscores = weight * (dweight - dout . out).
template <class T>
static void read_softmax_backward(const ReadInputs<T>& in, const Run& run, int64_t rows, int64_t b, int64_t head,
                                  const T* out, const float* lse, ReadScratch& w) {
    const MemoryShape& s = in.shape;
    const int64_t queries = run.queries(), columns = round_up(queries, W);
    for (int64_t i = 0; i < queries; ++i) {
        const T* y = out + ((b * s.time + run.begin + i) * s.heads + head) * s.d;
        vf dot = {};
        for (int64_t j = 0; j < s.d; j += W) dot += load(y + j, s.d - j) * load(w.out + i * w.pitch + j);
        w.sums[i] = sum(dot);
    }
    for (int64_t i = queries; i < columns; ++i) w.sums[i] = 0.0f;
    const float* denominator = lse + (b * s.heads + head) * s.time + run.begin;
    for (int64_t i = 0; i < columns; i += W) {
        const vf log_sum = load(denominator + i, queries - i), pull = load(w.sums + i);
        for (int64_t r = 0; r < rows; ++r) {
            const vf weight = exp(load(w.scores + r * RUN + i) - log_sum);
            store(w.scores + r * RUN + i, weight);
            store(w.dscores + r * RUN + i, weight * (load(w.dscores + r * RUN + i) - pull));
        }
    }
}

// Gradients at normed keys and averaged values of the slots to those at one version of the memory.
template <class T>
static void read_slots_backward(const ReadInputs<T>& in, const Run& run, int64_t at, const Memory<float>& dmemory,
                                ReadScratch& w) {
    const MemoryShape& s = in.shape;
    for (int64_t slot = 0; slot < s.slots; ++slot) {
        const float mass = in.memory.mass[at + slot];
        if (!(mass > 0)) continue;
        const float inverse_mass = 1.0f / mass, rms = w.slot_rms[slot];
        const float* dkey = w.dslot_key + slot * w.pitch;
        const float* dvalue = w.dslot_value + slot * w.pitch;
        vf key_dot = {}, value_dot = {};
        for (int64_t i = 0; i < s.d; i += W) {
            key_dot += load(dkey + i) * load(w.slot_key + slot * w.pitch + i);
            value_dot += load(dvalue + i) * load(w.slot_value + slot * w.pitch + i);
        }
        const float pull = sum(key_dot) / float(s.d);
        for (int64_t i = 0; i < s.d; i += W) {
            float *to_key = dmemory.key + (at + slot) * s.d + i, *to_value = dmemory.value + (at + slot) * s.d + i;
            const vf g = rms * (load(dkey + i) - pull * load(w.slot_key + slot * w.pitch + i));
            store(to_key, load(to_key, s.d - i) + g, s.d - i);
            store(to_value, load(to_value, s.d - i) + load(dvalue + i) * inverse_mass, s.d - i);
        }
        float dlog_mass = -sum(value_dot);
        for (int64_t i = 0; i < run.queries(); ++i) dlog_mass += w.dscores[(run.keys + slot) * RUN + i];
        dmemory.mass[at + slot] += dlog_mass * inverse_mass;
    }
}

template <class T>
static void read_run_backward(const ReadInputs<T>& in, const ReadGradients<T>& to, const Run& run, int64_t b,
                              int64_t head, const HeadRows<const T>& dout, const T* out, const float* lse, ReadScratch& w) {
    const MemoryShape& s = in.shape;
    const int64_t at = slot_index(s, b, run.version, head), pitch = w.pitch;
    const int64_t queries = run.queries(), columns = round_up(queries, W);
    read_queries(in, run, b, head, w);
    const int64_t rows = read_scores(in, run, at, w);
    for (int64_t i = 0; i < queries; ++i)  // w.out holds the gradient at the result
        widen_row(s.d, dout.data + (b * s.time + run.begin + i) * dout.row + head * s.d, w.out + i * pitch);
    transpose(queries, s.d, w.out, pitch, w.dout_columns, RUN);
    float *slot_scores = w.scores + run.keys * RUN, *slot_dscores = w.dscores + run.keys * RUN;
    const float *keys = w.k + run.key_begin * pitch, *values = w.v + run.key_begin * pitch;
    product<false>(run.keys, columns, s.d, values, pitch, 1, w.dout_columns, RUN, w.dscores, RUN);
    if (run.slots)
        product<false>(s.slots, columns, s.d, w.slot_value, pitch, 1, w.dout_columns, RUN, slot_dscores, RUN);
    read_softmax_backward(in, run, rows, b, head, out, lse, w);

    product<true>(run.keys, pitch, queries, w.scores, RUN, 1, w.out, pitch, w.dv + run.key_begin * pitch, pitch);
    product<true>(run.keys, pitch, queries, w.dscores, RUN, 1, w.q_rotated, pitch, w.dk + run.key_begin * pitch, pitch);
    product<false>(queries, pitch, run.keys, w.dscores, 1, RUN, keys, pitch, w.dq, pitch);
    for (int64_t i = 0; i < queries; ++i) {
        const int64_t angle = (s.window + run.begin + i) * (s.d / 2);
        rotate_row(s.d, in.cosine + angle, in.sine + angle, -1, 1, w.dq + i * pitch);
    }
    if (run.slots) {
        product<false>(s.slots, pitch, queries, slot_scores, RUN, 1, w.out, pitch, w.dslot_value, pitch);
        product<false>(s.slots, pitch, queries, slot_dscores, RUN, 1, w.q, pitch, w.dslot_key, pitch);
        product<true>(queries, pitch, s.slots, slot_dscores, 1, RUN, w.slot_key, pitch, w.dq, pitch);
        read_slots_backward(in, run, at, to.dmemory, w);
    }
    const float scale = 1.0f / __builtin_sqrtf(float(s.d));
    for (int64_t i = 0; i < queries; ++i) {
        T* dq = to.dq + ((b * s.time + run.begin + i) * s.heads + head) * s.d;
        for (int64_t j = 0; j < s.d; j += W) store(dq + j, load(w.dq + i * pitch + j) * scale, s.d - j);
    }
}

template <class T>
static void read_task_backward(const ReadInputs<T>& in, const ReadGradients<T>& to, int64_t b, int64_t head,
                               const HeadRows<const T>& dout, const T* out, const float* lse, ReadScratch& w) {
    const MemoryShape& s = in.shape;
    read_context(in, b, head, w);
    memset(w.dk, 0, s.context() * w.pitch * sizeof(float));
    memset(w.dv, 0, s.context() * w.pitch * sizeof(float));
    for (int64_t version = 0; version < s.versions(); ++version) {
        const int64_t at = slot_index(s, b, version, head);
        memset(to.dmemory.key + at * s.d, 0, s.slots * s.d * sizeof(float));
        memset(to.dmemory.value + at * s.d, 0, s.slots * s.d * sizeof(float));
        memset(to.dmemory.mass + at, 0, s.slots * sizeof(float));
    }
    int64_t prepared = -1;
    Run run{0, 0, 0, 0, 0, false};
    while (run.end < s.time) {
        run = next_run(s, b, run.end, run.version);
        if (run.slots && prepared != run.version) read_slots(in, slot_index(s, b, run.version, head), w);
        if (run.slots) prepared = run.version;
        read_run_backward(in, to, run, b, head, dout, out, lse, w);
    }
    for (int64_t c = 0; c < s.context(); ++c) {
        const int64_t row = ((b * s.context() + c) * s.heads + head) * s.d;
        rotate_row(s.d, in.cosine + c * (s.d / 2), in.sine + c * (s.d / 2), -1, 1, w.dk + c * w.pitch);
        narrow_row(s.d, w.dk + c * w.pitch, to.dk + row);
        narrow_row(s.d, w.dv + c * w.pitch, to.dv + row);
    }
}

// out and lse are the results of memory_read, dout the gradient at out.
template <class T>
static int memory_read_backward(const ReadInputs<T>& in, const ReadGradients<T>& to, HeadRows<const T> dout,
                                const T* out, const float* lse, int threads) {
    const MemoryShape& s = in.shape;
    if (!s.valid()) return MEMORY_BAD_POSITION;
    Parts size(nullptr);
    ReadScratch(s, true, size);
    bool done = true;
    threads = s.useful_threads(threads);
    const int64_t tasks = s.batch * s.heads;
#pragma omp parallel num_threads(threads) if (tasks > 1 && threads > 1) reduction(&& : done)
    {
        const Scratch block(size.used);
        Parts parts(block.data);
        ReadScratch w(s, true, parts);
        done = block.data != nullptr;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task)
            if (block.data) read_task_backward(in, to, task / s.heads, task % s.heads, dout, out, lse, w);
    }
    return done ? MEMORY_DONE : MEMORY_NO_SCRATCH;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
