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
  float* inner;      // (B, H, T): out . dout, filled by the first kernel
  void* dq;
  void* dk;
  void* dv;
};

cudaError_t attention_backward_queries(const AttentionBackward& p, int64_t dtype, const WindowExtent& extent, void* stream);
cudaError_t attention_backward_keys(const AttentionBackward& p, int64_t dtype, const WindowExtent& extent, void* stream);

// The whole of it for the sizes of most models (window_walk.cuh).
cudaError_t walk_backward(const AttentionBackward& p, const WindowExtent& extent, void* stream);

// Run(type, head size rounded up) for a type code and head size.
template <template <typename, int> class Run, typename... Arguments>
cudaError_t by_head_size(int64_t dtype, int dim, const Arguments&... arguments) {
  const bool narrow = dtype == kBFloat16;
  if (dim <= 32) return narrow ? Run<bf16, 32>::run(arguments...) : Run<float, 32>::run(arguments...);
  if (dim <= 64) return narrow ? Run<bf16, 64>::run(arguments...) : Run<float, 64>::run(arguments...);
  if (dim <= 128) return narrow ? Run<bf16, 128>::run(arguments...) : Run<float, 128>::run(arguments...);
  if (dim <= 256) return narrow ? Run<bf16, 256>::run(arguments...) : Run<float, 256>::run(arguments...);
  return cudaErrorInvalidValue;
}

}  // namespace mm_rec

#endif
