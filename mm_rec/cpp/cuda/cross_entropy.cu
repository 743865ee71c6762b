// The middle of linear_cross_entropy: from a chunk of logits, which a matrix product made, to the loss and, in place, the
// gradient at the logits, which two more matrix products take in. A block a row.
#include "common.cuh"
#include "launch.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;

// Largest value so far and the sum of exp(x - largest).
struct Softmax {
  float top = -INFINITY, sum = 0.0f;

  __device__ __forceinline__ void merge(float other_top, float other_sum) {
    const float both = fmaxf(top, other_top);
    if (both == -INFINITY) return;
    sum = sum * __expf(top - both) + other_sum * __expf(other_top - both);
    top = both;
  }
};

// `Size` elements at a time; the row starts at a multiple of that.
template <typename T, int Size>
__global__ void __launch_bounds__(kThreads)
    softmax_gradient_kernel(T* __restrict__ logits, const int64_t* __restrict__ targets, const float* __restrict__ weight,
                            float* __restrict__ nll, int vocabulary, bool gradient) {
  __shared__ float warp_top[kWarps], warp_sum[kWarps];
  const int64_t row = blockIdx.x, target = targets[row];
  const float scale = weight[row];
  T* x = logits + row * vocabulary;
  if (scale == 0.0f) {  // left out
    if (threadIdx.x == 0) nll[row] = 0.0f;
    const float zeros[Size] = {};
    if (gradient) {
      for (int i = threadIdx.x * Size; i < vocabulary; i += kThreads * Size) store<Size>(x + i, zeros);
    }
    return;
  }
  Softmax mine;
#pragma unroll 4
  for (int i = threadIdx.x * Size; i < vocabulary; i += kThreads * Size) {
    float v[Size], top = -INFINITY, sum = 0.0f;
    load<Size>(x + i, v);
#pragma unroll
    for (int j = 0; j < Size; ++j) top = fmaxf(top, v[j]);
    top = fmaxf(top, mine.top);
#pragma unroll
    for (int j = 0; j < Size; ++j) sum += __expf(v[j] - top);
    mine.merge(top, sum);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float other_top = __shfl_xor_sync(kFullWarp, mine.top, mask);
    const float other_sum = __shfl_xor_sync(kFullWarp, mine.sum, mask);
    mine.merge(other_top, other_sum);
  }
  if (threadIdx.x % 32 == 0) {
    warp_top[threadIdx.x / 32] = mine.top;
    warp_sum[threadIdx.x / 32] = mine.sum;
  }
  const bool valid = target >= 0 && target < vocabulary;
  const float at_target = valid ? to_float(x[target]) : NAN;  // a target outside shows in the loss
  __syncthreads();
  Softmax all;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all.merge(warp_top[w], warp_sum[w]);
  if (threadIdx.x == 0) nll[row] = all.top + __logf(all.sum) - at_target;
  if (!gradient) return;
  const float factor = scale / all.sum;
#pragma unroll 4
  for (int i = threadIdx.x * Size; i < vocabulary; i += kThreads * Size) {
    float v[Size];
    load<Size>(x + i, v);
#pragma unroll
    for (int j = 0; j < Size; ++j) v[j] = factor * __expf(v[j] - all.top) - (i + j == target ? scale : 0.0f);
    store<Size>(x + i, v);
  }
}

template <typename T>
cudaError_t run(void* logits, const int64_t* targets, const float* weight, float* nll, int64_t rows, int64_t vocabulary,
                bool gradient, void* stream) {
  const auto kernel = vocabulary % 8 == 0 ? softmax_gradient_kernel<T, 8> : softmax_gradient_kernel<T, 1>;
  return launch(kernel, dim3(static_cast<unsigned>(rows)), dim3(kThreads), 0, stream, static_cast<T*>(logits), targets,
                weight, nll, static_cast<int>(vocabulary), gradient);
}

}  // namespace
}  // namespace mm_rec

// logits (rows, vocabulary), replaced by weight * (softmax - one hot) if `gradient`; nll in nats, 0 where weight is 0.
extern "C" int mm_rec_cuda_softmax_gradient(void* logits, int64_t dtype, const int64_t* targets, const float* weight,
                                            float* nll, int64_t rows, int64_t vocabulary, int64_t gradient,
                                            void* stream) {
  using namespace mm_rec;
  return dtype == kBFloat16 ? run<bf16>(logits, targets, weight, nll, rows, vocabulary, gradient != 0, stream)
                            : run<float>(logits, targets, weight, nll, rows, vocabulary, gradient != 0, stream);
}
