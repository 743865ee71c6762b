// Drives every CPU kernel through its raw pointers, on shapes, strides and values taken from a string of bytes. Every
// buffer is a heap block of exactly the size that the kernel is told, so that the sanitizers see a step beyond it.
//
// With libFuzzer: clang++ -fsanitize=fuzzer,address,undefined. On its own (-DMM_STANDALONE): fuzz SECONDS [SEED]. Both
// with level.cpp.

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <memory>
#include <random>
#include <vector>

#define MM_STREAM_BYTES 256  // so that small results go past the caches, too
#include "mixed_keys.h"
#include "gated_scan.h"
#include "loss.h"
#include "mdi.h"
#include "norm.h"
#include "optimizer.h"
#include "orthogonalize.h"
#include "recurrence_backward.h"
#include "sample.h"
#include "scan.h"
#include "step.h"
#include "retained_attention_backward.h"
#include "window_attention_backward.h"

using namespace mm_rec::MM_LEVEL;

// Decisions come from the bytes, then from zeros; values from a generator that the bytes seed.
struct Source {
    const uint8_t* data;
    size_t size;
    std::minstd_rand values{1};
    int64_t number(int64_t low, int64_t high) {
        if (!size) return low;
        --size;
        const int64_t byte = *data++;
        values.seed(unsigned(values() + byte));
        return low + byte % (high - low + 1);
    }
    bool flag() { return number(0, 1) == 1; }
    float value() { return float(values() % 4001) / 1000.0f - 2.0f; }
};

// A heap block of n elements, filled: mostly small numbers, now and then an infinity, a NaN or an extreme.
template <class T>
struct Block {
    T* data;
    int64_t n;
    Block(Source& from, int64_t n) : data(static_cast<T*>(malloc(n ? n * sizeof(T) : 1))), n(n) {
        const float odd[] = {0.0f, 3e38f, -3e38f, 1e-40f, __builtin_inff(), __builtin_nanf("")};
        const bool strange = from.number(0, 15) == 1;
        for (int64_t i = 0; i < n; ++i) put(i, strange && from.values() % 8 == 0 ? odd[from.values() % 6] : from.value());
    }
    ~Block() { free(data); }
    Block(const Block&) = delete;
    void put(int64_t i, float x);
    operator T*() { return data; }
};
template <>
void Block<float>::put(int64_t i, float x) { data[i] = x; }
template <>
void Block<bf16>::put(int64_t i, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    data[i].bits = uint16_t(bits >> 16);
}
template <>
void Block<int64_t>::put(int64_t i, float) { data[i] = 0; }
template <>
void Block<int8_t>::put(int64_t i, float x) { data[i] = x > -2.0f && x < 2.0f ? int8_t(x * 60) : 127; }
template <>
void Block<uint8_t>::put(int64_t i, float) { data[i] = 0; }
template <>
void Block<int32_t>::put(int64_t i, float) { data[i] = 0; }
template <>
void Block<AdamW>::put(int64_t i, float) { data[i] = AdamW{}; }

// Evenly spaced rows: the block ends with the last element of the last row.
template <class T>
struct Strided : Block<T> {
    int64_t row;
    Strided(Source& from, int64_t rows, int64_t columns) : Strided(from, rows, columns, columns + from.number(0, 5)) {}
    Strided(Source& from, int64_t rows, int64_t columns, int64_t row)
        : Block<T>(from, (rows - 1) * row + columns), row(row) {}
};

typedef Block<float> Floats;
typedef Strided<float> Rows32;

static int threads_of(Source& from) { return int(from.number(1, 3)); }

template <class F>
static F* maybe(bool given, Block<F>& block) { return given ? block.data : nullptr; }

static void fill_resets(Source& from, Block<uint8_t>& reset) {
    for (int64_t i = 0; i < reset.n; ++i) reset.data[i] = from.values() % 5 == 0;
}

