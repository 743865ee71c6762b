// Kernels over rows: a group of up to 32 neighbouring lanes works on a row; a second reading of it comes from the cache.
#ifndef MM_REC_ROWS_CUH
#define MM_REC_ROWS_CUH

#include "common.cuh"
#include "launch.cuh"

#include <type_traits>

namespace mm_rec {

constexpr int kThreads = 256;

// Rows of `size` elements. Row r starts at r / inner * outer_stride + r % inner * inner_stride.
struct Rows {
  int64_t count;
  int size, inner;
  int64_t outer_stride, inner_stride;

  __device__ __forceinline__ int64_t start(int64_t r) const {
    const unsigned outer = static_cast<unsigned>(r) / static_cast<unsigned>(inner);
    return outer * outer_stride + (static_cast<unsigned>(r) - outer * static_cast<unsigned>(inner)) * inner_stride;
  }
};

// A group of `lanes` lanes (a power of two) and its row. Lanes of groups past the last row work on that row too, since
// sums need whole warps, but write nothing.
struct Group {
  int lanes, lane;
  int64_t row;
  bool real;

  __device__ __forceinline__ Group(int lanes_a_row, int64_t rows) : lanes(lanes_a_row) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    lane = static_cast<int>(threadIdx.x) % lanes;
    row = thread / lanes;
    real = row < rows;
    if (!real) row = rows - 1;
  }
  __device__ __forceinline__ float sum(float x) const {
    for (int mask = lanes / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
    return x;
  }
};

// Call body(offset) for each vector of Size elements of a row that belongs to this lane.
template <int Size, typename Body>
__device__ __forceinline__ void each_vector(const Group& group, int size, const Body& body) {
#pragma unroll 2
  for (int i = group.lane * Size; i < size; i += group.lanes * Size) body(i);
}

__device__ __forceinline__ float inverse_rms(float squares, int size) { return rsqrtf(squares / size + kNormEps); }

// Lanes for a row: enough that each has a vector, at most a warp.
inline int lanes_a_row(int size, int vector) {
  int lanes = 1;
  while (lanes < 32 && lanes * vector < size) lanes *= 2;
  return lanes;
}

inline dim3 grid(const Rows& rows, int lanes) { return dim3(static_cast<unsigned>(ceil_div(rows.count * lanes, kThreads))); }

// Run with vectors of eight elements where rows allow it.
template <typename Run>
cudaError_t by_vector(const Rows& rows, const Run& run) {
  return rows.size % 8 == 0 ? run(std::integral_constant<int, 8>()) : run(std::integral_constant<int, 1>());
}

// Call run(zero of the type) for a type code.
template <typename Run>
cudaError_t by_type(int64_t dtype, const Run& run) {
  return dtype == kBFloat16 ? run(bf16()) : run(float());
}

inline Rows contiguous(int64_t count, int64_t size) {
  return Rows{count, static_cast<int>(size), 1, size, 0};
}

}  // namespace mm_rec

#endif
