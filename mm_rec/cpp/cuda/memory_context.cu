// memory_context: q, k and v of a chunk from one wide product, q and k normed per head; k behind the keys of the few tokens
// before that the next keys are made of, v behind the values of the window.
// A group of up to 32 neighbouring lanes works on a head of a token, 8 elements a lane.
#include "common.cuh"
#include "launch.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 256, kSize = 8;

struct Sizes {
  int64_t batch, time, recent, window, heads;  // recent: keys before the chunk, at most the window
  int dim;
  int64_t stride;  // between rows (b, t) of qkv

  __host__ __device__ int64_t context() const { return window + time; }
};

// A group of `lanes` lanes (a power of two), its head and token among `tokens` of each row. Lanes past the head's end hold
// zeros; groups past the last work on that one too, since sums need whole warps, but write nothing.
struct Group {
  int lanes, at;
  int64_t b, token, head;
  bool real;

  __device__ __forceinline__ Group(const Sizes& s, int64_t tokens, int lanes_a_head) : lanes(lanes_a_head) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, groups = s.batch * tokens * s.heads;
    const int64_t group = min(thread / lanes, groups - 1);
    at = static_cast<int>(threadIdx.x) % lanes * kSize;
    real = thread / lanes < groups && at < s.dim;
    head = group % s.heads;
    token = group / s.heads % tokens;
    b = group / s.heads / tokens;
  }
  __device__ __forceinline__ float sum(float x) const {
    for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
    return x;
  }
};

template <typename T>
__device__ __forceinline__ void load_if(bool real, const T* source, float (&out)[kSize]) {
  if (real) {
    load<kSize>(source, out);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = 0.0f;
  }
}

__device__ __forceinline__ float dot(const float (&x)[kSize], const float (&y)[kSize]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = fmaf(x[i], y[i], sum);
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ qkv, const T* __restrict__ recent, const T* __restrict__ ring_v,
                   T* __restrict__ q, T* __restrict__ k, T* __restrict__ v, const Sizes s, int lanes) {
  const Group group(s, s.context(), lanes);
  const int64_t width = s.heads * s.dim, column = group.head * s.dim + group.at, t = group.token - s.window;
  const int64_t to = (group.b * s.context() + group.token) * width + column;
  const bool old = t < 0, has_key = t + s.recent >= 0;
  const T* from = qkv + (group.b * s.time + t) * s.stride + column;
  const T* before_k = recent + (group.b * s.recent + t + s.recent) * width + column;
  const T* before_v = ring_v + (group.b * s.window + group.token) * width + column;
  float a[kSize], b[kSize], c[kSize];
  load_if(group.real && !old, from, a);
  load_if(group.real && has_key, old ? before_k : from + width, b);
  load_if(group.real, old ? before_v : from + 2 * width, c);
  const float norm_q = rsqrtf(group.sum(dot(a, a)) / s.dim + kNormEps);
  const float norm_k = rsqrtf(group.sum(dot(b, b)) / s.dim + kNormEps);
  if (!group.real) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    a[i] *= norm_q;
    b[i] *= old ? 1.0f : norm_k;
  }
  if (!old) store<kSize>(q + (group.b * s.time + t) * width + column, a);
  if (has_key) store<kSize>(k + (group.b * (s.recent + s.time) + t + s.recent) * width + column, b);
  store<kSize>(v + to, c);
}

// x <- r dy - x r^3 mean(dy x) with r = 1 / rms(x).
__device__ __forceinline__ void norm_gradient(const Group& group, int dim, const float (&dy)[kSize], float (&x)[kSize]) {
  const float scale = rsqrtf(group.sum(dot(x, x)) / dim + kNormEps);
  const float slope = scale * scale * scale * group.sum(dot(dy, x)) / dim;
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = scale * dy[i] - slope * x[i];
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ dq, const T* __restrict__ dk, const T* __restrict__ dv,
                    const T* __restrict__ qkv, T* __restrict__ dqkv, const Sizes s, int lanes) {
  const Group group(s, s.time, lanes);
  const int64_t width = s.heads * s.dim, column = group.head * s.dim + group.at;
  const int64_t line = group.b * s.time + group.token;
  const int64_t key = (group.b * (s.recent + s.time) + s.recent + group.token) * width + column;
  const int64_t value = (group.b * s.context() + s.window + group.token) * width + column;
  const T* from = qkv + line * s.stride + column;
  float q[kSize], k[kSize], a[kSize], b[kSize], c[kSize];
  load_if(group.real, from, q);
  load_if(group.real, from + width, k);
  load_if(group.real, dq + line * width + column, a);
  load_if(group.real, dk + key, b);
  load_if(group.real, dv + value, c);
  norm_gradient(group, s.dim, a, q);
  norm_gradient(group, s.dim, b, k);
  if (!group.real) return;
  T* to = dqkv + line * 3 * width + column;
  store<kSize>(to, q);
  store<kSize>(to + width, k);
  store<kSize>(to + 2 * width, c);
}

int lanes_a_head(int dim) {
  int lanes = 1;
  while (lanes * kSize < dim) lanes *= 2;
  return lanes;
}

template <typename T>
cudaError_t forward(const void* qkv, const void* recent, const void* ring_v, void* q, void* k, void* v, const Sizes& s,
                    void* stream) {
  const int lanes = lanes_a_head(s.dim);
  const dim3 grid(static_cast<unsigned>(ceil_div(s.batch * s.context() * s.heads * lanes, kThreads)));
  return launch(forward_kernel<T>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(qkv),
                static_cast<const T*>(recent), static_cast<const T*>(ring_v), static_cast<T*>(q), static_cast<T*>(k),
                static_cast<T*>(v), s, lanes);
}

template <typename T>
cudaError_t backward(const void* dq, const void* dk, const void* dv, const void* qkv, void* dqkv, const Sizes& s,
                     void* stream) {
  const int lanes = lanes_a_head(s.dim);
  const dim3 grid(static_cast<unsigned>(ceil_div(s.batch * s.time * s.heads * lanes, kThreads)));
  return launch(backward_kernel<T>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(dq),
                static_cast<const T*>(dk), static_cast<const T*>(dv), static_cast<const T*>(qkv), static_cast<T*>(dqkv),
                s, lanes);
}

}  // namespace
}  // namespace mm_rec

// Heads of up to 256 elements, a multiple of 8; recent is at most the window.
extern "C" int mm_rec_cuda_memory_context_forward(const void* qkv, int64_t stride, const void* recent,
                                                  const void* ring_v, int64_t dtype, void* q, void* k, void* v,
                                                  int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                                  int64_t n_recent, int64_t window, void* stream) {
  using namespace mm_rec;
  const Sizes s{batch, time, n_recent, window, heads, static_cast<int>(dim), stride};
  return dtype == kBFloat16 ? forward<bf16>(qkv, recent, ring_v, q, k, v, s, stream)
                            : forward<float>(qkv, recent, ring_v, q, k, v, s, stream);
}

// dqkv is contiguous.
extern "C" int mm_rec_cuda_memory_context_backward(const void* dq, const void* dk, const void* dv, const void* qkv,
                                                   int64_t stride, int64_t dtype, void* dqkv, int64_t batch,
                                                   int64_t time, int64_t heads, int64_t dim, int64_t n_recent,
                                                   int64_t window, void* stream) {
  using namespace mm_rec;
  const Sizes s{batch, time, n_recent, window, heads, static_cast<int>(dim), stride};
  return dtype == kBFloat16 ? backward<bf16>(dq, dk, dv, qkv, dqkv, s, stream)
                            : backward<float>(dq, dk, dv, qkv, dqkv, s, stream);
}