static void fuzz_scan(Source& from) {
    const int64_t batch = from.number(1, 5), time = from.number(1, 20), columns = from.number(1, 70), n = batch * time;
    const bool has_state = from.flag(), has_reset = from.flag();
    const int threads = threads_of(from);
    Rows32 a(from, n, columns), x(from, n, columns), ds(from, n, columns);
    Floats s0(from, batch * columns), s(from, n * columns), da(from, n * columns), dx(from, n * columns);
    Floats ds0(from, batch * columns);
    Block<uint8_t> reset(from, n);
    fill_resets(from, reset);
    const float* start = maybe(has_state, s0);
    const uint8_t* resets = maybe(has_reset, reset);
    scan_forward(batch, time, columns, a, a.row, x, x.row, start, resets, s, threads);
    scan_backward(batch, time, columns, ds, ds.row, s, a, a.row, start, resets, da, dx, maybe(from.flag(), ds0), threads);
}

template <class T>
static void fuzz_recurrence(Source& from) {
    const int64_t batch = from.number(1, 9), time = from.number(1, 40), heads = from.number(1, 4), d = from.number(1, 70);
    const int64_t width = heads * d, n = batch * time;
    const bool has_state = from.flag(), has_reset = from.flag();
    const int threads = threads_of(from);
    Rows32 z(from, n, width), gamma(from, n, width), dh(from, n, width);
    Strided<T> u(from, n, width);
    Floats w_g(from, width * d), h0(from, batch * width), h(from, n * width), h_last(from, batch * width);
    Block<uint8_t> reset(from, n);
    fill_resets(from, reset);
    const RecurrenceInputs<T> in{batch, time,  heads,     d,   z,
                                 z.row, u,     u.row,     gamma, gamma.row,
                                 w_g,   maybe(has_state, h0), maybe(has_reset, reset)};
    recurrence_forward(in, h, h_last, threads);
    const int group = recurrence_group(batch, heads);
    Floats dh_last(from, batch * width), dz(from, n * width), dgamma(from, n * width), dh0(from, batch * width);
    Floats dw_g(from, (batch + group - 1) / group * width * d);
    Block<T> du(from, n * width);
    const RecurrenceFromAbove above{dh, dh.row, maybe(from.flag(), dh_last)};
    recurrence_backward(in, above, RecurrenceGradients<T>{dz, du, dgamma, dw_g, dh0}, h, threads);
}

template <class T>
static void fuzz_mdi(Source& from) {
    const int64_t rows = from.number(1, 90), columns = from.number(1, 70);
    const bool gated = from.flag();
    const int threads = threads_of(from);
    Strided<T> decay(from, rows, columns), candidate(from, rows, columns), gate(from, rows, columns);
    Floats decay_bias(from, columns), gate_bias(from, columns), gamma(from, rows * columns), x(from, rows * columns);
    T* gate_data = maybe(gated, gate);
    float* gate_bias_data = maybe(gated, gate_bias);
    mdi_forward<T>(rows, columns, decay, decay.row, decay_bias, candidate, candidate.row, gate_data, gate.row,
                   gate_bias_data, gamma, x, threads);
    Rows32 dgamma(from, rows, columns), dx(from, rows, columns);
    Block<T> ddecay(from, rows * columns), dcandidate(from, rows * columns), dgate(from, gated ? rows * columns : 0);
    Floats ddecay_bias(from, columns), dgate_bias(from, gated ? columns : 0);
    Floats scratch(from, mdi_backward_scratch(rows, columns));
    mdi_backward<T>(rows, columns, maybe(from.flag(), dgamma), dgamma.row, maybe(from.flag(), dx), dx.row, decay,
                    decay.row, decay_bias, candidate, candidate.row, gate_data, gate.row, gate_bias_data, ddecay,
                    ddecay_bias, dcandidate, dgate, dgate_bias, scratch, threads);
}

template <class T>
static void fuzz_gated_scan(Source& from) {
    const int64_t batch = from.number(1, 3), time = from.number(1, 12), heads = from.number(1, 11), d = from.number(1, 40);
    const int64_t width = heads * d, n = batch * time, row = 3 * width + from.number(0, 5);
    const bool has_state = from.flag(), has_reset = from.flag();
    const int threads = threads_of(from);
    Strided<T> z(from, n, width, row), u(from, n, width, row), r(from, n, width, row), decay(from, n, width);
    Strided<T> dz(from, n, width, row), du(from, n, width, row), dr(from, n, width, row), dy(from, n, width);
    Floats decay_bias(from, width), gate_bias(from, width), h0(from, batch * width), h(from, n * width);
    Floats ddecay_bias(from, batch * width), dgate_bias(from, batch * width), dh0(from, batch * width);
    Floats dh_last(from, batch * width);
    Block<T> y(from, n * width), ddecay(from, n * width);
    Block<uint8_t> reset(from, n);
    fill_resets(from, reset);
    const GatedScanInputs<T> in{batch, time,      heads,      d,         z,
                                u,     r,         row,        decay,     decay.row,
                                decay_bias, gate_bias, maybe(has_state, h0), maybe(has_reset, reset)};
    gated_scan_forward(in, h.data, y.data, threads);
    const GatedScanGradients<T> out{dz, du, dr, row, ddecay, ddecay_bias, dgate_bias, dh0};
    gated_scan_backward(in, GatedScanFromAbove<T>{dy, dy.row, maybe(from.flag(), dh_last)}, out, h.data, threads);
}

