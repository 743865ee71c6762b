// AdamW over all tensors at once, in one pass over memory, and the sum of squares that clipping needs.
#include "common.cuh"
#include "device.cuh"
#include "launch.cuh"
#include "tensor_list.cuh"

namespace mm_rec {
namespace {

constexpr int kVector = 4;

struct Update {
  float *master, *m, *v;
  const void* gradient;
  bf16* rounded;  // may be null
  float* step;
  int64_t count;
  float kept;   // 1 - lr * weight_decay
  bool narrow;  // the gradient is bfloat16
};
static_assert(sizeof(TensorList<Update>) <= 32764, "too long for a kernel's parameter");

struct Rule {
  double lr, beta1, beta2;
  float eps, max_norm;
  const float* norm;
};

// What the step count of a tensor makes of the rule: lr / (1 - beta1^step) and 1 / (1 - beta2^step).
struct Correction {
  float rate, second;
};

// Counts the step of every tensor. Where the norm is not finite no kernel changes anything.
__global__ void __launch_bounds__(kListMost)
    count_kernel(const __grid_constant__ TensorList<Update> updates, const Rule rule,
                 Correction* __restrict__ corrections) {
  const int i = threadIdx.x;
  if (i >= updates.items || !isfinite(*rule.norm)) return;
  const float step = *updates.item[i].step + 1.0f;
  *updates.item[i].step = step;
  const double rate = rule.lr / (1.0 - pow(rule.beta1, static_cast<double>(step)));
  corrections[i] = {static_cast<float>(rate),
                    static_cast<float>(1.0 / (1.0 - pow(rule.beta2, static_cast<double>(step))))};
}

struct Factors {
  float scale, beta1, rest1, beta2, rest2, eps, kept;  // rest: 1 - beta
  Correction correction;

  __device__ __forceinline__ void apply(float& weight, float& first, float& second, float g) const {
    g *= scale;
    first = beta1 * first + rest1 * g;
    second = beta2 * second + rest2 * g * g;
    weight = weight * kept - correction.rate * first / (sqrtf(second * correction.second) + eps);
  }
};

template <typename Gradient>
__device__ __forceinline__ void update(const Update& one, int64_t begin, int64_t end, const Factors& by) {
  const Gradient* gradient = static_cast<const Gradient*>(one.gradient);
  const uintptr_t wide = reinterpret_cast<uintptr_t>(one.master) | reinterpret_cast<uintptr_t>(one.m) |
                         reinterpret_cast<uintptr_t>(one.v);
  const bool aligned = wide % 16 == 0 && reinterpret_cast<uintptr_t>(gradient) % (kVector * sizeof(Gradient)) == 0 &&
                       reinterpret_cast<uintptr_t>(one.rounded) % (kVector * sizeof(bf16)) == 0;
  const int64_t vectors_end = aligned ? end - (end - begin) % kVector : begin;
  for (int64_t i = begin + threadIdx.x * kVector; i < vectors_end; i += kListThreads * kVector) {
    float weight[kVector], first[kVector], second[kVector], g[kVector];
    load(one.master + i, weight);
    load(one.m + i, first);
    load(one.v + i, second);
    load(gradient + i, g);
#pragma unroll
    for (int k = 0; k < kVector; ++k) by.apply(weight[k], first[k], second[k], g[k]);
    store(one.master + i, weight);
    store(one.m + i, first);
    store(one.v + i, second);
    if (one.rounded != nullptr) store(one.rounded + i, weight);
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += kListThreads) {
    by.apply(one.master[i], one.m[i], one.v[i], to_float(gradient[i]));
    if (one.rounded != nullptr) one.rounded[i] = __float2bfloat16_rn(one.master[i]);
  }
}

__global__ void __launch_bounds__(kListThreads)
    adamw_kernel(const __grid_constant__ TensorList<Update> updates, const Rule rule,
                 const Correction* __restrict__ corrections) {
  const float norm = *rule.norm;
  if (!isfinite(norm)) return;
  const int i = updates.find(blockIdx.x);
  const auto [begin, end] = updates.range(i, blockIdx.x);
  const Update& one = updates.item[i];
  const auto f = [](double x) { return static_cast<float>(x); };
  const Factors by{rule.max_norm > 0.0f && norm > rule.max_norm ? rule.max_norm / norm : 1.0f,
                   f(rule.beta1), f(1.0 - rule.beta1), f(rule.beta2), f(1.0 - rule.beta2),
                   rule.eps, one.kept, corrections[i]};
  if (one.narrow) {
    update<bf16>(one, begin, end, by);
  } else {
    update<float>(one, begin, end, by);
  }
}

struct Array {
  const void* data;
  int64_t count;
  bool narrow;
};
static_assert(sizeof(TensorList<Array>) <= 32764, "too long for a kernel's parameter");

template <typename T>
__device__ __forceinline__ double squares(const T* x, int64_t begin, int64_t end) {
  constexpr int kElements = 8;
  double sum = 0.0;
  const auto add = [&](float value) { sum += static_cast<double>(value) * value; };
  const int64_t vectors_end = end - (end - begin) % kElements;
#pragma unroll 2
  for (int64_t i = begin + threadIdx.x * kElements; i < vectors_end; i += kListThreads * kElements) {
    float value[kElements];
    load(x + i, value);
#pragma unroll
    for (int k = 0; k < kElements; ++k) add(value[k]);
  }
  for (int64_t i = vectors_end + threadIdx.x; i < end; i += kListThreads) add(to_float(x[i]));
  return sum;
}

// The sum over a block's threads in a fixed order; thread 0 gets it.
template <int Threads>
__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double warp_sum[Threads / 32];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < Threads / 32; ++w) sum += warp_sum[w];
  }
  return sum;
}

