// mixed_keys: the keys of a token and of those before it, weighted, of length 1; with any number of taps. A block has a tile of
// tokens of one head.
#include "mixed_keys.cuh"
#include "reduce.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 256, kTokens = 128, kContexts = 64;

// A block's groups.
template <typename T>
struct Groups {
  const KeyInputs& in;
  KeyColumns<T> columns;
  int group, count;

  __device__ __forceinline__ explicit Groups(const KeyInputs& in_)
      : in(in_), columns(in_), group(static_cast<int>(threadIdx.x) / columns.lanes), count(kThreads / columns.lanes) {}

  __device__ __forceinline__ float tap(int64_t head, int j, int i) const {
    const int column = columns.at + i;
    return column < in.dim ? in.taps[(head * in.dim + column) * in.reach + j] : 0.0f;
  }
  // The weighted sum of the keys of token t and of those before it in its document.
  __device__ __forceinline__ void combine(int64_t b, int64_t t, int64_t head, float (&total)[kKeySize]) const {
    const int64_t position = in.position[b * in.time + t];
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) total[i] = 0.0f;
    for (int j = 0; j < in.reach && j <= position; ++j) {
      float x[kKeySize];
      columns.load(static_cast<const T*>(in.k) + in.context_at(b, in.window + t - j, head), x);
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) total[i] = fmaf(tap(head, j, i), x[i], total[i]);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const KeyInputs in, T* __restrict__ key) {
  const Groups<T> groups(in);
  const int64_t b = blockIdx.z, head = blockIdx.y, t0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  for (int first = 0; first < kTokens && t0 + first < in.time; first += groups.count) {
    const int u = first + groups.group;
    const int64_t t = t0 + u;
    const bool real = u < kTokens && t < in.time;
    float x[kKeySize];
    groups.combine(b, real ? t : t0, head, x);
    const float scale = rsqrtf(groups.columns.sum(x, x) + kNormEps);
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) x[i] *= scale;
    if (real) groups.columns.store(key + in.token_at(b, t, head), x);
  }
}

// A block has a tile of contexts: it needs the gradients of the sums of the tokens that see them, which are the tile's own and
// `reach` - 1 later ones. Its own tokens' share of the taps' gradients goes to `partial`, (tiles, B, H, d, reach).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const KeyInputs in, const T* __restrict__ dkey, T* __restrict__ dk, float* __restrict__ partial) {
  const Groups<T> groups(in);
  const KeyColumns<T>& columns = groups.columns;
  const int64_t b = blockIdx.z, head = blockIdx.y, context0 = static_cast<int64_t>(blockIdx.x) * kContexts;
  const int64_t t0 = context0 - in.window;
  const int tokens = kContexts + in.reach - 1, width = columns.lanes * kKeySize;
  float* dtotal = reinterpret_cast<float*>(dynamic_shared());              // (tokens, width)
  float* of_warps = dtotal + static_cast<int64_t>(tokens) * width;         // (warps, width): gradients of a tap
  int* places = reinterpret_cast<int*>(of_warps + kThreads / 32 * width);  // (tokens): position, as far as it matters

  for (int first = 0; first < tokens; first += groups.count) {
    const int u = first + groups.group;
    const int64_t t = t0 + u;
    const bool real = u < tokens && t >= 0 && t < in.time;
    const int64_t token = real ? t : 0;
    float x[kKeySize], dy[kKeySize];
    groups.combine(b, token, head, x);
    columns.load(dkey + in.token_at(b, token, head), dy);
    columns.through_norm(dy, x);
    if (u >= tokens) continue;
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) x[i] = real ? x[i] : 0.0f;
    mm_rec::store<kKeySize>(dtotal + u * width + columns.at, x);
    if (columns.at == 0) {
      places[u] = static_cast<int>(min(in.position[b * in.time + token], static_cast<int64_t>(in.reach)));
    }
  }
  __syncthreads();

  for (int u = groups.group; u < kContexts && context0 + u < in.context(); u += groups.count) {
    float x[kKeySize] = {};
    for (int j = 0; j < in.reach; ++j) {
      if (places[u + j] < j) continue;
      float y[kKeySize];
      mm_rec::load<kKeySize>(dtotal + (u + j) * width + columns.at, y);
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) x[i] = fmaf(groups.tap(head, j, i), y[i], x[i]);
    }
    columns.store(dk + in.context_at(b, context0 + u, head), x);
  }

  float* own = partial + ((static_cast<int64_t>(blockIdx.x) * in.batch + b) * in.heads + head) * in.dim * in.reach;
  for (int j = 0; j < in.reach; ++j) {
    float sum[kKeySize] = {};
    for (int u = groups.group; u < kContexts; u += groups.count) {
      const int64_t t = t0 + u;
      if (t < 0 || t >= in.time || places[u] < j) continue;
      float x[kKeySize], y[kKeySize];
      columns.load(static_cast<const T*>(in.k) + in.context_at(b, in.window + t - j, head), x);
      mm_rec::load<kKeySize>(dtotal + u * width + columns.at, y);
#pragma unroll
      for (int i = 0; i < kKeySize; ++i) sum[i] = fmaf(x[i], y[i], sum[i]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kKeySize; ++i) {
      for (int mask = columns.lanes; mask < 32; mask *= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], mask);
    }
    if (static_cast<int>(threadIdx.x) % 32 < columns.lanes) {
      mm_rec::store<kKeySize>(of_warps + threadIdx.x / 32 * width + columns.at, sum);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < in.dim; i += kThreads) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kThreads / 32; ++w) total += of_warps[w * width + i];
      own[i * in.reach + j] = total;
    }
    __syncthreads();
  }
}