template <class T, class U>
static void fuzz_norm(Source& from) {
    const int64_t outer = from.number(1, 20), inner = from.number(1, 4), n = from.number(1, 70), rows = outer * inner;
    const int64_t inner_stride = n + from.number(0, 3), outer_stride = inner * inner_stride + from.number(0, 3);
    const int threads = threads_of(from);
    const int64_t span = (outer - 1) * outer_stride + (inner - 1) * inner_stride + n;
    Block<T> x(from, span), dx(from, rows * n);
    Block<U> y(from, rows * n), dy(from, span);
    const Rows<const T> from_rows{x, inner, outer_stride, inner_stride};
    rms_norm_forward(rows, n, from_rows, y.data, threads);
    rms_norm_backward(rows, n, Rows<const U>{dy, inner, outer_stride, inner_stride}, from_rows, dx.data, threads);
}

template <class T>
static void fuzz_rows(Source& from) {
    const int64_t rows = from.number(1, 40), heads = from.number(1, 4), d = from.number(1, 40), n = heads * d;
    const int threads = threads_of(from);
    Rows32 x(from, rows, n), dtotal(from, rows, n);
    Strided<T> delta(from, rows, n), dn(from, rows, n);
    Floats total(from, rows * n), dx(from, rows * n);
    Block<T> normed(from, rows * n), ddelta(from, rows * n);
    add_rms_norm_forward<T>(rows, n, x, x.row, delta, delta.row, total, normed, threads);
    add_rms_norm_backward<T>(rows, n, maybe(from.flag(), dtotal), dtotal.row, dn, dn.row, total, dx, ddelta, threads);
    readout_forward<T>(rows, heads, d, x, x.row, delta, delta.row, normed, threads);
    readout_backward<T>(rows, heads, d, dn, dn.row, x, x.row, delta, delta.row, dx, ddelta, threads);
    relu_squared_forward<T>(rows * n, normed, ddelta, threads);
    relu_squared_backward<T>(rows * n, ddelta, normed, ddelta, threads);
}

template <class T>
static void fuzz_loss(Source& from) {
    const int64_t rows = from.number(1, 9), columns = from.number(1, 200);
    Block<T> logits(from, rows * columns);
    Block<int64_t> target(from, rows);
    Floats weight(from, rows), nll(from, rows);
    for (int64_t r = 0; r < rows; ++r) target.data[r] = int64_t(from.values() % columns);
    if (from.flag()) weight.data[0] = 0.0f;
    cross_entropy<T>(rows, columns, logits, target, weight, nll, from.flag(), threads_of(from));
}

