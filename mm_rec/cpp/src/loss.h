// Cross entropy of rows of logits, and its gradient in their place.
#pragma once

#include "vec.h"

extern "C" {
float logf(float);
float expf(float);
}

namespace mm_rec {
namespace MM_LEVEL {

MM_INLINE float value(float x) { return x; }
MM_INLINE float value(bf16 x) { return widen(x); }

// nll[r] = log sum exp(logits) - logits[target], 0 where weight[r] is 0. With `gradient`, logits become
// weight[r] * (softmax - one-hot(target)), the gradient of sum weight * nll. Rows are `columns` apart.
template <class T>
static void cross_entropy(int64_t rows, int64_t columns, T* logits, const int64_t* target, const float* weight,
                          float* nll, bool gradient, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (rows > 1 && threads > 1)
    for (int64_t r = 0; r < rows; ++r) {
        T* row = logits + r * columns;
        if (weight[r] == 0.0f) {
            nll[r] = 0.0f;
            if (gradient) memset(row, 0, columns * sizeof(T));
            continue;
        }
        vf largest = splat(-3.4e38f);
        int64_t i = 0;
        for (; i + W <= columns; i += W) largest = max(load(row + i), largest);
        float top = max(largest);
        for (; i < columns; ++i) top = value(row[i]) > top ? value(row[i]) : top;
        vf sums = {};
        for (i = 0; i + W <= columns; i += W) sums += exp(load(row + i) - top);
        float denominator = sum(sums);
        if (i < columns) {
            float tail[W];
            store(tail, exp(load(row + i, columns - i) - top));
            for (int64_t k = 0; k < columns - i; ++k) denominator += tail[k];
        }
        const float target_logit = value(row[target[r]]);
        nll[r] = logf(denominator) + top - target_logit;
        if (!gradient) continue;
        const vf scale = splat(weight[r] / denominator);
        const float at_target = weight[r] * (expf(target_logit - top) / denominator - 1.0f);
        for (i = 0; i < columns; i += W) store(row + i, exp(load(row + i, columns - i) - top) * scale, columns - i);
        store(row + target[r], splat(at_target), 1);
    }
}

}  // namespace MM_LEVEL
}  // namespace mm_rec
