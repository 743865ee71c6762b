// relu(x)^2 and its gradient, elementwise over contiguous tensors.
#include "common.cuh"
#include "launch.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 256, kSize = 8;

// y = relu(x)^2, or 2 relu(x) dy if `Backward`. The last few elements go one by one.
template <typename T, bool Backward>
__global__ void __launch_bounds__(kThreads)
    relu_squared_kernel(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ out, int64_t count) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, at = thread * kSize;
  const auto of = [](float v, float g) {
    const float positive = v < 0.0f ? 0.0f : v;  // NaN stays NaN
    return positive * (Backward ? 2.0f * g : positive);
  };
  if (at + kSize <= count) {
    float v[kSize], g[kSize] = {};
    load<kSize>(x + at, v);
    if constexpr (Backward) load<kSize>(dy + at, g);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v[i] = of(v[i], g[i]);
    store<kSize>(out + at, v);
  } else {
    for (int64_t i = at; i < count; ++i) out[i] = from_float<T>(of(to_float(x[i]), Backward ? to_float(dy[i]) : 0.0f));
  }
}

template <bool Backward>
cudaError_t run(const void* x, const void* dy, void* out, int64_t dtype, int64_t count, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(count, kThreads * kSize)));
  if (dtype == kBFloat16) {
    return launch(relu_squared_kernel<bf16, Backward>, grid, dim3(kThreads), 0, stream, static_cast<const bf16*>(x),
                  static_cast<const bf16*>(dy), static_cast<bf16*>(out), count);
  }
  return launch(relu_squared_kernel<float, Backward>, grid, dim3(kThreads), 0, stream, static_cast<const float*>(x),
                static_cast<const float*>(dy), static_cast<float*>(out), count);
}

}  // namespace
}  // namespace mm_rec

extern "C" int mm_rec_cuda_relu_squared_forward(const void* x, void* y, int64_t dtype, int64_t count, void* stream) {
  return mm_rec::run<false>(x, nullptr, y, dtype, count, stream);
}

extern "C" int mm_rec_cuda_relu_squared_backward(const void* dy, const void* x, void* dx, int64_t dtype, int64_t count,
                                                 void* stream) {
  return mm_rec::run<true>(x, dy, dx, dtype, count, stream);
}