static void fuzz_optimizer(Source& from) {
    const int64_t count = from.number(1, 3);
    const int threads = threads_of(from);
    struct Tensor {
        int64_t n;
        bool half;
        Floats master, m, v, grad;
        Block<bf16> half_grad, out;
        Tensor(Source& from)
            : n(from.number(0, 255) * from.number(0, 255)), half(from.flag()), master(from, n), m(from, n), v(from, n),
              grad(from, half ? 0 : n), half_grad(from, half ? n : 0), out(from, n) {}
        const void* gradient() { return half ? static_cast<void*>(half_grad.data) : grad.data; }
    };
    Tensor tensors[3] = {from, from, from};
    Block<int64_t> sizes(from, count);
    Block<AdamW> settings(from, count);
    int32_t types[3];
    float *master[3], *m[3], *v[3];
    const void* grad[3];
    bf16* out[3];
    for (int64_t k = 0; k < count; ++k) {
        Tensor& one = tensors[k];
        sizes.data[k] = one.n;
        types[k] = one.half;
        master[k] = one.master;
        m[k] = one.m;
        v[k] = one.v;
        grad[k] = one.gradient();
        out[k] = maybe(from.flag(), one.out);
        settings.data[k] = AdamW{0.9f, 0.95f, 1e-8f, 1.0f, 1e-3f, 2.0f, 1.0f};
    }
    adamw({count, sizes, master, m, v, grad, types, out, settings}, threads);
    sum_of_squares(count, grad, sizes, types, threads);
    const bool half = from.flag();  // is what Muon makes of the moments bfloat16? It is as long as `out`, or as `v`
    void* directions[3];
    for (int64_t k = 0; k < count; ++k)
        directions[k] = half ? static_cast<void*>(tensors[k].out.data) : static_cast<void*>(tensors[k].v.data);
    muon_momentum(count, sizes, m, grad, types, directions, half, {0.95f, 1.0f}, threads);
    const MuonStep steps[3] = {{1.0f, 0.1f}, {0.9f, 0.0f}, {0.5f, 1.0f}};
    bf16* none[3] = {};
    muon_step(count, sizes, master, directions, half, half ? none : out, steps, threads);
}

// Positions as documents make them, or anything at all.
static void fill_positions(Source& from, int64_t batch, int64_t time, int64_t window, Block<int64_t>& position) {
    const bool wild = from.number(0, 7) == 1;
    for (int64_t b = 0; b < batch; ++b) {
        int64_t place = from.number(0, 255) * from.number(0, 3);
        for (int64_t t = 0; t < time; ++t, ++place) {
            if (from.values() % 40 == 0) place = 0;
            position.data[b * time + t] = wild ? int64_t(from.values() % (4 * window)) - window / 2 : place;
        }
    }
}

// Rows of heads: those of a sequence evenly spaced, and now and then a gap between sequences.
template <class T>
struct Heads : Block<T> {
    int64_t sequence, row;
    Heads(Source& from, int64_t batch, int64_t time, int64_t width)
        : Heads(from, batch, time, width, width + from.number(0, 5), from.number(0, 9)) {}
    Heads(Source& from, int64_t batch, int64_t time, int64_t width, int64_t row, int64_t gap)
        : Block<T>(from, (batch - 1) * (time * row + gap) + (time - 1) * row + width), sequence(time * row + gap),
          row(row) {}
    HeadRows<const T> rows() const { return {this->data, sequence, row}; }
};

template <class T>
static void fuzz_window_attention(Source& from) {
    const int64_t batch = from.number(1, 3), time = from.number(1, 100), window = from.number(1, 80);
    const int64_t heads = from.number(1, 3), d = 2 * from.number(1, 35), width = heads * d, context = window + time;
    const int threads = threads_of(from);
    Block<int64_t> position(from, batch * time);
    fill_positions(from, batch, time, window, position);
    Heads<T> q(from, batch, time, width), k(from, batch, context, width), v(from, batch, context, width);
    Floats cosine(from, context * d / 2), sine(from, context * d / 2), lse(from, batch * heads * time);
    Block<T> out(from, batch * time * width);
    const AttentionInputs<T> in{{batch, time, window, heads, d, position}, q.rows(), k.rows(), v.rows(), cosine, sine};
    const int done = window_attention<T>(in, out, lse, threads);

    Block<T> dq(from, batch * time * width), dk(from, batch * context * width), dv(from, batch * context * width);
    Heads<T> dout(from, batch, time, width);
    const AttentionFromAbove<T> above{dout.rows(), {out, time * width, width}, lse};
    if (window_attention_backward(in, above, AttentionGradients<T>{dq, dk, dv}, threads) != done) abort();
}

template <class T>
static void fuzz_mixed_keys(Source& from) {
    const int64_t batch = from.number(1, 3), time = from.number(1, 60), window = from.number(1, 20);
    const int64_t reach = from.number(1, min64(6, window + 1)), heads = from.number(1, 3), d = from.number(1, 70);
    const int64_t width = heads * d, context = window + time;
    const int threads = threads_of(from);
    Block<int64_t> position(from, batch * time);
    fill_positions(from, batch, time, window, position);
    Heads<T> k(from, batch, context, width), dkey(from, batch, time, width);
    Floats taps(from, width * reach), dtaps(from, batch * width * reach);
    Block<T> key(from, batch * time * width), dk(from, batch * context * width);
    const KeyInputs<T> in{{batch, time, window, heads, d, position}, reach, k.rows(), taps};
    mixed_keys<T>(in, key, threads);
    mixed_keys_backward<T>(in, dkey.rows(), dk, dtaps, threads);
}

