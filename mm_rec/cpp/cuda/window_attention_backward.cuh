// The backward pass of window_attention: each kernel recomputes the weights it needs from the scores and the saved
// denominators, as FlashAttention does, and owns what it writes, so nothing is added up across blocks.
#ifndef MM_REC_WINDOW_ATTENTION_BACKWARD_CUH
#define MM_REC_WINDOW_ATTENTION_BACKWARD_CUH

#include "window_attention.cuh"

namespace mm_rec {

struct AttentionBackward {
  AttentionInputs in;
  const void* out;
  const void* dout;
  const float* lse;  // (B, H, T)
  float* inner;      // (B, H, T): out . dout, which the first kernel to need it fills in
  void* dq;
  void* dk;
  void* dv;
};

cudaError_t attention_backward_queries(const AttentionBackward& p, int64_t dtype, const WindowExtent& extent, void* stream);
cudaError_t attention_backward_keys(const AttentionBackward& p, int64_t dtype, const WindowExtent& extent, void* stream);

// The whole of it for the sizes of most models (window_walk.cuh).
cudaError_t walk_backward(const AttentionBackward& p, const WindowExtent& extent, void* stream);

}  // namespace mm_rec

#endif
