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

// The memory before, and all versions of it.
struct UpdateOutputs {
  const float* key0;
  const float* value0;
  const float* mass0;
  float* key;
  float* value;
  float* mass;
};

struct UpdateGradients {
  const float* dkey;  // of all versions
  const float* dvalue;
  const float* dmass;
  const float* key;
  const float* value;
  const float* mass;
  void* dk;
  void* dv;
  float* dkey0;
  float* dvalue0;
  float* dmass0;
  float* daddress;  // (B, H, S, d) and (B, H): sums over B are left to the caller
  float* drate;
};

// Sizes of a block of threads: Q tokens times Q slots, each warp 16 tokens and one of `Sides` equal parts of the slots.
// `Dim` is the head size rounded up. Products are exact to float32 where the operands are: addresses, weights and
// gradients are split, tokens where they are float32.
template <typename T, int Dim, int Q, int Sides>
struct UpdatePlan {
  static constexpr int kDim = Dim, kQ = Q, kSides = Sides, kSpan = Q / Sides;
  static constexpr int kWarps = Q / 16 * Sides, kThreads = 32 * kWarps;
  // Rows of keys or values are shared between half of the sides.
  static constexpr int kParts = Sides / 2, kPart = Dim / kParts;
  using Tokens = Tile<Q, Dim, sizeof(T) == 4>;
  using Slots = Tile<Q, Dim, true>;
  using Weights = Tile<Q, Q, true>;  // (token, slot)
  using Logits = Fragments<kSpan / 8>;
  using Rows = Fragments<kPart / 8>;  // 16 tokens or slots and part of the columns, of keys or of values

  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int side() { return warp() / (Q / 16); }
  // The first token and the first slot of this warp.
  static __device__ __forceinline__ int token() { return warp() % (Q / 16) * 16; }
  static __device__ __forceinline__ int slot() { return side() * kSpan; }
  // Whether its rows are of values, and their first column.
  static __device__ __forceinline__ bool of_value() { return side() >= kParts; }
  static __device__ __forceinline__ int column() { return side() % kParts * kPart; }

  // Q rows on their way from memory to a tile: first all are asked for, then they are put down, so that one wait serves
  // for all. Row r is at source + r * stride; what is outside `rows` rows of `dim` elements is zero.
  template <typename Source>
  class Loads {
   public:
    __device__ __forceinline__ void fetch(const Source* source, int64_t stride, int rows, int dim) {
      source_ = source;
      stride_ = stride;
      rows_ = rows;
      dim_ = dim;
      if (dim % 8 != 0) return;  // `put` reads pair by pair
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (row(i) < rows && column(i) < dim) {
          raw_[i] = *reinterpret_cast<const Words<Source, 8>*>(source + row(i) * stride + column(i));
        } else {
          raw_[i] = {};
        }
      }
    }
    template <typename TileType>
    __device__ __forceinline__ void put(TileType& tile) const {
      if (dim_ % 8 == 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          float x[8];
#pragma unroll
          for (int j = 0; j < 8; ++j) x[j] = raw_[i][j];
          tile.set(row(i), column(i), x);
        }
      } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < Q * Dim / 2; i += kThreads) {
          const int row = i / (Dim / 2), column = i % (Dim / 2) * 2;
          float x[2] = {0.0f, 0.0f};
          if (row < rows_ && column < dim_) load<2>(source_ + row * stride_ + column, x);
          tile.set(row, column, x[0], x[1]);
        }
      }
    }

   private:
    static constexpr int kCount = Q * (Dim / 8) / kThreads;
    static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x + i * kThreads) / (Dim / 8); }
    static __device__ __forceinline__ int column(int i) {
      return static_cast<int>(threadIdx.x + i * kThreads) % (Dim / 8) * 8;
    }

    Words<Source, 8> raw_[kCount];
    const Source* source_;
    int64_t stride_;
    int rows_, dim_;
  };

  // Logits k . address of this warp's tokens and slots; -inf for slots past the last.
  static __device__ __forceinline__ void logits(const Tokens& k, const Slots& address, int slots, Logits& out) {
    zero(out);
    multiply<false, false, Dim>(out, k, token(), address, slot());
#pragma unroll
    for (int n = 0; n < kSpan / 8; ++n) {
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
        for (int n = 0; n < kSpan / 8; ++n) largest = fmaxf(largest, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
        if (largest == -INFINITY) continue;
#pragma unroll
        for (int n = 0; n < kSpan / 8; ++n) total += __expf(x[n][2 * r] - largest) + __expf(x[n][2 * r + 1] - largest);
        merge(r, largest, total);
      }
    }
    // ... then of all slots, through shared memory, (Sides, Q) pairs. All threads of the block take part.
    __device__ __forceinline__ void finish(float2* shared) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
          const float other_top = __shfl_xor_sync(kFullWarp, top[r], mask);
          const float other_sum = __shfl_xor_sync(kFullWarp, sum[r], mask);
          merge(r, other_top, other_sum);
        }
        if (threadIdx.x % 4 == 0) shared[side() * Q + token() + fragment_row(2 * r)] = make_float2(top[r], sum[r]);
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[r] = -INFINITY;
        sum[r] = 0.0f;
#pragma unroll
        for (int q = 0; q < Sides; ++q) {
          const float2 part = shared[q * Q + token() + fragment_row(2 * r)];
          merge(r, part.x, part.y);
        }
      }
      __syncthreads();
    }
  };

  // Put this warp's weights, or gradients of their logits, down as a tile.
  static __device__ __forceinline__ void put(Weights& tile, const Logits& x) {
#pragma unroll
    for (int n = 0; n < kSpan / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        tile.set(token() + fragment_row(2 * r), slot() + fragment_column(n, 0), x[n][2 * r], x[n][2 * r + 1]);
      }
    }
  }

  // Turn logits into weights rate * softmax; 0 for tokens past the last.
  static __device__ __forceinline__ void weights(const Softmax& softmax, float rate, int tokens, Logits& x) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = token() + fragment_row(2 * r) < tokens ? rate / softmax.sum[r] : 0.0f;
#pragma unroll
      for (int n = 0; n < kSpan / 8; ++n) {
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
    for (int n = 0; n < kSpan / 8; ++n) {
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