// Which pairs are kept, whatever the scores are, and attention over them.
template <class T>
static void fuzz_retained(Source& from) {
    const int64_t batch = from.number(1, 3), time = from.number(1, 150), window = from.number(1, 40);
    const int64_t heads = from.number(1, 3), slots = from.number(1, 50), d = 2 * from.number(1, 40), width = heads * d;
    const int64_t context = window + time, runs = (time + RUN - 1) / RUN, pairs = batch * heads * slots;
    const int threads = threads_of(from);
    Block<int64_t> position(from, batch * time);
    fill_positions(from, batch, time, window, position);
    Heads<T> q(from, batch, time, width), k(from, batch, context, width), v(from, batch, context, width);
    Heads<T> dout(from, batch, time, width);
    Floats score(from, batch * context * heads), kept_score(from, pairs), lse(from, batch * heads * time);
    Block<int32_t> slot(from, batch * heads * time), held(from, batch * heads * (runs + 1) * slots);
    const ContextShape shape{batch, time, window, heads, d, position};
    const int done = retain({shape, slots, score, kept_score}, {slot, held}, threads);
    if (done != KERNEL_DONE) return;
    Block<T> kept_k(from, pairs * d), kept_v(from, pairs * d), out(from, batch * time * width);
    const RetainedInputs<T> in{shape, slots, q.rows(), k.rows(), v.rows(), score, slot, held, kept_k, kept_v, kept_score};
    retained_attention<T>(in, out, lse, threads);

    Block<T> dq(from, batch * time * width), dk(from, batch * context * width), dv(from, batch * context * width);
    Block<T> dkept_k(from, pairs * d), dkept_v(from, pairs * d);
    Floats dscore(from, batch * context * heads), dkept_score(from, pairs);
    const AttentionFromAbove<T> above{dout.rows(), {out, time * width, width}, lse};
    retained_attention_backward<T>(in, above, {dq, dk, dv, dscore, dkept_k, dkept_v, dkept_score}, threads);
}

// A model of random sizes, its weights each a block of their own.
struct StepModel {
    Source& from;
    std::vector<std::shared_ptr<void>> kept;
    std::vector<StepBlock> blocks;
    StepPlan plan{};

    template <class T>
    T* block(int64_t n) {
        auto made = std::make_shared<Block<T>>(from, n);
        kept.push_back(made);
        return made->data;
    }
    StepMatrix matrix(int64_t rows, int64_t columns) {
        if (from.flag()) return {block<int8_t>(rows * columns), block<float>(rows), STEP_INT8};
        if (plan.type == 1) return {block<bf16>(rows * columns), nullptr, STEP_BFLOAT16};
        return {block<float>(rows * columns), nullptr, STEP_FLOAT32};
    }
    explicit StepModel(Source& from, int64_t type) : from(from) {
        StepPlan& p = plan;
        p.type = type;
        p.heads = from.number(1, 3);
        p.width = p.heads * 2 * from.number(1, 20);
        p.hidden = from.number(1, 70);
        p.decay_width = from.number(1, 20);
        p.vocabulary = from.number(1, 50);
        p.window = from.number(1, 40);
        p.slots = from.number(1, 40);
        p.reach = from.number(1, min64(5, p.window + 1));
        p.blocks = from.number(1, 3);
        p.experts = from.number(1, 2);
        const int64_t every = from.number(1, 3), d = p.width / p.heads;
        p.memory_blocks = p.blocks / every;
        for (int64_t i = 0; i < p.experts * p.blocks; ++i) {
            StepBlock b{};
            b.in_proj = matrix(3 * p.width + p.decay_width, p.width);
            b.decay_proj = matrix(p.width, p.decay_width);
            b.out_proj = matrix(p.width, p.width);
            b.ffn_up = matrix(p.hidden, p.width);
            b.ffn_down = matrix(p.width, p.hidden);
            b.decay_bias = block<float>(p.width);
            b.gate_bias = block<float>(p.width);
            if ((i % p.blocks + 1) % every == 0) {
                b.w_g = block<float>(p.width * d);
                b.qkv_proj = matrix(3 * p.width, p.width);
                b.attention_out = matrix(p.width, p.width);
                b.score_proj = matrix(p.heads, p.width);
                b.score_bias = block<float>(p.heads);
                b.key_taps = block<float>(p.width * p.reach);
            }
            blocks.push_back(b);
        }
        p.block = blocks.data();
        p.embedding = matrix(p.vocabulary, p.width);
        if (p.experts > 1) {
            p.fusion_gate = matrix(p.experts, p.experts * p.width);
            p.fusion_mix = matrix(p.width, p.width);
        }
        p.cosine = block<float>(p.window * (d / 2));
        p.sine = block<float>(p.window * (d / 2));
    }
};

