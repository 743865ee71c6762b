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

// The softmax of a row from the parts that the block's threads have seen. All threads take part.
__device__ __forceinline__ Softmax whole_row(Softmax mine) {
  __shared__ float warp_top[kWarps], warp_sum[kWarps];
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
  __syncthreads();
  Softmax all;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all.merge(warp_top[w], warp_sum[w]);
  return all;
}

// `Size` elements at a time; the row starts at a multiple of that. bf16 rows of up to `Kept` * kThreads * Size elements are read
// once and stay in registers; longer ones (`Kept` is 0) are read twice.
template <typename T, int Size, int Kept>
__global__ void __launch_bounds__(kThreads, Kept > 0 ? 2 : 1)
    softmax_gradient_kernel(T* __restrict__ logits, const int64_t* __restrict__ targets, const float* __restrict__ weight,
                            float* __restrict__ nll, int vocabulary, bool gradient) {
  const int64_t row = blockIdx.x, target = targets[row];
  const float scale = weight[row];
  T* x = logits + row * vocabulary;
  const int first = threadIdx.x * Size;
  constexpr int kStep = kThreads * Size;
  if (scale == 0.0f) {  // left out
    if (threadIdx.x == 0) nll[row] = 0.0f;
    const float zeros[Size] = {};
    if (gradient) {
      for (int i = first; i < vocabulary; i += kStep) store<Size>(x + i, zeros);
    }
    return;
  }
  Softmax mine;
  Words<T, (Kept > 0 ? Size : 2)> kept[Kept > 0 ? Kept : 1];
  if constexpr (Kept > 0) {
#pragma unroll
    for (int n = 0; n < Kept; ++n) {
      const int i = first + n * kStep;
      if (i < vocabulary) {
        kept[n] = *reinterpret_cast<const Words<T, Size>*>(x + i);
      } else {
#pragma unroll
        for (uint32_t& word : kept[n].word) word = 0xff80ff80u;  // -inf twice
      }
    }
#pragma unroll
    for (int n = 0; n < Kept; ++n) {
#pragma unroll
      for (int j = 0; j < Size; ++j) mine.top = fmaxf(mine.top, kept[n][j]);
    }
    const float base = mine.top == -INFINITY ? 0.0f : mine.top;
#pragma unroll
    for (int n = 0; n < Kept; ++n) {
#pragma unroll
      for (int j = 0; j < Size; ++j) mine.sum += __expf(kept[n][j] - base);
    }
  } else {
#pragma unroll 4
    for (int i = first; i < vocabulary; i += kStep) {
      float v[Size], top = mine.top, sum = 0.0f;
      load<Size>(x + i, v);
#pragma unroll
      for (int j = 0; j < Size; ++j) top = fmaxf(top, v[j]);
#pragma unroll
      for (int j = 0; j < Size; ++j) sum += __expf(v[j] - top);
      mine.merge(top, sum);
    }
  }
  const bool valid = target >= 0 && target < vocabulary;
  const float at_target = valid ? to_float(x[target]) : NAN;  // a target outside shows in the loss
  const Softmax all = whole_row(mine);
  if (threadIdx.x == 0) nll[row] = all.top + __logf(all.sum) - at_target;
  if (!gradient) return;
  const float factor = scale / all.sum;
  const auto gradient_at = [&](int i, float logit) {
    return factor * __expf(logit - all.top) - (i == target ? scale : 0.0f);
  };
  float v[Size];
  if constexpr (Kept > 0) {
#pragma unroll
    for (int n = 0; n < Kept; ++n) {
      const int i = first + n * kStep;
      if (i >= vocabulary) continue;
#pragma unroll
      for (int j = 0; j < Size; ++j) v[j] = gradient_at(i + j, kept[n][j]);
      store<Size>(x + i, v);
    }
  } else {
#pragma unroll 4
    for (int i = first; i < vocabulary; i += kStep) {
      load<Size>(x + i, v);
#pragma unroll
      for (int j = 0; j < Size; ++j) v[j] = gradient_at(i + j, v[j]);
      store<Size>(x + i, v);
    }
  }
}

template <typename T>
cudaError_t run(void* logits, const int64_t* targets, const float* weight, float* nll, int64_t rows, int64_t vocabulary,
                bool gradient, void* stream) {
  auto kernel = vocabulary % 8 == 0 ? softmax_gradient_kernel<T, 8, 0> : softmax_gradient_kernel<T, 1, 0>;
  if constexpr (sizeof(T) == 2) {
    if (vocabulary % 8 == 0 && vocabulary <= 2 * 8 * kThreads) kernel = softmax_gradient_kernel<T, 8, 2>;
    if (vocabulary % 8 == 0 && vocabulary > 2 * 8 * kThreads && vocabulary <= 8 * 8 * kThreads) {
      kernel = softmax_gradient_kernel<T, 8, 8>;
    }
  }
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
