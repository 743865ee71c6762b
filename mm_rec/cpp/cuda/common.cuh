// Shared by all kernels: element types, vector access, reductions.
//
// Letters as in mm_rec/ops/reference.py: B batch, T time, D width, H heads, d head size, W window, N = B * T
// rows. Every kernel computes in float32 whatever the type of its inputs.
#ifndef MM_REC_COMMON_CUH
#define MM_REC_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mm_rec {

using bf16 = __nv_bfloat16;

// Codes of element types in the C interface.
enum DType : int { kFloat32 = 0, kBFloat16 = 1 };

constexpr float kGammaMin = 1e-6f;
constexpr float kGammaMax = 0.9999f;
constexpr float kNormEps = 1e-6f;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 2) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// N consecutive elements, moved in accesses of up to 16 bytes. The pointer must be aligned accordingly.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

// The same as whole words, for what waits in registers: an element of a Pack takes a register whatever its size.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Words {
  uint32_t word[sizeof(T) * N / 4];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 2) {
      return __uint_as_float(i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u);
    } else {
      return __uint_as_float(word[i]);
    }
  }
};

template <int N, typename T>
__device__ __forceinline__ void load(const T* source, float (&out)[N]) {
  const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(source);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(pack.v[i]);
}

template <int N, typename T>
__device__ __forceinline__ void store(T* target, const float (&in)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = from_float<T>(in[i]);
  *reinterpret_cast<Pack<T, N>*>(target) = pack;
}

// Elements column .. column + 7 of a row of `size`, 0 past its end; 16 bytes at a time where `size` keeps alignment.
template <typename T>
__device__ __forceinline__ void load_eight(const T* row, int column, int size, float (&out)[8]) {
  if (size % 8 == 0) {
    if (column < size) {
      load<8>(row + column, out);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = column + i < size ? to_float(row[column + i]) : 0.0f;
  }
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// Sum over groups of `Lanes` neighbouring lanes; every lane gets the result.
template <int Lanes = 32>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int mask = Lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
  return x;
}

template <int Lanes = 32>
__device__ __forceinline__ float group_max(float x) {
#pragma unroll
  for (int mask = Lanes / 2; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, mask));
  return x;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mm_rec

#endif