template <class T>
static void fuzz_step(Source& from) {
    const int64_t batch = from.number(1, 19), offset = from.number(0, 3), room = from.number(1, 3);
    const bool wild = from.number(0, 15) == 1, in_place = from.flag();
    const int threads = threads_of(from);
    StepModel model(from, sizeof(T) == 2);
    const StepPlan& p = model.plan;
    const int64_t n = p.experts * p.blocks * batch * p.width, capacity = p.window + offset + room;
    const int64_t memories = p.experts * p.memory_blocks;
    Block<int64_t> tokens(from, batch), position(from, batch);
    fill_positions(from, 1, batch, p.window, position);
    for (int64_t b = 0; b < batch; ++b) tokens.data[b] = int64_t(from.values() % p.vocabulary) - (wild && b == 0);
    Floats h(from, n), h_after(from, n), logits(from, batch * p.vocabulary);
    const Scratch scratch(step_scratch(p, batch, threads));
    Block<T> ring(from, memories * 3 * batch * capacity * p.width);
    const int64_t pairs = memories * batch * p.heads * p.slots;
    Floats scores(from, memories * batch * capacity * p.heads), kept_score(from, pairs);
    Block<T> kept(from, 2 * pairs * (p.width / p.heads));
    const StepState state{position, h, in_place ? h.data : h_after.data, ring, scores, capacity, offset, kept, kept_score};
    step(p, state, batch, tokens, logits, scratch.data, threads);
}

// A matrix packed, and its products with a few vectors: as many bytes as the layout says, and the same bits.
static void fuzz_packed(Source& from) {
    const int64_t rows = from.number(1, 70), columns = from.number(1, 9) * from.number(1, 128);
    const int64_t batch = from.number(1, STEP_BATCH + 2), begin = from.values() % rows;
    const int64_t end = begin + 1 + int64_t(from.values()) % (rows - begin), chunks = columns / PACKED_CHUNK;
    const int threads = threads_of(from);
#if defined(__AVX512BF16__)
    using X = bf16;
#else
    using X = float;
#endif
    const int64_t pitch = round_up(columns, SPAN<X>);
    Block<bf16> w(from, rows * columns);
    for (int64_t i = from.flag() ? 0 : w.n; i < w.n; ++i) w.data[i].bits = uint16_t(from.values() >> 8);
    Block<X> x(from, batch * pitch), widened(from, W * columns);
    for (int64_t g = 0; g < batch; ++g) memset(x.data + g * pitch + columns, 0, (pitch - columns) * sizeof(X));
    Block<uint8_t> base(from, rows * chunks);
    Block<int32_t> start(from, (rows + PACKED_UNIT - 1) / PACKED_UNIT);
    const auto starts = reinterpret_cast<uint32_t*>(start.data);
    Block<uint8_t> data(from, pack_layout(rows, columns, w, base, starts, threads));
    pack(rows, columns, w, base, starts, data, threads);
    const PackedMatrix packed{w, data, base, starts};
    Floats expected(from, batch * rows), out(from, batch * rows);
    step_product({w, nullptr, STEP_BFLOAT16}, batch, begin, end, columns, x.data, pitch,
                 static_cast<const float*>(nullptr), expected.data, rows, widened.data);
    step_product({&packed, nullptr, STEP_PACKED}, batch, begin, end, columns, x.data, pitch,
                 static_cast<const float*>(nullptr), out.data, rows, widened.data);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = b * rows + begin; i < b * rows + end; ++i) {
            const bool number = out.data[i] == out.data[i];
            if (number ? out.data[i] != expected.data[i] : expected.data[i] == expected.data[i]) abort();
        }
}

