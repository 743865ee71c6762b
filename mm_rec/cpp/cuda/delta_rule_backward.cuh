// The backward pass of delta_rule: a walk through the chunks from the last to the first for the gradients of the states
// (delta_rule_backward_states.cu), then all others, all chunks in parallel (delta_rule_backward.cu).
#ifndef MM_REC_DELTA_RULE_BACKWARD_CUH
#define MM_REC_DELTA_RULE_BACKWARD_CUH

#include "delta_rule.cuh"

namespace mm_rec {

// Gradients are contiguous; T is the type of q.
template <typename T>
struct DeltaBackward {
  DeltaInputs in;
  const float* states;  // (B, chunks + 1, H, d, d)
  const T* dout;        // (B, T, H, d), or null
  const float* dlast;   // (B, H, d, d), or null
  T* dq;
  T* dkey;
  T* dv;
  float* dbeta;
  float* dlog_decay;
  float* dstate;
  // Scratch memory: inverses of the chunks, ...
  T* inverses;
  T* dstates;   // ... gradients of the states after each chunk (B, chunks, H, d, d), ...
  T* derrors;   // ... of beta (v - E key S) (B, T, H, d), ...
  T* written;   // ... and R (B, T, H, d), for heads of more than one block
};

// The sums of products of gradients with what they belong to, by tokens: what they say of beta and of g.
struct TokenSums {
  float of_rows[kChunk];        // what each token's row adds to the gradient of its g, ...
  float of_columns[4][kChunk];  // ... and its column in the rows of each warp takes away
  float of_last[kChunk];        // the same of each token's share in the state after the chunk
  float of_whole[kDeltaThreads / 32];
};

// Two neighbouring elements of a row of T.
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* at) {
  float x[2];
  load<2>(at, x);
  return make_float2(x[0], x[1]);
}
template <bool Split>
__device__ __forceinline__ float2 load_pair(const Tile<kChunk, kBlock, Split>& tile, int row, int column) {
  const int at = row * tile.kStride + column;
  float2 pair = load_pair(tile.hi + at);
  if constexpr (Split) {
    const float2 rest = load_pair(tile.lo + at);
    pair.x += rest.x;
    pair.y += rest.y;
  }
  return pair;
}

template <bool Split>
__device__ __forceinline__ void put(Tile<kChunk, kBlock, Split>& tile, int row, const Fragments<8>& x) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) tile.set(row + fragment_row(2 * r), fragment_column(n, 0), x[n][2 * r], x[n][2 * r + 1]);
  }
}

__device__ __forceinline__ void scale_rows(Fragments<8>& x, const float* of_token, int row, float sign) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float scale = sign * of_token[row + fragment_row(2 * r)];
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      x[n][2 * r] *= scale;
      x[n][2 * r + 1] *= scale;
    }
  }
}

__device__ __forceinline__ void tiles_ready() {
  cp_async_wait<0>();
  __syncthreads();
}

// A thread's part of them: of its two rows, and of its columns of scores.
struct ThreadSums {
  float row[2] = {0.0f, 0.0f}, last[2] = {0.0f, 0.0f}, dbeta[2] = {0.0f, 0.0f}, whole = 0.0f;
  float column[kChunk / 8][2] = {};

  __device__ __forceinline__ void add(int n, int i, float term) {
    row[i / 2] += term;
    column[n][i % 2] += term;
  }
  __device__ __forceinline__ void put_columns(TokenSums& sums, int warp_row) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float sum = column[n][j];
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
        if (threadIdx.x % 32 < 4) sums.of_columns[warp_row / 16][fragment_column(n, j)] = sum;
      }
    }
  }
  // Add all up, to the gradients of beta and, through the running sum, of log_decay.
  template <typename T>
  __device__ __forceinline__ void finish(TokenSums& sums, const ChunkDecay& decay, const DeltaBackward<T>& p,
                                         const DeltaExtent& extent, int64_t b, int64_t t0, int64_t head, int warp_row) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int line = warp_row + fragment_row(2 * r);
      const float of_beta = group_sum<4>(dbeta[r]), of_row = group_sum<4>(row[r]), of_last = group_sum<4>(last[r]);
      if (threadIdx.x % 4 != 0) continue;
      sums.of_rows[line] = of_row;
      sums.of_last[line] = of_last;
      if (line < extent.time - t0) p.dbeta[(b * extent.time + t0 + line) * extent.heads + head] = of_beta;
    }
    whole = group_sum(whole);
    if (threadIdx.x % 32 == 0) sums.of_whole[warp_row / 16] = whole;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    float x[2], all_last = 0.0f;  // of the tokens 2 lane and 2 lane + 1
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = 2 * lane + r;
      x[r] = sums.of_rows[token] - sums.of_last[token];
      all_last += sums.of_last[token];
#pragma unroll
      for (int w = 0; w < 4; ++w) x[r] -= sums.of_columns[w][token];
    }
    all_last = group_sum(all_last);
    if (lane == 31) {
      x[1] += all_last;
      for (const float of_warp : sums.of_whole) x[1] += decay.whole * of_warp;
    }
    float after = x[0] + x[1];  // sum over this and later lanes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_down_sync(kFullWarp, after, step);
      after += lane + step < 32 ? other : 0.0f;
    }
    after = __shfl_down_sync(kFullWarp, after, 1);
    x[1] += lane < 31 ? after : 0.0f;
    x[0] += x[1];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = 2 * lane + r;
      const bool begins = decay.document[token] != (token == 0 ? 0 : decay.document[token - 1]);
      if (token >= extent.time - t0) continue;
      p.dlog_decay[(b * extent.time + t0 + token) * extent.heads + head] = begins ? 0.0f : x[r];
    }
  }
};

template <typename T>
cudaError_t delta_backward_states(const DeltaBackward<T>& p, const DeltaExtent& extent, void* stream);

// Both for the sizes of most models (delta_rule_64.cuh).
cudaError_t delta_64_backward_states(const DeltaBackward<bf16>& p, const DeltaExtent& extent, void* stream);
cudaError_t delta_64_gradients(const DeltaBackward<bf16>& p, const DeltaExtent& extent, void* stream);

}  // namespace mm_rec

#endif
