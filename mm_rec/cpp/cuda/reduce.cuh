// Sums over many partial results in a fixed order, so that equal inputs give equal bits.
#ifndef MM_REC_REDUCE_CUH
#define MM_REC_REDUCE_CUH

#include <cuda_runtime.h>

#include <cstdint>

namespace mm_rec {

// out[i] = sum over k < count of partial[k * stride + i], for i < size.
cudaError_t sum_partials(const float* partial, int64_t stride, int64_t count, float* out, int64_t size, void* stream);

}  // namespace mm_rec

#endif