// Each block adds up its share of the chunks in a fixed order and writes one partial sum.
__global__ void __launch_bounds__(kListThreads)
    squares_kernel(const __grid_constant__ TensorList<Array> arrays, double* __restrict__ partial) {
  double sum = 0.0;
  for (int chunk = blockIdx.x; chunk < arrays.chunks(); chunk += gridDim.x) {
    const int i = arrays.find(chunk);
    const auto [begin, end] = arrays.range(i, chunk);
    const Array& x = arrays.item[i];
    sum += x.narrow ? squares(static_cast<const bf16*>(x.data), begin, end)
                    : squares(static_cast<const float*>(x.data), begin, end);
  }
  sum = block_sum<kListThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

constexpr int kTotalThreads = 1024;

__global__ void __launch_bounds__(kTotalThreads)
    total_kernel(const double* __restrict__ partial, int64_t count, double* __restrict__ total) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kTotalThreads) sum += partial[i];
  sum = block_sum<kTotalThreads>(sum);
  if (threadIdx.x == 0) *total = sum;
}

int square_blocks() { return 8 * multiprocessors(); }

constexpr int kUpdateColumns = 8, kArrayColumns = 3;

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

Update update_at(const int64_t* row, double lr, double decay) {
  return {pointer<float>(row[0]), pointer<float>(row[1]), pointer<float>(row[2]), pointer<void>(row[3]),
          pointer<bf16>(row[4]),  pointer<float>(row[5]), row[6],                 static_cast<float>(1.0 - lr * decay),
          row[7] == kBFloat16};
}

}  // namespace
}  // namespace mm_rec

// How many bytes mm_rec_cuda_adamw_many wants for its own use.
extern "C" int64_t mm_rec_cuda_adamw_many_workspace(int64_t tensors) { return tensors * sizeof(mm_rec::Correction); }

// `table` has a row per tensor, in main memory: addresses of master, m, v, gradient, rounded weights or 0, and step
// count; number of elements; type of the gradient.
extern "C" int mm_rec_cuda_adamw_many(int64_t tensors, const int64_t* table, const double* weight_decay,
                                      const float* norm, double max_norm, double lr, double beta1, double beta2,
                                      double eps, void* workspace, void* stream) {
  using namespace mm_rec;
  const Rule rule{lr, beta1, beta2, static_cast<float>(eps), static_cast<float>(max_norm), norm};
  for (int64_t first = 0; first < tensors; first += kListMost) {
    TensorList<Update> list;
    for (int64_t i = first; i < min(first + kListMost, tensors); ++i) {
      list.add(update_at(table + i * kUpdateColumns, lr, weight_decay[i]));
    }
    Correction* corrections = static_cast<Correction*>(workspace) + first;
    cudaError_t error = launch(count_kernel, dim3(1), dim3(kListMost), 0, stream, list, rule, corrections);
    if (error == cudaSuccess && list.chunks() > 0) {
      error = launch(adamw_kernel, dim3(list.chunks()), dim3(kListThreads), 0, stream, list, rule, corrections);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// How many partial sums mm_rec_cuda_sum_of_squares makes.
extern "C" int64_t mm_rec_cuda_sum_of_squares_workspace(int64_t tensors) {
  return mm_rec::ceil_div(tensors, mm_rec::kListMost) * mm_rec::square_blocks();
}

// `table` has a row per tensor, in main memory: address, at a multiple of 16 bytes; number of elements; type.
extern "C" int mm_rec_cuda_sum_of_squares(int64_t tensors, const int64_t* table, double* partial, double* total,
                                          void* stream) {
  using namespace mm_rec;
  const int blocks = square_blocks();
  for (int64_t first = 0; first < tensors; first += kListMost) {
    TensorList<Array> list;
    for (int64_t i = first; i < min(first + kListMost, tensors); ++i) {
      const int64_t* row = table + i * kArrayColumns;
      list.add({pointer<void>(row[0]), row[1], row[2] == kBFloat16});
    }
    double* part = partial + first / kListMost * blocks;
    const cudaError_t error = launch(squares_kernel, dim3(blocks), dim3(kListThreads), 0, stream, list, part);
    if (error != cudaSuccess) return error;
  }
  const int64_t partials = mm_rec_cuda_sum_of_squares_workspace(tensors);
  return launch(total_kernel, dim3(1), dim3(kTotalThreads), 0, stream, partial, partials, total);
}
