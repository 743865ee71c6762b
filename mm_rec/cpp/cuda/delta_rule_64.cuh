// delta_rule for the sizes of most models: heads of 64 in bfloat16. Of each chunk only what leads from one state to the next is
// done one after the other, by four warps that hold the state (or its gradient), transposed, 16 columns each; four others
// do the rest of the chunk's work beside them, and one more fetches the next chunk. Holders and helpers hand over left operands
// as they are in registers, through shared memory.
#ifndef MM_REC_DELTA_RULE_64_CUH
#define MM_REC_DELTA_RULE_64_CUH

#include "delta_rule.cuh"

namespace mm_rec {

constexpr int kGroup64 = 128, kBoth64 = 2 * kGroup64, kThreads64 = kBoth64 + 32;
// Of the helpers alone, of what is handed over, and of all threads after each chunk.
constexpr int kHelperBarrier = 1, kFirstBarrier = 2, kSecondBarrier = 3, kChunkBarrier = 4;

using Square64 = Tile<kChunk, kBlock, false>;
using Handed = uint4[4][kGroup64];  // four left operands of 16 x 16 of each thread of a group

struct Stage64 {
  Square64 q, key, rows, inverse;  // of a chunk; rows: of v, or of the gradient of the result
  ChunkDecay decay;
};

// Start filling a tile with 64 rows of 64 elements, by one warp; those past the first `rows` are zero.
__device__ __forceinline__ void fetch_64(Square64& tile, const bf16* source, int64_t stride, int rows) {
  const int lane = threadIdx.x % 32, column = lane % 8 * 8;
  const bf16* from = source + lane / 8 * stride + column;
  bf16* to = tile.hi + lane / 8 * Square64::kStride + column;
#pragma unroll
  for (int i = 0; i < kChunk; i += 4) {
    const bool inside = i + lane / 8 < rows;
    cp_async_16(to + i * Square64::kStride, inside ? from : source, inside);
    from += 4 * stride;
  }
}

// The warp that fetches, chunk by chunk, the first one first if `Step` is 1, the last one if it is -1. `rows` is null for zeros.
template <int Step>
__device__ __forceinline__ void fetch_chunks(Stage64 (&stages)[2], const DeltaInputs& in, const TokenRows& rows,
                                             const bf16* inverses, const DeltaExtent& extent, int64_t b, int64_t head) {
  const int64_t chunks = extent.chunks();
  int64_t chunk = Step > 0 ? 0 : chunks - 1;
#pragma unroll 1
  for (int64_t i = 0; i < chunks; ++i) {
    Stage64& stage = stages[i % 2];
    const int64_t t0 = chunk * kChunk;
    const int tokens = static_cast<int>(min(extent.time - t0, int64_t{kChunk}));
    fetch_64(stage.key, in.key.at<bf16>(extent, b, t0, head), in.key.stride, tokens);
    fetch_64(stage.inverse, inverses + extent.inverse_at(b, chunk, head), kChunk, kChunk);
    fetch_64(stage.q, in.q.at<bf16>(extent, b, t0, head), in.q.stride, tokens);
    if (rows.first != nullptr) {
      fetch_64(stage.rows, rows.at<bf16>(extent, b, t0, head), rows.stride, tokens);
    } else {
      fetch_64(stage.rows, inverses, 0, 0);
    }
    cp_async_commit();
    DecayLoads loads(kBoth64);
    loads.fetch(in, extent, b, head, t0);
    loads.put(stage.decay);
    cp_async_wait<0>();
    named_barrier(kChunkBarrier, kThreads64);
    chunk += Step;
  }
}

__device__ __forceinline__ void hand_over(Handed& target, const Left<false> (&left)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    target[k][threadIdx.x % kGroup64] = make_uint4(left[k].hi[0], left[k].hi[1], left[k].hi[2], left[k].hi[3]);
  }
}
__device__ __forceinline__ void take(const Handed& source, Left<false> (&left)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint4 words = source[k][threadIdx.x % kGroup64];
    left[k] = {{words.x, words.y, words.z, words.w}, {}};
  }
}

