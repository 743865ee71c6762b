// Cross entropy of rows of logits, and its gradient in their place.
#pragma once

#include "scratch.h"

extern "C" {
float logf(float);
float expf(float);
}

namespace mm_rec {
namespace MM_LEVEL {

MM_INLINE float value(float x) { return x; }
MM_INLINE float value(bf16 x) { return widen(x); }

// The largest of `columns` logits.
template <class T>
static float largest(int64_t columns, const T* row) {
    vf top = splat(value(row[0]));
    int64_t i = 0;
    for (; i + W <= columns; i += W) top = max(load(row + i), top);
    float result = max(top);
    for (; i < columns; ++i) result = value(row[i]) > result ? value(row[i]) : result;
    return result;
}

// e^(logit - top) of a row, to `exponentials` if that is not null; returns their sum.
template <class T>
static float sum_exponentials(int64_t columns, const T* row, float top, float* exponentials) {
    vf sums = {};
    for (int64_t i = 0; i < columns; i += W) {
        vf e = exp(load(row + i, columns - i) - top);
        if (exponentials) store(exponentials + i, e);
        for (int64_t lane = columns - i; lane < W; ++lane) e[lane] = 0.0f;  // past the end of the row
        sums += e;
    }
    return sum(sums);
}

// nll[r] = log sum exp(logits) - logits[target], 0 where weight[r] is 0. With `gradient`, logits become
// weight[r] * (softmax - one-hot(target)), the gradient of sum weight * nll. Rows are `columns` apart.
// False if there is no memory for the scratch.
template <class T>
static bool cross_entropy(int64_t rows, int64_t columns, T* logits, const int64_t* target, const float* weight,
                          float* nll, bool gradient, int threads) {
    const auto make = [&](Parts& parts) { return parts.take(gradient ? round_up(columns, W) : 1); };
    return run_tasks(rows, threads, make, [&](int64_t r, float* exponentials) {
        T* row = logits + r * columns;
        if (weight[r] == 0.0f) {
            nll[r] = 0.0f;
            if (gradient) memset(row, 0, columns * sizeof(T));
            return;
        }
        const float top = largest(columns, row), target_logit = value(row[target[r]]);
        const float sum = sum_exponentials(columns, row, top, gradient ? exponentials : nullptr);
        nll[r] = logf(sum) + top - target_logit;
        if (!gradient) return;
        const vf scale = splat(weight[r] / sum);
        for (int64_t i = 0; i < columns; i += W) store(row + i, load(exponentials + i) * scale, columns - i);
        store(row + target[r], splat(weight[r] * (expf(target_logit - top) / sum - 1.0f)), 1);
    });
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
