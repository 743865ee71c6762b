// Rows of heads from accumulators in whole pieces of 16 bytes, for heads of 64 in bfloat16.
#ifndef MM_REC_HEAD_ROWS_CUH
#define MM_REC_HEAD_ROWS_CUH

#include "tile.cuh"

namespace mm_rec {

// Of a row of 64 elements lane l of four has words n (n < 8) with the columns 8 n + 2 l and 8 n + 2 l + 1, as in
// accumulators; afterwards it has the four words each of the pieces l and l + 4 of eight columns. The same again leads back.
__device__ __forceinline__ void exchange_words(uint32_t (&words)[8]) {
  const bool odd = threadIdx.x % 2 != 0, upper = threadIdx.x / 2 % 2 != 0;
#pragma unroll
  for (int half = 0; half < 8; half += 4) {
    uint32_t* w = words + half;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t got = __shfl_xor_sync(kFullWarp, odd ? w[i] : w[i + 1], 1);
      w[i + 1] = odd ? w[i + 1] : got;
      w[i] = odd ? got : w[i];
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? w[i] : w[i + 2], 2);
      w[i + 2] = upper ? w[i + 2] : got;
      w[i] = upper ? got : w[i];
    }
  }
}

// A lane's two pieces of a row: columns 8 l ... and 32 + 8 l ....
struct RowWords {
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % 4 * 8; }
  static __device__ __forceinline__ void store(bf16* row, const uint32_t (&words)[8]) {
    *reinterpret_cast<uint4*>(row + column()) = make_uint4(words[0], words[1], words[2], words[3]);
    *reinterpret_cast<uint4*>(row + 32 + column()) = make_uint4(words[4], words[5], words[6], words[7]);
  }
};

// Accumulators of a warp's 16 rows, to rows of heads `stride` apart, if they are among the first `rows`.
__device__ __forceinline__ void store_heads(bf16* target, int64_t stride, int rows, const Fragments<8>& x) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t words[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) words[n] = pack_bf16(x[n][2 * r], x[n][2 * r + 1]);
    exchange_words(words);
    if (fragment_row(2 * r) < rows) RowWords::store(target + fragment_row(2 * r) * stride, words);
  }
}

}  // namespace mm_rec

#endif
