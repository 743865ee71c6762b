// Parts that memory_update and memory_read share: sizes, which tokens write, rows of heads.
#ifndef MM_REC_MEMORY_CUH
#define MM_REC_MEMORY_CUH

#include "common.cuh"
#include "tile.cuh"

namespace mm_rec {

struct MemoryExtent {
  int64_t batch, time, heads;
  int dim, slots, window;

  __host__ __device__ int block() const { return window / 2; }
  __host__ __device__ int64_t writes() const { return ceil_div(time, block()); }     // E
  __host__ __device__ int64_t versions() const { return writes() + 1; }              // of the long-term memory
  __host__ __device__ int64_t context() const { return window + time; }              // tokens of k and v
  __host__ __device__ int64_t width() const { return heads * dim; }
  // First element of a head of a token of k or v, of a token of q, of a version of the slots.
  __host__ __device__ int64_t context_at(int64_t b, int64_t token, int64_t head) const {
    return (b * context() + token) * width() + head * dim;
  }
  __host__ __device__ int64_t token_at(int64_t b, int64_t t, int64_t head) const {
    return (b * time + t) * width() + head * dim;
  }
  __host__ __device__ int64_t slots_at(int64_t b, int64_t version, int64_t head) const {
    return ((b * versions() + version) * heads + head) * slots;
  }
};

// What follows from `position` alone: for each token how many writes its row has seen (B, T), and for each write the
// token that causes it (B, E), -1 past the last.
struct WriteIndex {
  int* version;
  int* event;
};

inline int64_t write_index_bytes(const MemoryExtent& extent) {
  return static_cast<int64_t>(sizeof(int)) * extent.batch * (extent.time + extent.writes());
}

// Lay the index out at `memory` and enqueue its computation.
cudaError_t make_write_index(const int64_t* position, const MemoryExtent& extent, void* memory, WriteIndex* index,
                             void* stream);

// Elements column .. column + 7 of a row of `size`, 0 past its end; 16 bytes at a time where `size` keeps alignment.
template <typename T>
__device__ __forceinline__ void load_eight(const T* row, int column, int size, float (&out)[8]) {
  if (size % 8 == 0) {
    if (column < size) {
      load<8>(row + column, out);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = column + i < size ? to_float(row[column + i]) : 0.0f;
  }
}

// Accumulators of 16 rows of `size` elements, `stride` apart, both even, from row `first` on, where `rows` are there; all
// loads are on their way before the first is needed.
template <int N>
__device__ __forceinline__ void load_rows(const float* source, int first, int rows, int stride, int size,
                                          Fragments<N>& x) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + fragment_row(2 * r), column = fragment_column(0, 0);
    const float* from = source + static_cast<int64_t>(row) * stride + column;
    const int left = row < rows ? size - column : 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float pair[2] = {0.0f, 0.0f};
      if (8 * n < left) load<2>(from + 8 * n, pair);
      x[n][2 * r] = pair[0];
      x[n][2 * r + 1] = pair[1];
    }
  }
}

template <int N, typename T>
__device__ __forceinline__ void store_rows(T* target, int first, int rows, int64_t stride, int size,
                                           const Fragments<N>& x) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = first + fragment_row(2 * r), column = fragment_column(0, 0);
    T* to = target + static_cast<int64_t>(row) * stride + column;
    const int left = row < rows ? size - column : 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float pair[2] = {x[n][2 * r], x[n][2 * r + 1]};
      if (8 * n < left) store<2>(to + 8 * n, pair);
    }
  }
}

}  // namespace mm_rec

#endif
