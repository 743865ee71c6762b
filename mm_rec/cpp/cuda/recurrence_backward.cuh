// The backward pass of recurrence: one kernel for many sequences with heads of 64, which takes them in groups of eight; else
// three, gates, the loop, and the gradient of W_g.
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
  const float* u_bias;  // added to u; may be null
  const float* gamma;
  const float* gate;  // (B, T, D), not for grouped sequences
  const float* w_g;
  const float* h0;
  const bool* reset;
  float* dz;
  void* du;  // of type u_dtype, rows du_stride apart
  int64_t du_stride;
  float* du_bias;  // where u_bias is given
  float* dgamma;
  float* dw_g;
  float* dh0;
};

// Whether heads of this size can take the one kernel. The workspace is counted in floats.
bool recurrence_grouped(int64_t dim);
int64_t recurrence_grouped_workspace(const Extent& extent);
cudaError_t recurrence_backward_grouped(const RecurrenceBackward& p, float* workspace, const Extent& extent, void* stream);

// gate = sigmoid(u + u_bias + W_g h') for all steps at once.
cudaError_t recurrence_gate(const RecurrenceBackward& p, float* gate, const Extent& extent, int64_t dim, void* stream);

// dw_g from du and h. The workspace is counted in floats.
int64_t weight_gradient_workspace(const Extent& extent, int64_t dim);
cudaError_t recurrence_weight_gradient(const RecurrenceBackward& p, float* workspace, const Extent& extent,
                                       int64_t dim, void* stream);

}  // namespace mm_rec

#endif
