// One token of each sequence through the whole model: the experts that run, their fusion, the output head.
//
// All threads walk through the same phases (step_phases.h) and share the rows of a matrix, or the heads, of each; every
// weight is read once. The residual stream stays float32, and right sides of products are kept as
// float32 or, where the processor multiplies pairs of it and the activations are that, bfloat16. The norm before a
// product has no gain, so it is a factor of the product.
#pragma once

#include "mdi.h"
#include "step_attention.h"
#include "step_phases.h"
#include "step_product.h"

namespace mm_rec {
namespace MM_LEVEL {

constexpr int64_t STEP_UNIT = 16;  // rows: no vector of results has two owners

enum StepResult { STEP_DONE = 0, STEP_BAD_POSITION = 2, STEP_BAD_TOKEN = 3 };

// The weights of a block, named as in mm_rec/blocks/mm_rec_block.py; w_g is null unless it is a memory block.
struct StepBlock {
    StepMatrix in_proj, decay_proj, out_proj, qkv_proj, attention_out, score_proj, ffn_up, ffn_down;
    const float *decay_bias, *gate_bias, *w_g, *key_taps, *score_bias;
};

// A model and its sizes. `decay_width` is that of the decay's hidden layer, `reach` the tokens of a key, `slots` the pairs
// that a head keeps; `type` is that of the activations, 0 or 1.
struct StepPlan {
    int64_t type, width, heads, hidden, decay_width, vocabulary, window, slots, reach, blocks, memory_blocks, experts;
    StepMatrix embedding, fusion_gate, fusion_mix;  // fusion is read with more than one expert
    const StepBlock* block;                         // (experts, blocks)
    const float *cosine, *sine;                     // (window, d / 2): angles of the distance to a key
    int64_t d() const { return width / heads; }
    // What a memory block makes of its input: queries, keys, values, and from `scores` on, a whole unit, the scores.
    int64_t scores() const { return round_up(3 * width, STEP_UNIT); }
    int64_t attention_row() const { return scores() + heads; }
};

// What the sequences remember, in the order of experts and blocks. The ring has room for `capacity` rows a sequence:
// the last `window` tokens begin at row `offset`, and the new one is written behind them. h_after may be h.
struct StepState {
    const int64_t* position;   // (batch), of the token to read
    const float* h;            // (experts * blocks, batch, width)
    float* h_after;
    void* ring;                // (experts * memory_blocks, 3, batch, capacity, width), keys, values and own keys
    float* scores;             // (experts * memory_blocks, batch, capacity, heads), the ring of scores
    int64_t capacity, offset;
    void* kept;                // (experts * memory_blocks, 2, batch, heads, slots, d), keys and values; changed in place
    float* kept_score;         // (experts * memory_blocks, batch, heads, slots), changed in place
};

// gelu(x) = x Phi(x), from erfc(y) = e^{-y^2} P(1 / (1 + 0.327 y)), of absolute error 1.5e-7 (Abramowitz and Stegun
// 7.1.26), so that the small values of negative x keep their digits.
MM_INLINE vf gelu(vf x) {
    const vf y = max(x, -x) * 0.70710678f, t = reciprocal(1.0f + 0.3275911f * y);
    vf p = splat(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vf tail = 0.5f * x * (p * t * exp(-(y * y)));  // x times the smaller of Phi(x) and 1 - Phi(x)
    return x < 0.0f ? tail : x - tail;
}

// Right sides of products: a row of n elements for each sequence, filled up with zeros.
template <class X>
struct Vectors {
    X* data;
    int64_t n, pitch;
    Vectors(int64_t batch, int64_t n, Parts& parts)
        : data(nullptr), n(n), pitch(round_up(n, SPAN<X>)) {
        data = reinterpret_cast<X*>(parts.take((batch * pitch * int64_t(sizeof(X)) + 3) / 4));
    }
    X* operator[](int64_t b) const { return data + b * pitch; }
    void clear_ends(int64_t batch) const {
        for (int64_t b = 0; b < batch && n < pitch; ++b) memset(data + b * pitch + n, 0, (pitch - n) * sizeof(X));
    }
};

template <class X>
struct StepBuffers {
    StepPhase* phases;
    int64_t wide_row;
    float *x, *wide, *narrow;  // (batch, width), the residual stream; results of products, (batch, wide_row or width)
    Vectors<X> stream, read, decay, hidden, outputs;

    StepBuffers(const StepPlan& p, int64_t batch, Parts& parts)
        : phases(reinterpret_cast<StepPhase*>(parts.take(phase_count(p) * int64_t(sizeof(StepPhase) / sizeof(float))))),
          wide_row(max64(max64(3 * p.width + p.decay_width, p.hidden), p.attention_row())), x(parts.take(batch * p.width)),
          wide(parts.take(batch * wide_row)), narrow(parts.take(batch * p.width)), stream(batch, p.width, parts),
          read(batch, p.width, parts), decay(batch, p.decay_width, parts), hidden(batch, p.hidden, parts),
          outputs(batch, p.experts * p.width, parts) {}

    static int64_t phase_count(const StepPlan& p) { return p.experts * (2 + 8 * p.blocks) + 3; }

    void clear(const StepPlan& p, int64_t batch) const {
        memset(phases, 0, phase_count(p) * sizeof(StepPhase));
        stream.clear_ends(batch);
        read.clear_ends(batch);
        decay.clear_ends(batch);
        hidden.clear_ends(batch);
        outputs.clear_ends(batch);
    }
};

static int64_t longest_row(const StepPlan& p) { return max64(max64(p.hidden, p.decay_width), p.experts * p.width); }

// What one thread needs for itself.
template <class X>
struct StepThreadBuffers {
    X* widened;  // W rows of any matrix
    float *rms, *fed_back, *h, *alpha;
    int64_t rms_phase = 0;  // that rms was computed in; phases count from 1
    StepAttentionScratch attention;
    StepThreadBuffers(const StepPlan& p, int64_t batch, Parts& parts)
        : widened(reinterpret_cast<X*>(parts.take(W * longest_row(p)))),
          rms(parts.take(batch)), fed_back(parts.take(round_up(p.d(), W))), h(parts.take(round_up(p.d(), W))),
          alpha(parts.take(round_up(p.experts, W))),
          attention(p.heads, p.d(), p.window, p.slots, p.reach, parts) {}
};

// Floats of scratch that a step needs, whatever the types.
static int64_t step_scratch(const StepPlan& p, int64_t batch, int threads) {
    Parts parts(nullptr);
    StepBuffers<float>(p, batch, parts);
    for (int thread = 0; thread < threads; ++thread) StepThreadBuffers<float>(p, batch, parts);
    return parts.used;
}

template <class T, class X>
struct StepWorker {
    const StepPlan& p;
    const StepState& state;
    const int64_t batch;
    const int64_t* tokens;
    float* logits;
    const StepBuffers<X>& w;
    StepThreadBuffers<X>& own;
    StepWalk walk;

    void multiply(const StepMatrix& m, const Share& rows, const Vectors<X>& from, const float* scale, float* out,
                  int64_t out_row) const {
        step_product(m, batch, rows.begin, rows.end, from.n, from.data, from.pitch, scale, out, out_row, own.widened);
    }

    // The factors of the norm of the residual stream; every thread that needs them computes them, which takes no phase.
    const float* norms() {
        if (own.rms_phase != walk.phase) {
            for (int64_t b = 0; b < batch; ++b) own.rms[b] = inverse_rms(p.width, w.x + b * p.width);
            own.rms_phase = walk.phase;
        }
        return own.rms;
    }

    void embed() {
        walk.share(batch, 1, [&](Share rows) {
            for (int64_t b = rows.begin; b < rows.end; ++b) {
                float* x = w.x + b * p.width;
                step_read_row(p.embedding, tokens[b], p.width, x);
                store_row(p.width, x, x, inverse_rms(p.width, x));
                store_row(p.width, x, w.stream[b]);
            }
        });
    }

    // The residual stream += matrix times what was read.
    void add_product(const StepMatrix& m, const Vectors<X>& from) {
        walk.share(p.width, STEP_UNIT, [&](Share rows) {
            multiply(m, rows, from, nullptr, w.narrow, p.width);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t i = rows.begin; i < rows.end; i += W) {
                    const int64_t left = rows.end - i, at = b * p.width + i;
                    const vf x = load(w.x + at, left) + load(w.narrow + at, left);
                    store(w.x + at, x, left);
                    store(w.stream[b] + i, x, left);
                }
        });
    }

    // The wide product of a block's input; what the decay's hidden layer says goes through gelu at once.
    void project(const StepBlock& block) {
        const int64_t first = 3 * p.width;
        walk.share(first + p.decay_width, STEP_UNIT, [&](Share rows) {
            multiply(block.in_proj, rows, w.stream, norms(), w.wide, w.wide_row);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t i = max64(rows.begin, first); i < rows.end; i += W) {
                    const int64_t left = rows.end - i;
                    store(w.decay[b] + i - first, gelu(load(w.wide + b * w.wide_row + i, left)), left);
                }
        });
    }

