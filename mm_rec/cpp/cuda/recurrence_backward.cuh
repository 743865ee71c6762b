// The backward pass of recurrence is three kernels: gates (for some head sizes), the loop, the gradient of W_g.
#ifndef MM_REC_RECURRENCE_BACKWARD_CUH
#define MM_REC_RECURRENCE_BACKWARD_CUH

#include "recurrence.cuh"

namespace mm_rec {

struct RecurrenceBackward {
  const float* dh;
  const float* dh_last;  // may be null, as h0 and reset
  const float* h;
  const float* z;
  const void* u;
  int64_t u_dtype;
  int64_t u_stride;
  const float* gamma;
  const float* gate;  // (B, T, D), only where recurrence_needs_gate
  const float* w_g;
  const float* h0;
  const bool* reset;
  float* dz;
  void* du;  // of type u_dtype
  float* dgamma;
  float* dw_g;
  float* dh0;
};

bool recurrence_needs_gate(int64_t dim);

// gate = sigmoid(u + W_g h') for all steps at once.
cudaError_t recurrence_gate(const RecurrenceBackward& p, float* gate, const Extent& extent, int64_t dim, void* stream);

// dw_g from du and h. The workspace is counted in floats.
int64_t weight_gradient_workspace(const Extent& extent, int64_t dim);
cudaError_t recurrence_weight_gradient(const RecurrenceBackward& p, float* workspace, const Extent& extent,
                                       int64_t dim, void* stream);

}  // namespace mm_rec

#endif
