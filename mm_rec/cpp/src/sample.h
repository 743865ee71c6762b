// Draws a token from each row of logits, whatever filters each row asks for, in a few passes over the row.
//
// Each filter keeps a first part of the tokens in descending order (of equally likely ones the lower id comes first).
// Where that part ends is found by halving an interval of weights, and what lies behind gets the weight 0: no row is
// ever sorted. The draw walks the kept tokens in the order of their ids. A row's token depends on that row alone.
#pragma once

#include <algorithm>

#include "scratch.h"

namespace mm_rec {
namespace MM_LEVEL {

// How to draw from one row, as in mm_rec.inference.sampling.Sampling; `number` is uniform in [0, 1).
struct SampleRow {
    double number, top_p, min_p;
    float repetition_penalty, temperature;
    int64_t top_k;
    const int64_t* seen;  // tokens to penalise, in any order, any number of times
    int64_t n_seen;
    const int64_t* barred;  // tokens that must not come
    int64_t n_barred;
};

constexpr float SAMPLE_MIN_TEMPERATURE = 1e-6f;  // below it float32 overflows, and the likeliest token is all there is

constexpr int64_t SAMPLE_RUN = 4 * W;  // weights added up side by side; rows are filled up with zeros to whole runs

// Buffers of one thread for rows of n tokens: weights, e^(score - highest score), and sums of W of them each.
struct SampleScratch {
    float *weight, *sums;
    SampleScratch(int64_t n, Parts& parts)
        : weight(parts.take(round_up(n, SAMPLE_RUN))), sums(parts.take(round_up(n, SAMPLE_RUN) / W)) {}
};

// The row's scores after penalty and bars, filled up with -inf; returns the highest one.
static float sample_scores(const SampleRow& row, int64_t n, const float* logits, float* score) {
    for (int64_t i = 0; i < n; i += W) store(score + i, load(logits + i, n - i));
    for (int64_t i = n; i < round_up(n, SAMPLE_RUN); ++i) score[i] = -__builtin_inff();
    const float penalty = row.repetition_penalty;
    for (int64_t i = 0; i < row.n_seen; ++i) {
        const int64_t id = row.seen[i];
        if (id < 0 || id >= n) continue;
        score[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
    }
    for (int64_t i = 0; i < row.n_barred; ++i)
        if (row.barred[i] >= 0 && row.barred[i] < n) score[row.barred[i]] = -__builtin_inff();
    vf top = load(score);
    for (int64_t i = W; i < n; i += W) top = max(load(score + i), top);
    return max(top);
}

// Scores to weights in place.
static void sample_weights(float temperature, int64_t n, float top, float* weight) {
    const float divisor = temperature > SAMPLE_MIN_TEMPERATURE ? temperature : SAMPLE_MIN_TEMPERATURE;
    for (int64_t i = 0; i < round_up(n, SAMPLE_RUN); i += W) {
        const vf scaled = (load(weight + i) - top) / divisor;
        store(weight + i, scaled <= 0.0f ? exp(scaled) : vf{});  // what is no number weighs nothing
    }
}

// What the tokens that weigh at least `low` weigh together, or how many there are.
template <bool COUNT>
static double sample_measure(int64_t n, const float* weight, float low) {
    constexpr int64_t BLOCK = 64 * SAMPLE_RUN;  // floats add up so many with little rounding
    double total = 0;
    for (int64_t block = 0; block < n; block += BLOCK) {
        vf parts[4] = {};
        for (int64_t i = block; i < min64(block + BLOCK, n); i += SAMPLE_RUN)
            for (int part = 0; part < 4; ++part) {
                const vf x = load(weight + i + part * W);
                parts[part] += x >= low ? (COUNT ? splat(1.0f) : x) : vf{};
            }
        total += sum((parts[0] + parts[1]) + (parts[2] + parts[3]));
    }
    return total;
}

MM_INLINE float sample_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Keeps the first tokens that weigh `share` together, or so many of them; the others weigh 0 afterwards.
template <bool COUNT>
static void sample_keep(int64_t n, double share, float* weight) {
    uint32_t low = 1, high = 0x3f800000;  // positive floats are ordered as their bits; the likeliest token weighs 1
    while (low < high) {
        const uint32_t middle = low + (high - low + 1) / 2;
        if (sample_measure<COUNT>(n, weight, sample_float(middle)) >= share)
            low = middle;
        else
            high = middle - 1;
    }
    const float last = sample_float(low);
    const float next = sample_float(low + 1);
    const double missing = share - sample_measure<COUNT>(n, weight, next);
    double equal = COUNT ? missing : __builtin_ceil(missing / last);  // so many that weigh `last`, from the lowest id
    const double all = sample_measure<true>(n, weight, last) - sample_measure<true>(n, weight, next);
    for (int64_t i = 0; i < n; i += W) {
        const vf x = load(weight + i);
        store(weight + i, x >= last ? x : vf{});
    }
    for (int64_t i = 0; i < n && equal < all; ++i)
        if (weight[i] == last && --equal < 0) weight[i] = 0;
}

// Draws among the tokens that weigh at least `low`, in the order of their ids.
static int64_t sample_draw(double number, int64_t n, float low, const SampleScratch& w) {
    const auto kept = [&](int64_t i) {  // of W tokens, the others as 0
        const vf x = load(w.weight + i);
        return x >= low ? x : vf{};
    };
    double total = 0;
    for (int64_t i = 0; i < n; i += W) total += w.sums[i / W] = sum(kept(i));
    double left = number * total;
    int64_t chunk = 0;
    for (int64_t i = 0; i < n; i += W) {
        if (w.sums[i / W] == 0) continue;
        chunk = i;
        if (left < w.sums[i / W]) break;
        left -= w.sums[i / W];  // rounding may leave a little behind the last one
    }
    const vf weight = kept(chunk);
    int64_t found = chunk;
    for (int i = 0; i < W; ++i) {
        if (weight[i] == 0) continue;
        found = chunk + i;
        left -= weight[i];
        if (left < 0) break;
    }
    return found;
}

static int64_t sample_row(const SampleRow& row, int64_t n, const float* logits, SampleScratch& w) {
    const float top = sample_scores(row, n, logits, w.weight);
    const int64_t likeliest = std::find(w.weight, w.weight + n, top) - w.weight;
    if (row.temperature == 0 || likeliest == n) return likeliest % n;
    sample_weights(row.temperature, n, top, w.weight);
    if (w.weight[likeliest] != 1) return likeliest;  // its score is infinite
    if (row.top_k > 0 && row.top_k < n) sample_keep<true>(n, double(row.top_k), w.weight);
    if (row.top_p < 1) sample_keep<false>(n, row.top_p * sample_measure<false>(n, w.weight, 0.0f), w.weight);
    return sample_draw(row.number, n, float(row.min_p), w);
}

// Floats of scratch for rows of n tokens.
static int64_t sample_scratch(int64_t n, int threads) {
    Parts parts(nullptr);
    for (int thread = 0; thread < threads; ++thread) SampleScratch(n, parts);
    return parts.used;
}

// tokens[r] for each row of n logits, `pitch` apart; `scratch` is sample_scratch floats, 64-byte aligned.
static void sample(int64_t rows, int64_t n, const float* logits, int64_t pitch, const SampleRow* const* how,
                   int64_t* tokens, float* scratch, int threads) {
    int64_t taken = 0;  // rows; they take longer or shorter
    in_threads(int(min64(rows, threads)), [&](int thread, int) {
        Parts parts(scratch);
        SampleScratch own(n, parts);
        for (int i = 0; i < thread; ++i) own = SampleScratch(n, parts);
        for (int64_t r; (r = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED)) < rows;)
            tokens[r] = sample_row(*how[r], n, logits + r * pitch, own);
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