    // One head of sequence b: decay, gate, recurrence and the gated readout.
    void recur(const StepBlock& block, int64_t index, int64_t b, int64_t head) const {
        const int64_t d = p.d(), column = head * d, at = (index * batch + b) * p.width + column;
        const float *z = w.wide + b * w.wide_row + column, *decay_logits = w.narrow + b * p.width + column;
        const float *r = z + p.width, *u = r + p.width;
        load_row(d, state.h + at, own.h);
        if (block.w_g)
            step_rows(1, 0, d, d, block.w_g + column * d, nullptr, own.h, 0, nullptr, own.fed_back, 0,
                      static_cast<float*>(nullptr));
        float* h = state.h_after + at;
        for (int64_t i = 0; i < d; i += W) {
            const int64_t left = d - i;
            const Decay decay = decay_of(load(decay_logits + i, left) + load(block.decay_bias + column + i, left));
            vf gate = load(u + i, left) + load(block.gate_bias + column + i, left);
            if (block.w_g) gate += load(own.fed_back + i);
            store(h + i, sigmoid(gate) * decay.c * load(z + i, left) + decay.gamma * load(own.h + i), left);
        }
        const vf scale = splat(inverse_rms(d, h));
        for (int64_t i = 0; i < d; i += W) {
            const vf gate = load(r + i, d - i);
            store(w.read[b] + column + i, load(h + i, d - i) * scale * (gate * sigmoid(gate)), d - i);
        }
    }

