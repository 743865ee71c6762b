// Product of one d x d matrix, spread over the registers of a thread block, with vectors in shared memory.
#ifndef MM_REC_MATVEC_CUH
#define MM_REC_MATVEC_CUH

#include "common.cuh"

namespace mm_rec {

// How a block of kThreads threads holds a kDim x kDim matrix and works on kBatch vectors at once.
//
// `Lanes` neighbouring lanes share `Rows` rows: each holds kDim / Lanes columns of them, in pieces of four that
// alternate between the lanes so that their reads of the vector never meet in a bank. The last `SharedColumns`
// columns of each lane live in shared memory, for matrices that don't fit in registers. After the product the
// lanes exchange partial sums so that each ends with kOwned finished elements of one vector.
template <int Dim, int Lanes, int Rows, int Batch, int SharedColumns>
struct MatrixTile {
  static constexpr int kDim = Dim;
  static constexpr int kBatch = Batch;
  static constexpr int kThreads = Dim / Rows * Lanes;
  static constexpr int kColumns = Dim / Lanes;
  static constexpr int kRegisterColumns = kColumns - SharedColumns;
  static constexpr int kOwned = Batch * Rows / Lanes;
  static constexpr int kSharedFloats = kThreads * Rows * SharedColumns;
  static_assert(kColumns % 4 == 0 && SharedColumns % 4 == 0, "columns move in pieces of four");
  static_assert(Batch * Rows % Lanes == 0 && Rows % kOwned == 0, "a lane's elements belong to one vector");

  // First column of piece `piece` of this thread.
  static __device__ __forceinline__ int column(int piece) {
    return 4 * (piece * Lanes + static_cast<int>(threadIdx.x) % Lanes);
  }
  static __device__ __forceinline__ int first_row() { return static_cast<int>(threadIdx.x) / Lanes * Rows; }
  // The vector and the first row that this thread finishes.
  static __device__ __forceinline__ int owned_vector() { return static_cast<int>(threadIdx.x) % Lanes * kOwned / Rows; }
  static __device__ __forceinline__ int owned_row() {
    return first_row() + static_cast<int>(threadIdx.x) % Lanes * kOwned % Rows;
  }

  float weight[Rows][kRegisterColumns];

  // Take element (row, column) of the matrix from `matrix`, transposed if `Transpose`.
  template <bool Transpose>
  __device__ __forceinline__ void load_matrix(const float* __restrict__ matrix, float* shared) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int row = first_row() + r;
        const int col = column(c / 4) + c % 4;
        const float value = matrix[Transpose ? col * Dim + row : row * Dim + col];
        if (c < kRegisterColumns) {
          weight[r][c < kRegisterColumns ? c : 0] = value;
        } else {
          shared_piece(shared, r, (c - kRegisterColumns) / 4)[c % 4] = value;
        }
      }
    }
  }

  // out[i] = element owned_row() + i of the product with vector owned_vector(); `vectors` is (Batch, Dim).
  __device__ __forceinline__ void multiply(const float* vectors, const float* shared, float (&out)[kOwned]) const {
    float sum[Batch * Rows] = {};
#pragma unroll
    for (int piece = 0; piece < kColumns / 4; ++piece) {
      float x[Batch][4];
#pragma unroll
      for (int n = 0; n < Batch; ++n) load<4>(vectors + n * Dim + column(piece), x[n]);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        float w[4];
        if (4 * piece < kRegisterColumns) {
#pragma unroll
          for (int j = 0; j < 4; ++j) w[j] = weight[r][4 * piece < kRegisterColumns ? 4 * piece + j : 0];
        } else {
          load<4>(shared_piece(const_cast<float*>(shared), r, piece - kRegisterColumns / 4), w);
        }
#pragma unroll
        for (int n = 0; n < Batch; ++n) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[n * Rows + r] = fmaf(w[j], x[n][j], sum[n * Rows + r]);
        }
      }
    }
    reduce_scatter(sum);
#pragma unroll
    for (int i = 0; i < kOwned; ++i) out[i] = sum[i];
  }

 private:
  static __device__ __forceinline__ float* shared_piece(float* shared, int r, int piece) {
    return shared + 4 * ((piece * Rows + r) * kThreads + static_cast<int>(threadIdx.x));
  }

  // Halve the number of partial sums with each exchange: a lane keeps the half that its own bit selects.
  static __device__ __forceinline__ void reduce_scatter(float (&sum)[Batch * Rows]) {
#pragma unroll
    for (int mask = Lanes / 2, half = Batch * Rows / 2; mask > 0; mask /= 2, half /= 2) {
      const bool upper = threadIdx.x & mask;
#pragma unroll
      for (int i = 0; i < Batch * Rows / 2; ++i) {
        if (i < half) {
          const float sent = upper ? sum[i] : sum[i + half];
          const float kept = upper ? sum[i + half] : sum[i];
          sum[i] = kept + __shfl_xor_sync(kFullWarp, sent, mask);
        }
      }
    }
  }
};

}  // namespace mm_rec

#endif
