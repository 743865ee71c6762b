// The weights of a write, as both directions of memory_update compute them.
#ifndef MM_REC_MEMORY_UPDATE_CUH
#define MM_REC_MEMORY_UPDATE_CUH

#include "memory.cuh"

namespace mm_rec {

struct UpdateInputs {
  const void* k;
  const void* v;
  const float* address;
  const float* rate;
  const int64_t* position;
  WriteIndex index;
};

// Sizes of a block of threads: Q tokens times Q slots on Q / 8 warps, each 16 tokens and half of the slots. `Dim` is
// the head size rounded up. Products are exact to float32 where the operands are: addresses, weights and gradients are
// split, tokens where they are float32.
template <typename T, int Dim, int Q>
struct UpdatePlan {
  static constexpr int kDim = Dim, kQ = Q, kThreads = Q * 4, kWarps = Q / 8, kHalf = Q / 2;
  using Tokens = Tile<Q, Dim, sizeof(T) == 4>;
  using Slots = Tile<Q, Dim, true>;
  using Weights = Tile<Q, Q, true>;  // (token, slot)
  using Logits = Fragments<kHalf / 8>;

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  // The first token and the first slot of this warp.
  static __device__ __forceinline__ int token() { return warp() % (Q / 16) * 16; }
  static __device__ __forceinline__ int slot() { return warp() / (Q / 16) * kHalf; }

  // Fill a tile with `rows` rows of `dim` elements, `stride` apart; zero outside.
  template <typename TileType, typename Source>
  static __device__ __forceinline__ void fill(TileType& tile, const Source* source, int64_t stride, int rows, int dim) {
    for (int i = threadIdx.x; i < Q * (Dim / 8); i += kThreads) {
      const int row = i / (Dim / 8), column = i % (Dim / 8) * 8;
      float x[8] = {};
      if (row < rows) load_eight(source + row * stride, column, dim, x);
      tile.set(row, column, x);
    }
  }

  // Logits k . address of this warp's tokens and slots; -inf for slots past the last.
  static __device__ __forceinline__ void logits(const Tokens& k, const Slots& address, int slots, Logits& out) {
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
    }
    multiply<false, false, Dim>(out, k, token(), address, slot());
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (slot() + fragment_column(n, i) >= slots) out[n][i] = -INFINITY;
      }
    }
  }

  // Largest logit and sum of exponentials of each token, over tiles of slots: first of one lane's columns, ...
  struct Softmax {
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};

    __device__ __forceinline__ void merge(int r, float other_top, float other_sum) {
      const float both = fmaxf(top[r], other_top);
      if (both == -INFINITY) return;
      sum[r] = sum[r] * __expf(top[r] - both) + other_sum * __expf(other_top - both);
      top[r] = both;
    }
    __device__ __forceinline__ void add(const Logits& x) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = -INFINITY, total = 0.0f;
#pragma unroll
        for (int n = 0; n < kHalf / 8; ++n) largest = fmaxf(largest, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
        if (largest == -INFINITY) continue;
#pragma unroll
        for (int n = 0; n < kHalf / 8; ++n) total += __expf(x[n][2 * r] - largest) + __expf(x[n][2 * r + 1] - largest);
        merge(r, largest, total);
      }
    }
    // ... then of all slots, through shared memory, (2, Q, 2) floats. All threads of the block take part.
    __device__ __forceinline__ void finish(float* shared) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
          const float other_top = __shfl_xor_sync(kFullWarp, top[r], mask);
          const float other_sum = __shfl_xor_sync(kFullWarp, sum[r], mask);
          merge(r, other_top, other_sum);
        }
      }
      const int side = slot() / kHalf;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (threadIdx.x % 4 == 0) {
          float* mine = shared + ((side * Q) + token() + fragment_row(2 * r)) * 2;
          mine[0] = top[r];
          mine[1] = sum[r];
        }
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* other = shared + (((1 - side) * Q) + token() + fragment_row(2 * r)) * 2;
        merge(r, other[0], other[1]);
      }
      __syncthreads();
    }
  };

  // Turn logits into weights rate * softmax; 0 for tokens past the last.
  static __device__ __forceinline__ void weights(const Softmax& softmax, float rate, int tokens, Logits& x) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = token() + fragment_row(2 * r) < tokens ? rate / softmax.sum[r] : 0.0f;
#pragma unroll
      for (int n = 0; n < kHalf / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) x[n][2 * r + j] = scale * __expf(x[n][2 * r + j] - softmax.top[r]);
      }
    }
  }

  // For each slot of the tile: factor[s] *= product over tokens of (1 - w), and mass[s] += their sum unless it is null.
  // `scratch` holds (Q / 16, Q) pairs. All threads of the block take part.
  static __device__ __forceinline__ void accumulate_columns(const Logits& w, float2* scratch, float* factor,
                                                            float* mass) {
#pragma unroll
    for (int n = 0; n < kHalf / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float product = (1.0f - w[n][j]) * (1.0f - w[n][2 + j]), sum = w[n][j] + w[n][2 + j];
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
          product *= __shfl_xor_sync(kFullWarp, product, mask);
          sum += __shfl_xor_sync(kFullWarp, sum, mask);
        }
        if (threadIdx.x % 32 < 4) scratch[token() / 16 * Q + slot() + fragment_column(n, j)] = make_float2(product, sum);
      }
    }
    __syncthreads();
    for (int s = threadIdx.x; s < Q; s += kThreads) {
#pragma unroll
      for (int g = 0; g < Q / 16; ++g) {
        factor[s] *= scratch[g * Q + s].x;
        if (mass != nullptr) mass[s] += scratch[g * Q + s].y;
      }
    }
    __syncthreads();
  }
};

}  // namespace mm_rec

#endif
