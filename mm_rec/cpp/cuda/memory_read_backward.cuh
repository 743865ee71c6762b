// The backward pass of memory_read: each kernel recomputes the weights it needs from the scores and the saved
// denominators, as FlashAttention does, and owns what it writes, so nothing is added up across blocks.
#ifndef MM_REC_MEMORY_READ_BACKWARD_CUH
#define MM_REC_MEMORY_READ_BACKWARD_CUH

#include "memory_read.cuh"

namespace mm_rec {

struct ReadBackward {
  ReadInputs in;
  const void* out;
  const void* dout;
  const float* lse;  // (B, H, T)
  float* inner;      // (B, H, T): out . dout, filled by the first kernel
  void* dq;
  void* dk;
  void* dv;
  float* dkey;
  float* dvalue;
  float* dmass;
};

cudaError_t read_backward_queries(const ReadBackward& p, int64_t dtype, const MemoryExtent& extent, void* stream);
cudaError_t read_backward_window(const ReadBackward& p, int64_t dtype, const MemoryExtent& extent, void* stream);
cudaError_t read_backward_slots(const ReadBackward& p, int64_t dtype, const MemoryExtent& extent, void* stream);

// The whole of it for the sizes of most models (memory_walk.cuh), the window first.
cudaError_t walk_backward_window(const ReadBackward& p, const MemoryExtent& extent, void* stream);
cudaError_t walk_backward_slots(const ReadBackward& p, const MemoryExtent& extent, void* stream);

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