static void fuzz_sample(Source& from) {
    const int64_t rows = from.number(1, 4), n = from.number(1, 250) * from.number(1, 3);
    const int threads = threads_of(from);
    const bool flat = from.flag(), wild = from.number(0, 15) == 1;
    Rows32 logits(from, rows, n);
    for (int64_t i = 0; flat && i < logits.n; ++i) logits.data[i] = 1.0f;
    Block<int64_t> seen(from, from.number(0, 5)), barred(from, from.number(0, 5)), tokens(from, rows);
    for (int64_t i = 0; i < seen.n; ++i) seen.data[i] = int64_t(from.values() % n) - wild;
    for (int64_t i = 0; i < barred.n; ++i) barred.data[i] = int64_t(from.values() % n) + wild * n;
    std::vector<SampleRow> how(rows);
    std::vector<const SampleRow*> pointers;
    for (SampleRow& row : how) {
        row = {double(from.number(0, 255)) / 256, 1.0, 0.0, 1.0f, 1.0f, 0, seen, seen.n, barred, barred.n};
        if (from.flag()) row.top_p = double(from.number(1, 100)) / 100;
        if (from.flag()) row.min_p = double(from.number(0, 10)) / 10;
        if (from.flag()) row.repetition_penalty = float(from.number(1, 20)) / 10;
        row.temperature = float(from.number(0, 10)) / 5;
        row.top_k = from.number(0, 255);
        pointers.push_back(&row);
    }
    const Scratch scratch(sample_scratch(n, threads));
    sample(rows, n, logits, logits.row, pointers.data(), tokens, scratch.data, threads);
    for (int64_t r = 0; r < rows; ++r)
        if (tokens.data[r] < 0 || tokens.data[r] >= n) abort();
}

// Calls run(A, B, C, D) with operands of any layout and two equal results to write or add to, which must stay equal.
template <class T, class F>
static void fuzz_product(Source& from, F run) {
    const int64_t rows = from.number(1, 70), columns = from.number(1, 150), depth = from.number(1, 130);
    const bool a_last = from.flag(), b_last = from.flag();
    Strided<bf16> a(from, a_last ? rows : depth, a_last ? depth : rows);
    Strided<bf16> b(from, b_last ? columns : depth, b_last ? depth : columns);
    Strided<T> c(from, rows, columns), d(from, rows, columns, c.row);
    memcpy(d.data, c.data, c.n * sizeof(T));
    const bool add = from.flag();
    run(ProductOperand{a, rows, depth, a.row, a_last}, ProductOperand{b, columns, depth, b.row, b_last},
        ProductResult<T>{c, c.row, add ? c.data : nullptr}, ProductResult<T>{d, d.row, add ? d.data : nullptr});
    if (memcmp(c.data, d.data, c.n * sizeof(T))) abort();
}

// Blocks of any size, down to one step of one panel; a sum is the same whatever they are.
template <class T>
static void fuzz_tile_product(Source& from) {
    const TileBlocks most{PANEL * from.number(1, 3), PANEL * from.number(1, 3), STEP * from.number(1, 4)};
    const int threads = threads_of(from);
    fuzz_product<T>(from, [&](auto a, auto b, auto c, auto d) {
        if (!tile_product(a, b, c, most, threads) || !tile_product(a, b, d, TILE_BLOCKS, 1)) abort();
    });
}
template <class T>
static void fuzz_vector_product(Source& from) {
    const VectorBlocks most{TILE * from.number(1, 3), STEP * from.number(1, 4)};
    const int threads = threads_of(from);
    fuzz_product<T>(from, [&](auto a, auto b, auto c, auto d) {
        if (!vector_product(a, b, c, most, threads) || !vector_product(a, b, d, VECTOR_BLOCKS, 1)) abort();
    });
}

