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

// A pair of neighbouring elements of a row of `size`; nothing past its end.
template <typename T>
__device__ __forceinline__ void store_pair(T* row, int column, int size, float first, float second) {
  if (size % 2 == 0) {
    if (column < size) {
      const float pair[2] = {first, second};
      store<2>(row + column, pair);
    }
  } else {
    if (column < size) row[column] = from_float<T>(first);
    if (column + 1 < size) row[column + 1] = from_float<T>(second);
  }
}

template <typename T>
__device__ __forceinline__ float2 load_pair(const T* row, int column, int size) {
  float pair[2] = {0.0f, 0.0f};
  if (size % 2 == 0) {
    if (column < size) load<2>(row + column, pair);
  } else {
    if (column < size) pair[0] = to_float(row[column]);
    if (column + 1 < size) pair[1] = to_float(row[column + 1]);
  }
  return make_float2(pair[0], pair[1]);
}

}  // namespace mm_rec

#endif
