// The decay of the recurrence at a logit.
#ifndef MM_REC_DECAY_CUH
#define MM_REC_DECAY_CUH

#include "common.cuh"

namespace mm_rec {

// gamma, 1 - gamma and sqrt(1 - gamma^2). Near 1 the difference would lose most digits of gamma's, so it is taken as
// exp(-logit) gamma; NaN stays NaN.
struct Decay {
  float gamma, rest, scale;
  bool clamped;

  __device__ __forceinline__ explicit Decay(float logit) {
    const float power = __expf(-logit);
    gamma = __fdividef(1.0f, 1.0f + power);
    rest = power * gamma;
    clamped = gamma < kGammaMin || gamma > kGammaMax;
    if (clamped) {
      gamma = gamma < kGammaMin ? kGammaMin : kGammaMax;
      rest = 1.0f - gamma;
    }
    const float square = rest * (1.0f + gamma);
    scale = square * rsqrtf(square);
  }
};

}  // namespace mm_rec

#endif
