// AdamW in one pass over memory, and the sum of squares that clipping needs.
#include "common.cuh"
#include "device.cuh"
#include "launch.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 256;

struct Step {
  float lr, beta1, beta2, eps, weight_decay;
  float correction1, correction2;  // 1 - beta^step
  float scale;
  const float* scale_on_device;  // used if not null
};

template <typename Gradient>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(float* __restrict__ master, float* __restrict__ m, float* __restrict__ v,
                 const Gradient* __restrict__ gradient, bf16* __restrict__ rounded, int64_t count, const Step step) {
  const float scale = step.scale_on_device == nullptr ? step.scale : *step.scale_on_device;
  const auto update = [&](float& weight, float& first, float& second, float g) {
    g *= scale;
    first = step.beta1 * first + (1.0f - step.beta1) * g;
    second = step.beta2 * second + (1.0f - step.beta2) * g * g;
    const float denominator = sqrtf(second / step.correction2) + step.eps;
    weight = weight * (1.0f - step.lr * step.weight_decay) - step.lr * (first / step.correction1) / denominator;
  };
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (at + 4 <= count) {
    float weight[4], first[4], second[4], g[4];
    load<4>(master + at, weight);
    load<4>(m + at, first);
    load<4>(v + at, second);
    load<4>(gradient + at, g);
#pragma unroll
    for (int i = 0; i < 4; ++i) update(weight[i], first[i], second[i], g[i]);
    store<4>(master + at, weight);
    store<4>(m + at, first);
    store<4>(v + at, second);
    if (rounded != nullptr) store<4>(rounded + at, weight);
  } else {
    for (int64_t i = at; i < count; ++i) {
      update(master[i], m[i], v[i], to_float(gradient[i]));
      if (rounded != nullptr) rounded[i] = __float2bfloat16_rn(master[i]);
    }
  }
}

// Each block adds up its share in a fixed order and writes one partial sum.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const T* __restrict__ x, int64_t count, double* __restrict__ partial) {
  __shared__ double warp_sum[kThreads / 32];
  double sum = 0.0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += kThreads * gridDim.x) {
    const double value = to_float(x[i]);
    sum += value * value;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) sum += warp_sum[w];
  partial[blockIdx.x] = sum;
}

int64_t square_blocks(int64_t count) {
  return min(ceil_div(count, kThreads * 16), static_cast<int64_t>(4) * multiprocessors());
}

}  // namespace
}  // namespace mm_rec

extern "C" int mm_rec_cuda_adamw(float* master, float* m, float* v, const void* gradient, int64_t dtype, void* rounded,
                                 int64_t count, double lr, double beta1, double beta2, double eps, double weight_decay,
                                 double correction1, double correction2, double scale, const float* scale_on_device,
                                 void* stream) {
  using namespace mm_rec;
  const auto f = [](double x) { return static_cast<float>(x); };
  const Step step{f(lr),          f(beta1),       f(beta2), f(eps),         f(weight_decay),
                  f(correction1), f(correction2), f(scale), scale_on_device};
  const dim3 grid(static_cast<unsigned>(ceil_div(count, 4 * kThreads)));
  bf16* out = static_cast<bf16*>(rounded);
  if (dtype == kBFloat16) {
    return launch(adamw_kernel<bf16>, grid, dim3(kThreads), 0, stream, master, m, v, static_cast<const bf16*>(gradient),
                  out, count, step);
  }
  return launch(adamw_kernel<float>, grid, dim3(kThreads), 0, stream, master, m, v, static_cast<const float*>(gradient),
                out, count, step);
}

// How many partial sums mm_rec_cuda_squares writes.
extern "C" int64_t mm_rec_cuda_squares_workspace(int64_t count) { return mm_rec::square_blocks(count); }

extern "C" int mm_rec_cuda_squares(const void* x, int64_t dtype, int64_t count, double* partial, void* stream) {
  using namespace mm_rec;
  const dim3 grid(static_cast<unsigned>(square_blocks(count)));
  if (dtype == kBFloat16) {
    return launch(squares_kernel<bf16>, grid, dim3(kThreads), 0, stream, static_cast<const bf16*>(x), count, partial);
  }
  return launch(squares_kernel<float>, grid, dim3(kThreads), 0, stream, static_cast<const float*>(x), count, partial);
}