// c += left right over 64 of the summed index.
template <bool RowMajor>
__device__ __forceinline__ void multiply_64(Fragments<8>& c, const Left<false> (&left)[4], const Square64& right) {
#pragma unroll
  for (int k = 0; k < 4; ++k) multiply_step<RowMajor>(c, left[k], right, 0, 16 * k);
}

__device__ __forceinline__ void to_lefts(const Fragments<8>& x, Left<false> (&left)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) left[k] = to_left<false>(x, k);
}

// Scale columns of accumulators.
__device__ __forceinline__ void scale_columns(Fragments<8>& x, const float (&of_token)[kChunk]) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const float2 scale = *reinterpret_cast<const float2*>(&of_token[fragment_column(n, 0)]);
    x[n][0] *= scale.x;
    x[n][1] *= scale.y;
    x[n][2] *= scale.x;
    x[n][3] *= scale.y;
  }
}

// The scores of 16 queries from `row` on, (q key^T) D.
__device__ __forceinline__ void score_64(const Stage64& stage, int row, Fragments<8>& scores) {
  zero(scores);
  multiply<false, false, kBlock>(scores, stage.q, row, stage.key, 0);
  each_decay(stage.decay, row, [&](int n, int i, int, float between) { scores[n][i] *= between; });
}
__device__ __forceinline__ void put_64(Square64& tile, int row, const Fragments<8>& x) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) tile.set(row + fragment_row(2 * r), fragment_column(n, 0), x[n][2 * r], x[n][2 * r + 1]);
  }
}

// Left operands, transposed to rows `stride` apart that begin with the warp's first column; those past `rows` are not there.
__device__ __forceinline__ void store_transposed_64(bf16* target, int64_t stride, int rows, const Left<false> (&left)[4]) {
  const bool odd = threadIdx.x % 2 != 0;
  const int lane = threadIdx.x % 32;
  bf16* to = target + lane / 4 * stride + (odd ? 8 : 0) + lane % 4 / 2 * 4;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const uint32_t first = transpose_matrix(left[n / 2].hi[n % 2 * 2]), second = transpose_matrix(left[n / 2].hi[n % 2 * 2 + 1]);
    // Two neighbouring lanes have the same row: one takes its first eight elements, the other the rest.
    const uint32_t got = __shfl_xor_sync(kFullWarp, odd ? first : second, 1);
    if (8 * n + lane / 4 < rows) {
      *reinterpret_cast<uint2*>(to + 8 * n * stride) = odd ? make_uint2(got, second) : make_uint2(first, got);
    }
  }
}

// A holder's elements of a state, from the first one of the thread on.
__device__ __forceinline__ int own_element_64(int warp_row) {
  return fragment_column(0, 0) * kBlock + warp_row + fragment_row(0);
}
__device__ __forceinline__ void load_state_64(const float* from, Fragments<8>& state) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state[n][i] = from[(8 * n + i % 2) * kBlock + i / 2 * 8];
  }
}
__device__ __forceinline__ void store_state_64(float* to, const Fragments<8>& state) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[(8 * n + i % 2) * kBlock + i / 2 * 8] = state[n][i];
  }
}

// Call body(stage, chunk) for each chunk, by holders or helpers.
template <int Step, typename Body>
__device__ __forceinline__ void each_chunk(Stage64 (&stages)[2], int64_t chunks, const Body& body) {
  int64_t chunk = Step > 0 ? 0 : chunks - 1;
#pragma unroll 1
  for (int64_t i = 0; i < chunks; ++i) {
    named_barrier(kChunkBarrier, kThreads64);
    body(stages[i % 2], chunk);
    chunk += Step;
  }
}

cudaError_t delta_64_forward(const DeltaInputs& in, const float* state, const bf16* inverses, bf16* out, float* states,
                             const DeltaExtent& extent, void* stream);

}  // namespace mm_rec

#endif
