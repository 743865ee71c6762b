// The gates of a chunk of steps of recurrence, as one product on the tensor cores.
#ifndef MM_REC_GATE_PRODUCT_CUH
#define MM_REC_GATE_PRODUCT_CUH

#include "recurrence.cuh"
#include "tile.cuh"

namespace mm_rec {

constexpr int kGateRows = 16;  // of a chunk, steps times sequences: what a matrix instruction takes

// W_g as right operand of the product that gives a chunk's gates. A warp has Dim / warps of the elements of a gate.
template <typename Tile>
class GateProduct {
 public:
  __device__ __forceinline__ void load_matrix(const float* __restrict__ w_g) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float* pair = w_g + (first() + 8 * n + lane / 4) * kDim + 16 * k + 8 * j + lane % 4 * 2;
          hi_[n][k][j] = pack_bf16(pair[0], pair[1]);
          lo_[n][k][j] = pack_remainder(pair[0], pair[1]);
        }
      }
    }
  }

  // gate[row] = sigmoid(u[row] + W_g h[row]) for kGateRows rows, without the product where a row's reset bit is set. Rows of
  // `h` and `gate` are kDim + 8 elements apart.
  template <typename U, int Batch>
  __device__ __forceinline__ void gates(const float* h, const U* u, const unsigned (&resets)[Batch],
                                        float* gate) const {
    const int lane = threadIdx.x % 32;
    Fragments<kN> sum = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t hi[4], lo[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float pair[2];
        load<2>(h + (lane / 4 + j % 2 * 8) * (kDim + 8) + 16 * k + j / 2 * 8 + lane % 4 * 2, pair);
        hi[j] = pack_bf16(pair[0], pair[1]);
        lo[j] = pack_remainder(pair[0], pair[1]);
      }
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        mma_bf16(sum[n], hi, hi_[n][k][0], hi_[n][k][1]);
        mma_bf16(sum[n], lo, hi_[n][k][0], hi_[n][k][1]);
        mma_bf16(sum[n], hi, lo_[n][k][0], lo_[n][k][1]);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = fragment_row(2 * r);
      const float keep = (pick(resets, row % Batch) >> (row / Batch)) & 1 ? 0.0f : 1.0f;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        const int column = first() + fragment_column(n, 0);
        float x[2];
        load<2>(u + row * kDim + column, x);
#pragma unroll
        for (int j = 0; j < 2; ++j) x[j] = sigmoid(fmaf(keep, sum[n][2 * r + j], x[j]));
        store<2>(gate + row * (kDim + 8) + column, x);
      }
    }
  }

 private:
  static constexpr int kDim = Tile::kDim, kN = kDim / (Tile::kThreads / 32) / 8;
  static __device__ __forceinline__ int first() { return static_cast<int>(threadIdx.x) / 32 * 8 * kN; }

  uint32_t hi_[kN][kDim / 16][2], lo_[kN][kDim / 16][2];
};

}  // namespace mm_rec

#endif
