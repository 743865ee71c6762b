// delta_rule, forward, of a single token, as in decoding. A block has a head of a sequence; several threads share a column of its
// state and take its rows in turn.
#include "delta_rule.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 256;

struct Shared {
  float q[kThreads], key[kThreads];
  float partial[kThreads];
};

// The sum over the threads of a column.
__device__ __forceinline__ float column_sum(Shared& shared, float x, int column, int columns) {
  __syncthreads();
  shared.partial[threadIdx.x] = x;
  __syncthreads();
  float sum = 0.0f;
  for (int i = column; i < kThreads; i += columns) sum += shared.partial[i];
  return sum;
}

// `columns` is the size of a head rounded up to a power of two.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    token_kernel(const DeltaInputs in, const float* __restrict__ state0, T* __restrict__ out, float* __restrict__ states,
                 const DeltaExtent extent, int columns) {
  __shared__ Shared shared;
  const int64_t b = blockIdx.y, head = blockIdx.x, line = b * extent.heads + head;
  const int dim = extent.dim, column = static_cast<int>(threadIdx.x) % columns, first = static_cast<int>(threadIdx.x) / columns;
  const int step = kThreads / columns;
  const bool real = column < dim;
  const float* before = state0 + extent.state_at(b, 0, 1, head) + column;
  float* kept = states + extent.state_at(b, 0, 2, head) + column;
  float* after = states + extent.state_at(b, 1, 2, head) + column;
  if (static_cast<int>(threadIdx.x) < dim) {
    shared.q[threadIdx.x] = to_float(in.q.at<T>(extent, b, 0, head)[threadIdx.x]);
    shared.key[threadIdx.x] = to_float(in.key.at<T>(extent, b, 0, head)[threadIdx.x]);
  }
  const float v = real ? to_float(in.v.at<T>(extent, b, 0, head)[column]) : 0.0f, beta = in.beta[line];
  const float decay = in.position[b] == 0 ? 0.0f : __expf(in.log_decay[line]);
  __syncthreads();
  float found = 0.0f;
#pragma unroll 8
  for (int i = first; i < dim; i += step) {
    const float x = real ? before[i * dim] : 0.0f;
    found = fmaf(shared.key[i], x, found);
    if (real) kept[i * dim] = x;
  }
  const float error = beta * (v - decay * column_sum(shared, found, column, columns));
  float read = 0.0f;
#pragma unroll 8
  for (int i = first; i < dim; i += step) {
    const float x = fmaf(shared.key[i], error, decay * (real ? before[i * dim] : 0.0f));
    read = fmaf(shared.q[i], x, read);
    if (real) after[i * dim] = x;
  }
  read = column_sum(shared, read, column, columns);
  if (first == 0 && real) out[extent.token_at(b, 0, head) + column] = from_float<T>(read);
}

}  // namespace

template <typename T>
cudaError_t delta_token(const DeltaInputs& in, const float* state, T* out, float* states, const DeltaExtent& extent,
                        void* stream) {
  int columns = 1;
  while (columns < extent.dim) columns *= 2;
  if (columns > kThreads) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
  return launch(token_kernel<T>, grid, dim3(kThreads), 0, stream, in, state, out, states, extent, columns);
}
template cudaError_t delta_token(const DeltaInputs&, const float*, float*, float*, const DeltaExtent&, void*);
template cudaError_t delta_token(const DeltaInputs&, const float*, bf16*, float*, const DeltaExtent&, void*);

}  // namespace mm_rec
