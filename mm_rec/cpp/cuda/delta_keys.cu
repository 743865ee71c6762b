// delta_keys: the keys of a token and of those before it, weighted, of length 1. A group of up to 32 neighbouring lanes works on
// a head of a token, 8 elements a lane; a block has a tile of tokens of one head.
#include "common.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 256, kSize = 8, kTokens = 128, kContexts = 64;
constexpr int kFew = 4;  // taps that stay in registers

struct Sizes {
  int64_t batch, time, window, heads;
  int dim, reach;  // reach: number of taps

  __host__ __device__ int64_t context() const { return window + time; }
  __host__ __device__ int64_t context_at(int64_t b, int64_t token, int64_t head) const {
    return ((b * context() + token) * heads + head) * dim;
  }
  __host__ __device__ int64_t token_at(int64_t b, int64_t t, int64_t head) const {
    return ((b * time + t) * heads + head) * dim;
  }
};

int lanes_a_head(int dim) {
  int lanes = 1;
  while (lanes * kSize < dim) lanes *= 2;
  return lanes;
}

// Call body(j) for each tap; j is known to the compiler if there are few.
template <bool Few, typename Body>
__device__ __forceinline__ void each_tap(int reach, const Body& body) {
  if constexpr (Few) {
#pragma unroll
    for (int j = 0; j < kFew; ++j) {
      if (j < reach) body(j);
    }
  } else {
    for (int j = 0; j < reach; ++j) body(j);
  }
}

// A lane's columns of a head, and their taps.
template <typename T, bool Few>
class Columns {
 public:
  const int lanes, at, group, groups;  // lanes of a group, the first column, which group of how many in the block

  __device__ __forceinline__ Columns(const Sizes& s, const float* taps, int lanes_a_head)
      : lanes(lanes_a_head), at(static_cast<int>(threadIdx.x) % lanes * kSize),
        group(static_cast<int>(threadIdx.x) / lanes), groups(kThreads / lanes), s_(s),
        taps_(taps + (blockIdx.y * static_cast<int64_t>(s.dim) + at) * s.reach) {
    if constexpr (Few) {
#pragma unroll
      for (int j = 0; j < kFew; ++j) {
#pragma unroll
        for (int i = 0; i < kSize; ++i) few_[j][i] = j < s.reach && at + i < s.dim ? taps_[i * s.reach + j] : 0.0f;
      }
    }
  }
  __device__ __forceinline__ float tap(int j, int i) const {
    if constexpr (Few) return few_[j][i];
    return at + i < s_.dim ? taps_[i * s_.reach + j] : 0.0f;
  }
  __device__ __forceinline__ void load(const T* row, float (&x)[kSize]) const { load_eight(row, at, s_.dim, x); }
  __device__ __forceinline__ void store(T* row, const float (&x)[kSize]) const {
    if (s_.dim % kSize == 0) {
      if (at < s_.dim) mm_rec::store<kSize>(row + at, x);
      return;
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (at + i < s_.dim) row[at + i] = from_float<T>(x[i]);
    }
  }
  // Sum over the columns of the head.
  __device__ __forceinline__ float sum(const float (&x)[kSize], const float (&y)[kSize]) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum = fmaf(x[i], y[i], sum);
    for (int mask = lanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
    return sum;
  }
  // The weighted sum of the keys of token t, whose context `k` is, and of those before it in its document.
  __device__ __forceinline__ void combine(const T* k, int64_t position, float (&total)[kSize]) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) total[i] = 0.0f;
    each_tap<Few>(s_.reach, [&](int j) {
      if (position < j) return;
      float x[kSize];
      load(k - j * s_.heads * s_.dim, x);
#pragma unroll
      for (int i = 0; i < kSize; ++i) total[i] = fmaf(tap(j, i), x[i], total[i]);
    });
  }

 private:
  const Sizes& s_;
  const float* taps_;
  float few_[Few ? kFew : 1][kSize];
};

