#include "reduce.cuh"

#include "common.cuh"
#include "launch.cuh"

namespace mm_rec {
namespace {

constexpr int kColumns = 32, kLines = 16;

__global__ void __launch_bounds__(kColumns* kLines)
    sum_kernel(const float* __restrict__ partial, int64_t stride, int64_t count, float* __restrict__ out, int64_t size) {
  __shared__ float line_sum[kLines][kColumns];
  const int lane = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + lane;
  float sum = 0.0f;
  if (i < size) {
#pragma unroll 4
    for (int64_t k = line; k < count; k += kLines) sum += partial[k * stride + i];
  }
  line_sum[line][lane] = sum;
  __syncthreads();
  if (line != 0 || i >= size) return;
  for (int k = 1; k < kLines; ++k) sum += line_sum[k][lane];
  out[i] = sum;
}

}  // namespace

cudaError_t sum_partials(const float* partial, int64_t stride, int64_t count, float* out, int64_t size, void* stream) {
  return launch(sum_kernel, dim3(static_cast<unsigned>(ceil_div(size, kColumns))), dim3(kColumns * kLines), 0, stream,
                partial, stride, count, out, size);
}

}  // namespace mm_rec
