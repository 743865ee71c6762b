// Parts that the kernels of mixed_keys share. A group of up to 32 neighbouring lanes works on a head of a token, 8 elements a
// lane.
#ifndef MM_REC_MIXED_KEYS_CUH
#define MM_REC_MIXED_KEYS_CUH

#include "common.cuh"
#include "launch.cuh"

namespace mm_rec {

constexpr int kKeySize = 8;
constexpr int kFewTaps = 4;  // that many stay in registers

struct KeyInputs {
  const void* k;
  const float* taps;  // (H, d, reach)
  const int64_t* position;
  int64_t batch, time, window, heads;
  int dim, reach;

  __host__ __device__ int64_t context() const { return window + time; }
  __host__ __device__ int64_t width() const { return heads * dim; }
  __host__ __device__ int64_t context_at(int64_t b, int64_t token, int64_t head) const {
    return (b * context() + token) * width() + head * dim;
  }
  __host__ __device__ int64_t token_at(int64_t b, int64_t t, int64_t head) const {
    return (b * time + t) * width() + head * dim;
  }
  // Lanes of a group.
  __host__ __device__ int lanes() const {
    int lanes = 1;
    while (lanes * kKeySize < dim) lanes *= 2;
    return lanes;
  }
};

// A lane's columns of a head.
template <typename T>
struct KeyColumns {
  int lanes, at, dim;  // lanes of a group, the first column, columns of the head

  __device__ __forceinline__ explicit KeyColumns(const KeyInputs& in)
      : lanes(in.lanes()), at(static_cast<int>(threadIdx.x) % lanes * kKeySize), dim(in.dim) {}
  __device__ __forceinline__ void load(const T* row, float (&x)[kKeySize]) const { load_eight(row, at, dim, x); }
  __device__ __forceinline__ void store(T* row, const float (&x)[kKeySize]) const {
    if (dim % kKeySize == 0) {
      if (at < dim) mm_rec::store<kKeySize>(row + at, x);
      return;
    }
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) {
      if (at + i < dim) row[at + i] = from_float<T>(x[i]);
    }
  }
  // Sum over the columns of the head; whole warps take part.
  __device__ __forceinline__ float sum(const float (&x)[kKeySize], const float (&y)[kKeySize]) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) sum = fmaf(x[i], y[i], sum);
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
    return sum;
  }
  // x <- the gradient of what key_t = x / |x| is made of, for the gradient dy of key_t.
  __device__ __forceinline__ void through_norm(const float (&dy)[kKeySize], float (&x)[kKeySize]) const {
    const float scale = rsqrtf(sum(x, x) + kNormEps), slope = scale * scale * scale * sum(dy, x);
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) x[i] = scale * dy[i] - slope * x[i];
  }
};

// What the kernels of mixed_keys_few.cu are for.
inline bool few_keys(const KeyInputs& in) { return in.reach <= kFewTaps && in.dim % kKeySize == 0; }
cudaError_t few_keys_forward(const KeyInputs& in, int64_t dtype, void* key, void* stream);
cudaError_t few_keys_backward(const KeyInputs& in, int64_t dtype, const void* dkey, void* dk, float* partial, void* stream);
int64_t few_keys_partials(const KeyInputs& in);  // numbers of partial sums of the gradients of the taps, (H, d, reach) each

}  // namespace mm_rec

#endif
