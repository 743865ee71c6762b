// Many tensors in one launch: their elements in chunks, the chunks of all in one row, each taken by a block.
#ifndef MM_REC_TENSOR_LIST_CUH
#define MM_REC_TENSOR_LIST_CUH

#include "common.cuh"

namespace mm_rec {

constexpr int kListThreads = 256;
constexpr int64_t kListChunk = 16 * kListThreads;  // elements

// Of one launch. The list is the kernel's parameter, so it needs no memory that has to outlive the call (a CUDA graph
// keeps it) and no copy ahead of the kernel; parameters may have 32,764 bytes.
constexpr int kListMost = 256;

template <typename Item>  // with a `count` of elements
struct TensorList {
  int items = 0;
  int first_chunk[kListMost + 1] = {0};
  Item item[kListMost];

  __host__ void add(const Item& one) {
    item[items] = one;
    first_chunk[items + 1] = first_chunk[items] + static_cast<int>(ceil_div(one.count, kListChunk));
    ++items;
  }

  __host__ __device__ int chunks() const { return first_chunk[items]; }

  // The tensor that a chunk is of.
  __device__ __forceinline__ int find(int chunk) const {
    int low = 0, high = items;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    return low;
  }

  // The elements of tensor `i` that a chunk has: [begin, end).
  struct Range {
    int64_t begin, end;
  };

  __device__ __forceinline__ Range range(int i, int chunk) const {
    const int64_t begin = (chunk - first_chunk[i]) * kListChunk;
    return {begin, min(begin + kListChunk, item[i].count)};
  }
};

}  // namespace mm_rec

#endif
