// The backward pass of delta_rule: a walk through the chunks from the last to the first for the gradients of the states
// (delta_rule_backward_states.cu), then all others, all chunks in parallel (delta_rule_backward.cu).
#ifndef MM_REC_DELTA_RULE_BACKWARD_CUH
#define MM_REC_DELTA_RULE_BACKWARD_CUH

#include "delta_rule.cuh"

namespace mm_rec {

// Gradients are contiguous; T is the type of q.
template <typename T>
struct DeltaBackward {
  DeltaInputs in;
  const float* states;  // (B, chunks + 1, H, d, d)
  const T* dout;        // (B, T, H, d), or null
  const float* dlast;   // (B, H, d, d), or null
  T* dq;
  T* dkey;
  T* dv;
  float* dbeta;
  float* dlog_decay;
  float* dstate;
  // Scratch memory: inverses of the chunks, ...
  T* inverses;
  T* dstates;   // ... gradients of the states after each chunk (B, chunks, H, d, d), ...
  T* derrors;   // ... of beta (v - E key S) (B, T, H, d), ...
  T* written;   // ... and R (B, T, H, d), for heads of more than one block
};

template <typename T>
cudaError_t delta_backward_states(const DeltaBackward<T>& p, const DeltaExtent& extent, void* stream);

}  // namespace mm_rec

#endif
