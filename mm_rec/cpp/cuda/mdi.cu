// mdi: gamma = clamp(sigmoid(decay)), x = sqrt(1 - gamma^2) candidate sigmoid(gate), one pass over N = B * T rows.
#include "common.cuh"
#include "decay.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace mm_rec {
namespace {

constexpr int kLanes = 32, kLines = 8;  // a block: vectors of columns, and rows

// Inputs of one type, rows `..._stride` elements apart. `gate` is null if there is none.
struct Inputs {
  const void* decay;
  int64_t decay_stride;
  const float* decay_bias;
  const void* candidate;
  int64_t candidate_stride;
  const void* gate;
  int64_t gate_stride;
  const float* gate_bias;
  int64_t rows, width;
};

struct Gradients {
  const float* dgamma;  // one of these two may be null
  const float* dx;
  void* ddecay;
  void* dcandidate;
  int64_t dcandidate_stride;  // rows of the other results are contiguous
  void* dgate;
  float* partial;  // (blocks along N, 2, D): sums for the two biases
};

template <typename T, int Size, bool Gate>
__global__ void __launch_bounds__(kLanes* kLines)
    forward_kernel(const Inputs p, float* __restrict__ gamma_out, float* __restrict__ x_out) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x) * Size;
  if (column >= p.width) return;
  float decay_bias[Size], gate_bias[Size];
  load<Size>(p.decay_bias + column, decay_bias);
  if constexpr (Gate) load<Size>(p.gate_bias + column, gate_bias);
  const int64_t step = static_cast<int64_t>(gridDim.y) * kLines;
#pragma unroll 2
  for (int64_t n = static_cast<int64_t>(blockIdx.y) * kLines + threadIdx.y; n < p.rows; n += step) {
    float decay[Size], x[Size], gate[Size], gamma[Size];
    load<Size>(static_cast<const T*>(p.decay) + n * p.decay_stride + column, decay);
    load<Size>(static_cast<const T*>(p.candidate) + n * p.candidate_stride + column, x);
    if constexpr (Gate) load<Size>(static_cast<const T*>(p.gate) + n * p.gate_stride + column, gate);
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      const Decay at(decay[i] + decay_bias[i]);
      gamma[i] = at.gamma;
      x[i] *= at.scale;
      if constexpr (Gate) x[i] *= sigmoid(gate[i] + gate_bias[i]);
    }
    store<Size>(gamma_out + n * p.width + column, gamma);
    store<Size>(x_out + n * p.width + column, x);
  }
}

template <typename T, int Size, bool Gate>
__global__ void __launch_bounds__(kLanes* kLines) backward_kernel(const Inputs p, const Gradients g) {
  __shared__ float line_sum[kLines][kLanes * Size];
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kLanes + threadIdx.x) * Size;
  float decay_sum[Size] = {}, gate_sum[Size] = {};
  if (column < p.width) {
    float decay_bias[Size], gate_bias[Size];
    load<Size>(p.decay_bias + column, decay_bias);
    if constexpr (Gate) load<Size>(p.gate_bias + column, gate_bias);
    const int64_t step = static_cast<int64_t>(gridDim.y) * kLines;
    for (int64_t n = static_cast<int64_t>(blockIdx.y) * kLines + threadIdx.y; n < p.rows; n += step) {
      const int64_t at = n * p.width + column;
      float decay[Size], candidate[Size], gate[Size], dgamma[Size] = {}, dx[Size] = {};
      load<Size>(static_cast<const T*>(p.decay) + n * p.decay_stride + column, decay);
      load<Size>(static_cast<const T*>(p.candidate) + n * p.candidate_stride + column, candidate);
      if constexpr (Gate) load<Size>(static_cast<const T*>(p.gate) + n * p.gate_stride + column, gate);
      if (g.dgamma != nullptr) load<Size>(g.dgamma + at, dgamma);
      if (g.dx != nullptr) load<Size>(g.dx + at, dx);
#pragma unroll
      for (int i = 0; i < Size; ++i) {
        const Decay d(decay[i] + decay_bias[i]);
        float gated = dx[i];  // the gradient at sqrt(1 - gamma^2) candidate
        if constexpr (Gate) {
          const float opened = sigmoid(gate[i] + gate_bias[i]);
          gated *= opened;
          gate[i] = dx[i] * d.scale * candidate[i] * opened * (1.0f - opened);
          gate_sum[i] += gate[i];
        }
        const float at_gamma = dgamma[i] - __fdividef(gated * candidate[i] * d.gamma, d.scale);
        decay[i] = d.clamped ? 0.0f : at_gamma * d.gamma * d.rest;
        decay_sum[i] += decay[i];
        candidate[i] = gated * d.scale;
      }
      store<Size>(static_cast<T*>(g.ddecay) + at, decay);
      store<Size>(static_cast<T*>(g.dcandidate) + n * g.dcandidate_stride + column, candidate);
      if constexpr (Gate) store<Size>(static_cast<T*>(g.dgate) + at, gate);
    }
  }
  float* partial = g.partial + static_cast<int64_t>(blockIdx.y) * 2 * p.width;
  const auto add_lines = [&](const float(&sum)[Size], float* out) {
    store<Size>(&line_sum[threadIdx.y][threadIdx.x * Size], sum);
    __syncthreads();
    for (int i = threadIdx.y * kLanes + threadIdx.x; i < kLanes * Size; i += kLanes * kLines) {
      const int64_t to = static_cast<int64_t>(blockIdx.x) * kLanes * Size + i;
      if (to >= p.width) continue;
      float total = 0.0f;
      for (int line = 0; line < kLines; ++line) total += line_sum[line][i];
      out[to] = total;
    }
    __syncthreads();
  };
  add_lines(decay_sum, partial);
  if constexpr (Gate) add_lines(gate_sum, partial + p.width);
}

