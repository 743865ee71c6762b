// The C interface of a step and of the draw after it, compiled once per level like kernels.cpp; its conventions are those.

#pragma GCC diagnostic ignored "-Wunused-function"  // the headers hold more than a step needs
#include "export.h"
#include "sample.h"
#include "step.h"

using namespace mm_rec::MM_LEVEL;

MM_EXPORT(int64_t, step_scratch)(const StepPlan* plan, int64_t batch, int threads) {
    return step_scratch(*plan, batch, threads);
}

// 0, or what StepResult says.
MM_EXPORT(int, step)
(const StepPlan* plan, const StepState* state, int64_t batch, const int64_t* tokens, float* logits, float* scratch,
 int threads) {
    return step(*plan, *state, batch, tokens, logits, scratch, threads);
}

// How a bfloat16 matrix (rows, columns) is packed: fills `base` and `start` of a PackedMatrix, returns the bytes of its data.
MM_EXPORT(int64_t, pack_layout)
(int64_t rows, int64_t columns, const void* w, uint8_t* base, uint32_t* start, int threads) {
    return pack_layout(rows, columns, static_cast<const bf16*>(w), base, start, threads);
}

MM_EXPORT(void, pack)
(int64_t rows, int64_t columns, const void* w, const uint8_t* base, const uint32_t* start, uint8_t* data, int threads) {
    pack(rows, columns, static_cast<const bf16*>(w), base, start, data, threads);
}

MM_EXPORT(int64_t, sample_scratch)(int64_t columns, int threads) { return sample_scratch(columns, threads); }

MM_EXPORT(void, sample)
(int64_t rows, int64_t columns, const float* logits, int64_t pitch, const SampleRow* const* how, int64_t* tokens,
 float* scratch, int threads) {
    sample(rows, columns, logits, pitch, how, tokens, scratch, threads);
}