    // All heads; with more threads than heads, several share the sequences of a head.
    void recur_all(const StepBlock& block, int64_t index) {
        const int64_t d = p.d(), groups = min64(batch, (walk.threads + p.heads - 1) / p.heads);
        walk.share(p.heads * groups, 1, [&](Share tasks) {
            for (int64_t task = tasks.begin; task < tasks.end; ++task) {
                const int64_t head = task / groups, group = task % groups;
                const int64_t first = batch * group / groups, end = batch * (group + 1) / groups;
                step_product(block.decay_proj, end - first, head * d, (head + 1) * d, p.decay_width, w.decay[first],
                             w.decay.pitch, nullptr, w.narrow + first * p.width, p.width, own.widened);
                for (int64_t b = first; b < end; ++b) recur(block, index, b, head);
            }
        });
    }

    void attend(const StepBlock& block, int64_t index) {
        const int64_t scores = p.scores(), wide = p.attention_row(), ring = batch * state.capacity;
        walk.share(wide, STEP_UNIT, [&](Share rows) {
            const Share qkv{rows.begin, min64(rows.end, 3 * p.width)};
            const Share score{max64(rows.begin - scores, 0), rows.end - scores};
            if (qkv.begin < qkv.end) multiply(block.qkv_proj, qkv, w.stream, norms(), w.wide, wide);
            if (score.begin < score.end) multiply(block.score_proj, score, w.stream, norms(), w.wide + scores, wide);
        });
        T* k = static_cast<T*>(state.ring) + 3 * index * ring * p.width + state.offset * p.width;
        T *v = k + ring * p.width, *own_keys = v + ring * p.width;
        float* ring_scores = state.scores + index * ring * p.heads + state.offset * p.heads;
        const int64_t pairs = batch * p.heads * p.slots;
        T *kept_k = static_cast<T*>(state.kept) + 2 * index * pairs * p.d(), *kept_v = kept_k + pairs * p.d();
        const StepMemory<T> memory{p.heads, p.d(), p.window, p.reach, p.slots, block.key_taps, block.score_bias,
                                   w.wide + scores, wide, k, v, own_keys, ring_scores, state.capacity, kept_k, kept_v,
                                   state.kept_score + index * pairs};
        const StepAttention<T> in{p.cosine, p.sine, w.wide, wide, state.position, memory};
        const int64_t groups = min64(p.heads, (2 * walk.threads + batch - 1) / batch);  // of a sequence's heads
        walk.share(batch * groups, 1, [&](Share tasks) {
            for (int64_t task = tasks.begin; task < tasks.end; ++task) {
                const int64_t b = task / groups, group = task % groups;
                step_attend(in, b, p.heads * group / groups, p.heads * (group + 1) / groups, w.read[b], own.attention);
            }
        });
        add_product(block.attention_out, w.read);
    }

