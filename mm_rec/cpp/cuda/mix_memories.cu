// The sum of what was read from the two memories: near + 2 sigmoid(gate) rms_norm(far), a gate for each row.
#include "rows.cuh"

namespace mm_rec {
namespace {

template <int Size, typename T>
__global__ void __launch_bounds__(kThreads)
    mix_memories_kernel(const T* __restrict__ near, const T* __restrict__ far, const float* __restrict__ gate,
                        T* __restrict__ out, const Rows rows, int lanes) {
  const Group group(lanes, rows.count);
  const int64_t start = group.row * rows.size;
  float squares = 0.0f;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size];
    load<Size>(far + start + at, v);
#pragma unroll
    for (int i = 0; i < Size; ++i) squares = fmaf(v[i], v[i], squares);
  });
  const float scale = 2.0f * sigmoid(gate[group.row]) * inverse_rms(group.sum(squares), rows.size);
  if (!group.real) return;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], sum[Size];
    load<Size>(far + start + at, v);
    load<Size>(near + start + at, sum);
#pragma unroll
    for (int i = 0; i < Size; ++i) sum[i] = fmaf(scale, v[i], sum[i]);
    store<Size>(out + start + at, sum);
  });
}

// The gradient at `near` is dout itself.
template <int Size, typename T>
__global__ void __launch_bounds__(kThreads)
    mix_memories_backward_kernel(const T* __restrict__ dout, const T* __restrict__ far, const float* __restrict__ gate,
                                 T* __restrict__ dfar, float* __restrict__ dgate, const Rows rows, int lanes) {
  const Group group(lanes, rows.count);
  const int64_t start = group.row * rows.size;
  float squares = 0.0f, product = 0.0f;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], g[Size];
    load<Size>(far + start + at, v);
    load<Size>(dout + start + at, g);
#pragma unroll
    for (int i = 0; i < Size; ++i) {
      squares = fmaf(v[i], v[i], squares);
      product = fmaf(v[i], g[i], product);
    }
  });
  const float opened = sigmoid(gate[group.row]), scale = inverse_rms(group.sum(squares), rows.size);
  product = group.sum(product);
  if (!group.real) return;
  const float direct = 2.0f * opened * scale, pull = direct * scale * scale * product / rows.size;
  if (group.lane == 0) dgate[group.row] = direct * (1.0f - opened) * product;
  each_vector<Size>(group, rows.size, [&](int at) {
    float v[Size], g[Size];
    load<Size>(far + start + at, v);
    load<Size>(dout + start + at, g);
#pragma unroll
    for (int i = 0; i < Size; ++i) v[i] = direct * g[i] - pull * v[i];
    store<Size>(dfar + start + at, v);
  });
}

}  // namespace
}  // namespace mm_rec

extern "C" int mm_rec_cuda_mix_memories_forward(const void* near, const void* far, int64_t dtype, const float* gate,
                                                void* out, int64_t count, int64_t size, void* stream) {
  using namespace mm_rec;
  const Rows rows = contiguous(count, size);
  return by_vector(rows, [&](auto vector) {
    return by_type(dtype, [&](auto type) {
      using T = decltype(type);
      const int lanes = lanes_a_row(rows.size, vector);
      return launch(mix_memories_kernel<vector, T>, grid(rows, lanes), dim3(kThreads), 0, stream,
                    static_cast<const T*>(near), static_cast<const T*>(far), gate, static_cast<T*>(out), rows, lanes);
    });
  });
}

extern "C" int mm_rec_cuda_mix_memories_backward(const void* dout, const void* far, int64_t dtype, const float* gate,
                                                 void* dfar, float* dgate, int64_t count, int64_t size, void* stream) {
  using namespace mm_rec;
  const Rows rows = contiguous(count, size);
  return by_vector(rows, [&](auto vector) {
    return by_type(dtype, [&](auto type) {
      using T = decltype(type);
      const int lanes = lanes_a_row(rows.size, vector);
      return launch(mix_memories_backward_kernel<vector, T>, grid(rows, lanes), dim3(kThreads), 0, stream,
                    static_cast<const T*>(dout), static_cast<const T*>(far), gate, static_cast<T*>(dfar), dgate, rows,
                    lanes);
    });
  });
}