template <typename T, bool Few>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const T* __restrict__ k, const float* __restrict__ taps, const int64_t* __restrict__ position,
                   T* __restrict__ key, const Sizes s, int lanes) {
  const Columns<T, Few> columns(s, taps, lanes);
  const int64_t b = blockIdx.z, head = blockIdx.y, t0 = static_cast<int64_t>(blockIdx.x) * kTokens;
  for (int first = 0; first < kTokens && t0 + first < s.time; first += columns.groups) {  // whole warps take part in sums
    const int u = first + columns.group;
    const int64_t t = t0 + u;
    const bool real = u < kTokens && t < s.time;
    const int64_t token = real ? t : t0;
    float x[kSize];
    columns.combine(k + s.context_at(b, s.window + token, head), position[b * s.time + token], x);
    const float scale = rsqrtf(columns.sum(x, x) + kNormEps);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] *= scale;
    if (real) columns.store(key + s.token_at(b, t, head), x);
  }
}

// A block has a tile of contexts: it needs the gradients of the sums of the tokens that see them, which are the tile's own and
// `reach` - 1 later ones. Its own tokens' share of the taps' gradients goes to `partial`, (tiles, B, H, d, reach).
template <typename T, bool Few>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const T* __restrict__ dkey, const T* __restrict__ k, const float* __restrict__ taps,
                    const int64_t* __restrict__ position, T* __restrict__ dk, float* __restrict__ partial, const Sizes s,
                    int lanes) {
  const Columns<T, Few> columns(s, taps, lanes);
  const int64_t b = blockIdx.z, head = blockIdx.y, context0 = static_cast<int64_t>(blockIdx.x) * kContexts;
  const int64_t t0 = context0 - s.window;
  const int tokens = kContexts + s.reach - 1, width = lanes * kSize;
  float* dtotal = reinterpret_cast<float*>(dynamic_shared());          // (tokens, width)
  float* of_warps = dtotal + static_cast<int64_t>(tokens) * width;     // (warps, width): taps' gradients
  int* places = reinterpret_cast<int*>(of_warps + kThreads / 32 * width);  // (tokens): position, as far as it matters

  for (int first = 0; first < tokens; first += columns.groups) {
    const int u = first + columns.group;
    const int64_t t = t0 + u;
    const bool real = u < tokens && t >= 0 && t < s.time;
    const int64_t token = real ? t : 0, place = position[b * s.time + token];
    float x[kSize], dy[kSize];
    columns.combine(k + s.context_at(b, s.window + token, head), place, x);
    columns.load(dkey + s.token_at(b, token, head), dy);
    const float scale = rsqrtf(columns.sum(x, x) + kNormEps), slope = scale * scale * scale * columns.sum(dy, x);
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = real ? scale * dy[i] - slope * x[i] : 0.0f;
    if (u >= tokens) continue;
    mm_rec::store<kSize>(dtotal + u * width + columns.at, x);
    if (columns.at == 0) places[u] = static_cast<int>(min(place, int64_t{s.reach}));
  }
  __syncthreads();

  for (int u = columns.group; u < kContexts && context0 + u < s.context(); u += columns.groups) {
    float x[kSize] = {};
    each_tap<Few>(s.reach, [&](int j) {
      if (places[u + j] < j) return;
      float y[kSize];
      mm_rec::load<kSize>(dtotal + (u + j) * width + columns.at, y);
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[i] = fmaf(columns.tap(j, i), y[i], x[i]);
    });
    columns.store(dk + s.context_at(b, context0 + u, head), x);
  }

  float* own = partial + ((static_cast<int64_t>(blockIdx.x) * s.batch + b) * s.heads + head) * s.dim * s.reach;
  for (int j = 0; j < s.reach; ++j) {
    float sum[kSize] = {};
    for (int u = columns.group; u < kContexts; u += columns.groups) {
      const int64_t t = t0 + u;
      if (t < 0 || t >= s.time || places[u] < j) continue;
      float x[kSize], y[kSize];
      columns.load(k + s.context_at(b, s.window + t - j, head), x);
      mm_rec::load<kSize>(dtotal + u * width + columns.at, y);
#pragma unroll
      for (int i = 0; i < kSize; ++i) sum[i] = fmaf(x[i], y[i], sum[i]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      for (int mask = lanes; mask < 32; mask *= 2) sum[i] += __shfl_xor_sync(kFullWarp, sum[i], mask);
    }
    if (static_cast<int>(threadIdx.x) % 32 < lanes) {
      mm_rec::store<kSize>(of_warps + threadIdx.x / 32 * width + columns.at, sum);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < s.dim; i += kThreads) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kThreads / 32; ++w) total += of_warps[w * width + i];
      own[i * s.reach + j] = total;
    }
    __syncthreads();
  }
}