int64_t row_blocks(int64_t rows) { return min(ceil_div(rows, kLines), static_cast<int64_t>(4) * multiprocessors()); }

dim3 grid(const Inputs& p, int size) {
  return dim3(static_cast<unsigned>(ceil_div(ceil_div(p.width, size), kLanes)), static_cast<unsigned>(row_blocks(p.rows)));
}

template <typename T, int Size>
cudaError_t forward(const Inputs& p, float* gamma, float* x, void* stream) {
  const auto kernel = p.gate != nullptr ? forward_kernel<T, Size, true> : forward_kernel<T, Size, false>;
  return launch(kernel, grid(p, Size), dim3(kLanes, kLines), 0, stream, p, gamma, x);
}

template <typename T, int Size>
cudaError_t backward(const Inputs& p, const Gradients& g, void* stream) {
  const auto kernel = p.gate != nullptr ? backward_kernel<T, Size, true> : backward_kernel<T, Size, false>;
  return launch(kernel, grid(p, Size), dim3(kLanes, kLines), 0, stream, p, g);
}

}  // namespace
}  // namespace mm_rec

extern "C" int mm_rec_cuda_mdi_forward(const void* decay, int64_t decay_stride, const float* decay_bias,
                                       const void* candidate, int64_t candidate_stride, const void* gate,
                                       int64_t gate_stride, const float* gate_bias, int64_t dtype, float* gamma,
                                       float* x, int64_t rows, int64_t width, void* stream) {
  using namespace mm_rec;
  const Inputs p{decay, decay_stride, decay_bias, candidate, candidate_stride, gate, gate_stride, gate_bias, rows, width};
  if (dtype == kBFloat16) {
    return width % 8 == 0 ? forward<bf16, 8>(p, gamma, x, stream) : forward<bf16, 1>(p, gamma, x, stream);
  }
  return width % 4 == 0 ? forward<float, 4>(p, gamma, x, stream) : forward<float, 1>(p, gamma, x, stream);
}

extern "C" int64_t mm_rec_cuda_mdi_backward_workspace(int64_t rows, int64_t width) {
  return static_cast<int64_t>(sizeof(float)) * mm_rec::row_blocks(rows) * 2 * width;
}

extern "C" int mm_rec_cuda_mdi_backward(const float* dgamma, const float* dx, const void* decay, int64_t decay_stride,
                                        const float* decay_bias, const void* candidate, int64_t candidate_stride,
                                        const void* gate, int64_t gate_stride, const float* gate_bias, int64_t dtype,
                                        void* ddecay, float* ddecay_bias, void* dcandidate, int64_t dcandidate_stride, void* dgate,
                                        float* dgate_bias, float* workspace, int64_t rows, int64_t width,
                                        void* stream) {
  using namespace mm_rec;
  const Inputs p{decay, decay_stride, decay_bias, candidate, candidate_stride, gate, gate_stride, gate_bias, rows, width};
  const Gradients g{dgamma, dx, ddecay, dcandidate, dcandidate_stride, dgate, workspace};
  cudaError_t error;
  if (dtype == kBFloat16) {
    error = width % 8 == 0 ? backward<bf16, 8>(p, g, stream) : backward<bf16, 1>(p, g, stream);
  } else {
    error = width % 4 == 0 ? backward<float, 4>(p, g, stream) : backward<float, 1>(p, g, stream);
  }
  const int64_t blocks = row_blocks(rows);
  if (error == cudaSuccess) error = sum_partials(workspace, 2 * width, blocks, ddecay_bias, width, stream);
  if (error == cudaSuccess && gate != nullptr) {
    error = sum_partials(workspace + width, 2 * width, blocks, dgate_bias, width, stream);
  }
  return error;
}