// Matrices of any shape; what comes out is the same whatever the number of threads.
template <class Machine>
static void fuzz_orthogonalize(Source& from) {
    const int64_t count = from.number(1, 3);
    const int threads = threads_of(from);
    const PolarStep steps[5] = {{8.2f, -22.9f, 16.4f}, {4.1f, -2.9f, 0.5f}, {3.9f, -2.8f, 0.5f}, {3.3f, -2.4f, 0.5f},
                                {2.3f, -1.6f, 0.4f}};
    const PolarSteps how{steps, from.number(1, 5), from.number(1, 5)};
    Block<int64_t> rows(from, count), columns(from, count);
    std::vector<std::unique_ptr<Block<bf16>>> blocks;
    bf16 *data[2][3];
    for (int64_t k = 0; k < count; ++k) {
        rows.data[k] = from.number(1, from.flag() ? 40 : 140);
        columns.data[k] = from.number(1, from.flag() ? 40 : 140);
        for (auto& copy : data) {
            blocks.push_back(std::make_unique<Block<bf16>>(from, rows.data[k] * columns.data[k]));
            copy[k] = *blocks.back();
        }
        memcpy(data[1][k], data[0][k], blocks.back()->n * sizeof(bf16));
    }
    for (int copy = 0; copy < 2; ++copy)
        if (!orthogonalize<Machine>(count, data[copy], rows, columns, how, copy ? threads : 1)) abort();
    for (int64_t k = 0; k < count; ++k)
        if (memcmp(data[0][k], data[1][k], rows.data[k] * columns.data[k] * sizeof(bf16))) abort();
}

extern "C" int mm_rec_best_level();  // of level.cpp

// Asking for the best level also asks Linux for the tile registers of AMX.
extern "C" int LLVMFuzzerInitialize(int*, char***) { return mm_rec_best_level() < 0; }

constexpr int64_t CASES = 31;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Source from{data, size};
    switch (from.number(0, CASES - 1)) {
        case 0: fuzz_scan(from); break;
        case 1: fuzz_recurrence<float>(from); break;
        case 2: fuzz_recurrence<bf16>(from); break;
        case 3: fuzz_mdi<float>(from); break;
        case 4: fuzz_mdi<bf16>(from); break;
        case 5: fuzz_norm<float, float>(from); break;
        case 6: fuzz_norm<float, bf16>(from); break;
        case 7: fuzz_norm<bf16, bf16>(from); break;
        case 8: fuzz_rows<float>(from); break;
        case 9: fuzz_rows<bf16>(from); break;
        case 10: fuzz_loss<float>(from); break;
        case 11: fuzz_loss<bf16>(from); break;
        case 12: fuzz_optimizer(from); break;
        case 13: fuzz_window_attention<float>(from); break;
        case 14: fuzz_window_attention<bf16>(from); break;
        case 15: fuzz_gated_scan<float>(from); break;
        case 16: fuzz_gated_scan<bf16>(from); break;
        case 17: fuzz_step<float>(from); break;
        case 18: fuzz_step<bf16>(from); break;
        case 19: fuzz_sample(from); break;
        case 20: fuzz_packed(from); break;
        case 21: fuzz_tile_product<float>(from); break;
        case 22: fuzz_tile_product<bf16>(from); break;
        case 23: fuzz_vector_product<float>(from); break;
        case 24: fuzz_vector_product<bf16>(from); break;
        case 25: fuzz_mixed_keys<float>(from); break;
        case 26: fuzz_mixed_keys<bf16>(from); break;
        case 27: fuzz_retained<float>(from); break;
        case 28: fuzz_retained<bf16>(from); break;
        case 29: fuzz_orthogonalize<TileMachine>(from); break;
        case 30: fuzz_orthogonalize<VectorMachine>(from); break;
    }
    return 0;
}

#if defined(MM_STANDALONE)
int main(int count, char** arguments) {
    LLVMFuzzerInitialize(&count, &arguments);
    const double seconds = count > 1 ? atof(arguments[1]) : 10;
    std::mt19937 random(count > 2 ? unsigned(atoi(arguments[2])) : 0);
    const time_t end = time(nullptr) + time_t(seconds);
    long runs = 0;
    for (; runs < CASES || time(nullptr) < end; ++runs) {
        std::vector<uint8_t> bytes(160);
        for (uint8_t& byte : bytes) byte = uint8_t(random());
        bytes[0] = uint8_t(runs % CASES);  // each kernel in turn
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    printf("%ld runs\n", runs);
}
#endif