int64_t tiles(const Sizes& s) { return ceil_div(s.context(), kContexts); }

template <typename T, bool Few>
cudaError_t forward(const void* k, const float* taps, const int64_t* position, void* key, const Sizes& s, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(s.time, kTokens)), static_cast<unsigned>(s.heads),
                  static_cast<unsigned>(s.batch));
  return launch(forward_kernel<T, Few>, grid, dim3(kThreads), 0, stream, static_cast<const T*>(k), taps, position,
                static_cast<T*>(key), s, lanes_a_head(s.dim));
}

template <typename T, bool Few>
cudaError_t backward(const void* dkey, const void* k, const float* taps, const int64_t* position, void* dk, float* dtaps,
                     float* partial, const Sizes& s, void* stream) {
  const dim3 grid(static_cast<unsigned>(tiles(s)), static_cast<unsigned>(s.heads), static_cast<unsigned>(s.batch));
  const int lanes = lanes_a_head(s.dim), tokens = kContexts + s.reach - 1;
  const size_t bytes = sizeof(float) * (static_cast<size_t>(tokens + kThreads / 32) * lanes * kSize + tokens);
  const cudaError_t error = launch(backward_kernel<T, Few>, grid, dim3(kThreads), bytes, stream,
                                   static_cast<const T*>(dkey), static_cast<const T*>(k), taps, position,
                                   static_cast<T*>(dk), partial, s, lanes);
  if (error != cudaSuccess) return error;
  const int64_t size = s.heads * s.dim * s.reach;
  return sum_partials(partial, size, tiles(s) * s.batch, dtaps, size, stream);
}

}  // namespace
}  // namespace mm_rec

// Heads of up to 256 elements. All tensors are contiguous.
extern "C" int mm_rec_cuda_delta_keys_forward(const void* k, int64_t dtype, const float* taps, const int64_t* position,
                                              void* key, int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                              int64_t window, int64_t reach, void* stream) {
  using namespace mm_rec;
  const Sizes s{batch, time, window, heads, static_cast<int>(dim), static_cast<int>(reach)};
  const bool narrow = dtype == kBFloat16;
  if (reach > kFew) {
    return narrow ? forward<bf16, false>(k, taps, position, key, s, stream)
                  : forward<float, false>(k, taps, position, key, s, stream);
  }
  return narrow ? forward<bf16, true>(k, taps, position, key, s, stream)
                : forward<float, true>(k, taps, position, key, s, stream);
}

// Bytes.
extern "C" int64_t mm_rec_cuda_delta_keys_workspace(int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                                    int64_t window, int64_t reach) {
  using namespace mm_rec;
  const Sizes s{batch, time, window, heads, static_cast<int>(dim), static_cast<int>(reach)};
  return static_cast<int64_t>(sizeof(float)) * tiles(s) * batch * heads * dim * reach;
}

extern "C" int mm_rec_cuda_delta_keys_backward(const void* dkey, const void* k, int64_t dtype, const float* taps,
                                               const int64_t* position, void* dk, float* dtaps, float* workspace,
                                               int64_t batch, int64_t time, int64_t heads, int64_t dim, int64_t window,
                                               int64_t reach, void* stream) {
  using namespace mm_rec;
  const Sizes s{batch, time, window, heads, static_cast<int>(dim), static_cast<int>(reach)};
  const bool narrow = dtype == kBFloat16;
  if (reach > kFew) {
    return narrow ? backward<bf16, false>(dkey, k, taps, position, dk, dtaps, workspace, s, stream)
                  : backward<float, false>(dkey, k, taps, position, dk, dtaps, workspace, s, stream);
  }
  return narrow ? backward<bf16, true>(dkey, k, taps, position, dk, dtaps, workspace, s, stream)
                : backward<float, true>(dkey, k, taps, position, dk, dtaps, workspace, s, stream);
}
