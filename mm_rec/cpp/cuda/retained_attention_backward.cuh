// The backward pass of the attention over retained pairs. Each kernel recomputes the weights from the scores and the denominators of
// the whole softmax, and owns what it writes: first the queries' gradients, then for each run those of the pairs that it
// sees, in scratch memory, and last for each pair the sum over the runs that see it, in their order.
#ifndef MM_REC_RETAINED_ATTENTION_BACKWARD_CUH
#define MM_REC_RETAINED_ATTENTION_BACKWARD_CUH

#include "retained_attention.cuh"

namespace mm_rec {

struct RetainedBackward {
  RetainedInputs in;
  const void* dout;
  const float* lse;    // (B, H, T)
  const float* inner;  // (B, H, T): out . dout
  void* dq;            // the gradients from the window, to which those from the pairs are added
  void* dk;
  void* dv;
  float* dscore;
  void* dkept_k;
  void* dkept_v;
  float* dkept_score;
};

// Gradients of pairs from each run, by candidate (VisiblePair), of `lines` heads of sequences from `first` on.
struct PairGradients {
  int64_t first, lines;
  float* k;      // (lines, R, K + 64, d)
  float* v;      // (lines, R, K + 64, d)
  float* score;  // (lines, R, K + 64)

  PairGradients(void* workspace, const RetainedExtent& extent, int64_t first_, int64_t lines_) : first(first_), lines(lines_) {
    const int64_t rows = lines * extent.runs() * extent.candidates();
    k = static_cast<float*>(workspace);
    v = k + rows * extent.dim;
    score = v + rows * extent.dim;
  }
  static int64_t bytes_a_line(const RetainedExtent& extent) {
    return extent.runs() * extent.candidates() * (2 * extent.dim + 1) * static_cast<int64_t>(sizeof(float));
  }
};

cudaError_t retained_backward_queries(const RetainedBackward& p, int64_t dtype, const RetainedExtent& extent,
                                      const VisiblePairs& visible, void* stream);
cudaError_t retained_backward_pairs(const RetainedBackward& p, int64_t dtype, const RetainedExtent& extent,
                                    const VisiblePairs& visible, const PairGradients& gradients, void* stream);
cudaError_t retained_backward_sums(const RetainedBackward& p, int64_t dtype, const RetainedExtent& extent,
                                   const PairGradients& gradients, void* stream);

}  // namespace mm_rec

#endif