    void feed_forward(const StepBlock& block) {
        walk.share(p.hidden, STEP_UNIT, [&](Share rows) {
            multiply(block.ffn_up, rows, w.stream, norms(), w.wide, p.hidden);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t i = rows.begin; i < rows.end; i += W) {
                    const vf r = at_least(load(w.wide + b * p.hidden + i, rows.end - i), 0.0f);
                    store(w.hidden[b] + i, r * r, rows.end - i);
                }
        });
        add_product(block.ffn_down, w.hidden);
    }

    // Mixes the experts' normed outputs and leaves the product with W_m in the stream, which is then normed already.
    void fuse() {
        const int64_t n = p.experts;
        walk.share(batch, 1, [&](Share rows) {
            for (int64_t b = rows.begin; b < rows.end; ++b) {
                step_product(p.fusion_gate, 1, 0, n, n * p.width, w.outputs[b], 0, nullptr, own.alpha, 0, own.widened);
                const float total = exponentials(n, own.alpha);
                for (int64_t i = 0; i < p.width; i += W) {
                    vf mixed = {};
                    for (int64_t e = 0; e < n; ++e)
                        mixed += load(w.outputs[b] + e * p.width + i, p.width - i) * (own.alpha[e] / total);
                    store(w.read[b] + i, mixed, p.width - i);
                }
            }
        });
        walk.share(p.width, STEP_UNIT, [&](Share rows) {
            multiply(p.fusion_mix, rows, w.read, nullptr, w.x, p.width);
            for (int64_t b = 0; b < batch; ++b)
                for (int64_t i = rows.begin; i < rows.end; i += W)
                    store(w.stream[b] + i, load(w.x + b * p.width + i, rows.end - i), rows.end - i);
        });
    }

    void expert(int64_t e) {
        embed();
        int64_t memory = e * p.memory_blocks;
        for (int64_t i = e * p.blocks; i < (e + 1) * p.blocks; ++i) {
            const StepBlock& block = p.block[i];
            project(block);
            recur_all(block, i);
            add_product(block.out_proj, w.read);
            if (block.w_g) attend(block, memory++);
            feed_forward(block);
        }
        if (p.experts == 1) return;
        walk.share(batch, 1, [&](Share rows) {
            for (int64_t b = rows.begin; b < rows.end; ++b) {
                const float* x = w.x + b * p.width;
                store_row(p.width, x, w.outputs[b] + e * p.width, inverse_rms(p.width, x));
            }
        });
    }

    void run() {
        for (int64_t e = 0; e < p.experts; ++e) expert(e);
        if (p.experts > 1) fuse();
        walk.share(p.vocabulary, STEP_UNIT, [&](Share rows) {
            multiply(p.embedding, rows, w.stream, p.experts > 1 ? nullptr : norms(), logits, p.vocabulary);
        });
    }
};

template <class T, class X>
static void step_run(const StepPlan& p, const StepState& state, int64_t batch, const int64_t* tokens, float* logits,
                     float* scratch, int threads) {
    Parts parts(scratch);
    const StepBuffers<X> w(p, batch, parts);
    w.clear(p, batch);
    in_threads(threads, [&](int thread, int count) {
        Parts mine(scratch);
        mine.used = parts.used;
        StepThreadBuffers<X> own(p, batch, mine);
        for (int i = 0; i < thread; ++i) own = StepThreadBuffers<X>(p, batch, mine);
        StepWorker<T, X>{p, state, batch, tokens, logits, w, own, {w.phases, count}}.run();
    });
}

// logits (batch, vocabulary) after one more token of each sequence; `scratch` is step_scratch floats, 64-byte aligned.
static int step(const StepPlan& p, const StepState& state, int64_t batch, const int64_t* tokens, float* logits,
                float* scratch, int threads) {
    for (int64_t b = 0; b < batch; ++b) {
        if (state.position[b] < 0) return STEP_BAD_POSITION;
        if (tokens[b] < 0 || tokens[b] >= p.vocabulary) return STEP_BAD_TOKEN;
    }
#if defined(__AVX512BF16__)
    if (p.type == 1) {
        step_run<bf16, bf16>(p, state, batch, tokens, logits, scratch, threads);
        return STEP_DONE;
    }
#endif
    if (p.type == 1)
        step_run<bf16, float>(p, state, batch, tokens, logits, scratch, threads);
    else
        step_run<float, float>(p, state, batch, tokens, logits, scratch, threads);
    return STEP_DONE;
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