dim3 blocks(const KeyInputs& in, int64_t size, int tile) {
  return dim3(static_cast<unsigned>(ceil_div(size, tile)), static_cast<unsigned>(in.heads),
              static_cast<unsigned>(in.batch));
}

template <typename T>
cudaError_t forward(const KeyInputs& in, void* key, void* stream) {
  return launch(forward_kernel<T>, blocks(in, in.time, kTokens), dim3(kThreads), 0, stream, in, static_cast<T*>(key));
}

template <typename T>
cudaError_t backward(const KeyInputs& in, const void* dkey, void* dk, float* partial, void* stream) {
  const int tokens = kContexts + in.reach - 1, width = in.lanes() * kKeySize;
  const size_t bytes = sizeof(float) * (static_cast<size_t>(tokens + kThreads / 32) * width + tokens);
  return launch(backward_kernel<T>, blocks(in, in.context(), kContexts), dim3(kThreads), bytes, stream, in,
                static_cast<const T*>(dkey), static_cast<T*>(dk), partial);
}

int64_t partials(const KeyInputs& in) {
  return few_keys(in) ? few_keys_partials(in) : in.batch * ceil_div(in.context(), kContexts);
}

}  // namespace
}  // namespace mm_rec

// Heads of up to 256 elements. All tensors are contiguous.
extern "C" int mm_rec_cuda_mixed_keys_forward(const void* k, int64_t dtype, const float* taps, const int64_t* position,
                                              void* key, int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                              int64_t window, int64_t reach, void* stream) {
  using namespace mm_rec;
  const KeyInputs in{k, taps, position, batch, time, window, heads, static_cast<int>(dim), static_cast<int>(reach)};
  if (few_keys(in)) return few_keys_forward(in, dtype, key, stream);
  return dtype == kBFloat16 ? forward<bf16>(in, key, stream) : forward<float>(in, key, stream);
}

// Bytes.
extern "C" int64_t mm_rec_cuda_mixed_keys_workspace(int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                                    int64_t window, int64_t reach) {
  using namespace mm_rec;
  const KeyInputs in{nullptr, nullptr, nullptr, batch, time, window, heads, static_cast<int>(dim), static_cast<int>(reach)};
  return static_cast<int64_t>(sizeof(float)) * partials(in) * heads * dim * reach;
}

extern "C" int mm_rec_cuda_mixed_keys_backward(const void* dkey, const void* k, int64_t dtype, const float* taps,
                                               const int64_t* position, void* dk, float* dtaps, float* workspace,
                                               int64_t batch, int64_t time, int64_t heads, int64_t dim, int64_t window,
                                               int64_t reach, void* stream) {
  using namespace mm_rec;
  const KeyInputs in{k, taps, position, batch, time, window, heads, static_cast<int>(dim), static_cast<int>(reach)};
  const cudaError_t error = few_keys(in)         ? few_keys_backward(in, dtype, dkey, dk, workspace, stream)
                            : dtype == kBFloat16 ? backward<bf16>(in, dkey, dk, workspace, stream)
                                                 : backward<float>(in, dkey, dk, workspace, stream);
  if (error != cudaSuccess) return error;
  const int64_t size = heads * dim * reach;
  return sum_partials(workspace, size, partials(in), dtaps, size, stream);
}
