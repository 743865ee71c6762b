// Matrix products of small tiles on the tensor cores.
//
// Operands are bf16 tiles in shared memory. Where float32 matters an operand is split into hi + lo, two bf16 tiles, and
// the product becomes hi hi + lo hi + hi lo: three instructions instead of one and an error near 2^-16 instead of 2^-9.
#ifndef MM_REC_TILE_CUH
#define MM_REC_TILE_CUH

#include "common.cuh"
#include "ptx.cuh"

namespace mm_rec {

__device__ __forceinline__ uint32_t pack_bf16(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The rest of two float32 after rounding to bf16, as bf16.
__device__ __forceinline__ uint32_t pack_remainder(float first, float second) {
  return pack_bf16(first - to_float(__float2bfloat16_rn(first)), second - to_float(__float2bfloat16_rn(second)));
}

template <int Rows, int Columns, bool Split>
struct alignas(16) Tile {
  static constexpr int kStride = Columns + 8;  // 16 bytes more: the eight rows of a matrix fall in different banks
  bf16 hi[Rows * kStride];
  bf16 lo[Split ? Rows * kStride : 8];

  // Neighbouring elements from (row, column) on; the column is a multiple of their number.
  __device__ __forceinline__ void set(int row, int column, float first, float second) {
    const int at = row * kStride + column;
    *reinterpret_cast<uint32_t*>(hi + at) = pack_bf16(first, second);
    if constexpr (Split) *reinterpret_cast<uint32_t*>(lo + at) = pack_remainder(first, second);
  }
  __device__ __forceinline__ void set(int row, int column, const float (&x)[4]) {
    const int at = row * kStride + column;
    *reinterpret_cast<uint2*>(hi + at) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
    if constexpr (Split) {
      *reinterpret_cast<uint2*>(lo + at) = make_uint2(pack_remainder(x[0], x[1]), pack_remainder(x[2], x[3]));
    }
  }
};

// A 16 x 16 left operand in registers.
template <bool Split>
struct Left {
  uint32_t hi[4];
  uint32_t lo[Split ? 4 : 1];
};

// Accumulators of a warp: 16 rows and 8 * N columns. Element i of fragment n is at (row(i), column(n, i)).
template <int N>
using Fragments = float[N][4];

__device__ __forceinline__ int fragment_row(int i) { return static_cast<int>(threadIdx.x) % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ int fragment_column(int n, int i) {
  return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
}

template <int N>
__device__ __forceinline__ void zero(Fragments<N>& c) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
  }
}

// Left operand from a tile that holds it as (m, k), or as (k, m) if `Transposed`.
template <bool Transposed, int Rows, int Columns, bool Split>
__device__ __forceinline__ Left<Split> load_left(const Tile<Rows, Columns, Split>& tile, int m, int k) {
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
  const int at = Transposed ? (k + matrix / 2 * 8 + row) * tile.kStride + m + matrix % 2 * 8
                            : (m + matrix % 2 * 8 + row) * tile.kStride + k + matrix / 2 * 8;
  Left<Split> left;
  if constexpr (Transposed) {
    ldmatrix_trans(left.hi, tile.hi + at);
    if constexpr (Split) ldmatrix_trans(left.lo, tile.lo + at);
  } else {
    ldmatrix(left.hi, tile.hi + at);
    if constexpr (Split) ldmatrix(left.lo, tile.lo + at);
  }
  return left;
}

// Left operand from columns 16 k .. 16 k + 15 of accumulators.
template <bool Split, int N>
__device__ __forceinline__ Left<Split> to_left(const Fragments<N>& c, int k) {
  Left<Split> left;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* pair = c[2 * k + j / 2] + j % 2 * 2;
    left.hi[j] = pack_bf16(pair[0], pair[1]);
    if constexpr (Split) left.lo[j] = pack_remainder(pair[0], pair[1]);
  }
  return left;
}

// c += left right, one step of 16 over k. The tile holds the right operand as (n, k), or as (k, n) if `RowMajor`; its
// columns n .. n + 8 N - 1 take part.
template <bool RowMajor, int N, bool LeftSplit, int Rows, int Columns, bool Split>
__device__ __forceinline__ void multiply_step(Fragments<N>& c, const Left<LeftSplit>& left,
                                              const Tile<Rows, Columns, Split>& right, int n, int k) {
  static_assert(N % 2 == 0, "fragments are loaded two at a time");
  const int lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const int at = RowMajor ? (k + matrix % 2 * 8 + row) * right.kStride + n + 8 * i + matrix / 2 * 8
                            : (n + 8 * i + matrix / 2 * 8 + row) * right.kStride + k + matrix % 2 * 8;
    uint32_t hi[4];
    if constexpr (RowMajor) {
      ldmatrix_trans(hi, right.hi + at);
    } else {
      ldmatrix(hi, right.hi + at);
    }
    mma_bf16(c[i], left.hi, hi[0], hi[1]);
    mma_bf16(c[i + 1], left.hi, hi[2], hi[3]);
    if constexpr (LeftSplit) {
      mma_bf16(c[i], left.lo, hi[0], hi[1]);
      mma_bf16(c[i + 1], left.lo, hi[2], hi[3]);
    }
    if constexpr (Split) {
      uint32_t lo[4];
      if constexpr (RowMajor) {
        ldmatrix_trans(lo, right.lo + at);
      } else {
        ldmatrix(lo, right.lo + at);
      }
      mma_bf16(c[i], left.hi, lo[0], lo[1]);
      mma_bf16(c[i + 1], left.hi, lo[2], lo[3]);
    }
  }
}

// c += left right with rows m .. m + 15 of the left tile and columns n .. of the right one, over k = 0 .. K - 1.
template <bool LeftTransposed, bool RowMajor, int K, int N, typename LeftTile, typename RightTile>
__device__ __forceinline__ void multiply(Fragments<N>& c, const LeftTile& left, int m, const RightTile& right, int n) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    multiply_step<RowMajor>(c, load_left<LeftTransposed>(left, m, k), right, n, k);
  }
}

// c += p right, where p are accumulators of 16 rows and K columns.
template <bool SplitLeft, bool RowMajor, int K, int N, typename RightTile>
__device__ __forceinline__ void multiply(Fragments<N>& c, const Fragments<K / 8>& p, const RightTile& right, int n) {
#pragma unroll
  for (int k = 0; k < K; k += 16) {
    multiply_step<RowMajor>(c, to_left<SplitLeft>(p, k / 16), right, n, k);
  }
}

}  // namespace mm_rec

#endif
