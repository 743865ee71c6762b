// recurrence, the parts of the backward pass that all steps can do at once, on the tensor cores: gates, and the gradient
// of W_g.
#include "device.cuh"
#include "launch.cuh"
#include "recurrence_backward.cuh"
#include "reduce.cuh"
#include "tile.cuh"

namespace mm_rec {
namespace {

constexpr int kTile = 64;  // rows, columns and steps of a tile

// Where h_{t-1} of row n = b * T + t is, or null if it counts as zero. Offsets are those of the first head.
__device__ __forceinline__ const float* previous_state(const RecurrenceBackward& p, const Extent& extent, int64_t width,
                                                       int64_t n) {
  if (n >= extent.batch * extent.time || (p.reset != nullptr && p.reset[n])) return nullptr;
  const unsigned time = static_cast<unsigned>(extent.time), b = static_cast<unsigned>(n) / time;
  if (static_cast<unsigned>(n) != b * time) return p.h + (n - 1) * width;
  return p.h0 == nullptr ? nullptr : p.h0 + b * width;
}

// Two neighbouring elements, 0 past the end of the head.
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* row, int column, int dim) {
  if (row == nullptr || column >= dim) return make_float2(0.0f, 0.0f);
  return make_float2(to_float(row[column]), column + 1 < dim ? to_float(row[column + 1]) : 0.0f);
}

// 64 rows of N times 64 elements of their gates a block.
template <typename U>
__global__ void __launch_bounds__(128)
    gate_kernel(const RecurrenceBackward p, float* __restrict__ gate, const Extent extent, int dim) {
  __shared__ Tile<kTile, kTile, true> h_tile, w_tile;
  const int64_t head = blockIdx.z, width = extent.heads * dim, first = static_cast<int64_t>(blockIdx.x) * kTile;
  const int row0 = static_cast<int>(blockIdx.y) * kTile, warp = threadIdx.x / 32, pair = 2 * (threadIdx.x % 32);
  const float* w_g = p.w_g + head * dim * dim;
  Fragments<kTile / 8> sum = {};
  for (int k = 0; k < dim; k += kTile) {
#pragma unroll 8
    for (int i = warp; i < kTile; i += 4) {
      const float* h = previous_state(p, extent, width, first + i);
      const float* w = row0 + i < dim ? w_g + static_cast<int64_t>(row0 + i) * dim : nullptr;
      const float2 x = load_pair(h == nullptr ? nullptr : h + head * dim, k + pair, dim), y = load_pair(w, k + pair, dim);
      h_tile.set(i, pair, x.x, x.y);
      w_tile.set(i, pair, y.x, y.y);
    }
    __syncthreads();
    multiply<false, false, kTile>(sum, h_tile, 16 * warp, w_tile, 0);
    __syncthreads();
  }
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t line = first + 16 * warp + fragment_row(i), column = head * dim + row0 + fragment_column(n, i);
      if (line >= extent.batch * extent.time || row0 + fragment_column(n, i) >= dim) continue;
      const float u = to_float(static_cast<const U*>(p.u)[line * p.u_stride + column]);
      gate[line * width + column] = sigmoid(u + (p.u_bias == nullptr ? 0.0f : p.u_bias[column]) + sum[n][i]);
    }
  }
}

// 64 x 64 of one head's dW_g over a range of rows of N: partial sums, to be added up. du in bf16 is exact as
// a bf16 tile; float32 operands are split.
template <typename DU>
__global__ void __launch_bounds__(128)
    weight_gradient_kernel(const RecurrenceBackward p, float* __restrict__ partial, const Extent extent, int dim,
                           int64_t rows_a_block) {
  constexpr int kPairs = kTile * kTile / 2 / 128;
  __shared__ Tile<kTile, kTile, sizeof(DU) == 4> du_tile;
  __shared__ Tile<kTile, kTile, true> h_tile;
  const int tiles = static_cast<int>(ceil_div(dim, kTile));
  const int64_t head = blockIdx.y, width = extent.heads * dim;
  const int row0 = static_cast<int>(blockIdx.z) / tiles * kTile, column0 = static_cast<int>(blockIdx.z) % tiles * kTile;
  const int warp = threadIdx.x / 32, pair = 2 * (threadIdx.x % 32);
  const int64_t begin = blockIdx.x * rows_a_block;
  const int64_t end = min(begin + rows_a_block, extent.batch * extent.time);

  float2 du[kPairs], h[kPairs];  // the next tile, on its way: rows warp, warp + 4, ...
  const auto fetch = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int64_t n = first + 4 * i + warp;
      const bool inside = n < end;
      const DU* du_row = inside ? static_cast<const DU*>(p.du) + n * p.du_stride + head * dim : nullptr;
      const float* h_row = inside ? previous_state(p, extent, width, n) : nullptr;
      du[i] = load_pair(du_row, row0 + pair, dim);
      h[i] = load_pair(h_row == nullptr ? nullptr : h_row + head * dim, column0 + pair, dim);
    }
  };

  Fragments<kTile / 8> sum = {};
  fetch(begin);
  for (int64_t first = begin; first < end; first += kTile) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      du_tile.set(4 * i + warp, pair, du[i].x, du[i].y);
      h_tile.set(4 * i + warp, pair, h[i].x, h[i].y);
    }
    __syncthreads();
    if (first + kTile < end) fetch(first + kTile);
    multiply<true, true, kTile>(sum, du_tile, 16 * warp, h_tile, 0);
    __syncthreads();
  }

  float* out = partial + (blockIdx.x * extent.heads + head) * dim * dim;
#pragma unroll
  for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = row0 + 16 * warp + fragment_row(i), column = column0 + fragment_column(n, i);
      if (row < dim && column < dim) out[static_cast<int64_t>(row) * dim + column] = sum[n][i];
    }
  }
}

// Into how many ranges N is cut: about four blocks a multiprocessor, at least one tile each.
int64_t splits(const Extent& extent, int64_t dim) {
  const int64_t tiles = ceil_div(dim, kTile), blocks = extent.heads * tiles * tiles;
  const int64_t wanted = ceil_div(4 * multiprocessors(), blocks);
  return min(max(wanted, static_cast<int64_t>(1)), ceil_div(extent.batch * extent.time, kTile));
}

}  // namespace

cudaError_t recurrence_gate(const RecurrenceBackward& p, float* gate, const Extent& extent, int64_t dim, void* stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(extent.batch * extent.time, kTile)),
                  static_cast<unsigned>(ceil_div(dim, kTile)), static_cast<unsigned>(extent.heads));
  const auto kernel = p.u_dtype == kBFloat16 ? gate_kernel<bf16> : gate_kernel<float>;
  return launch(kernel, grid, dim3(128), 0, stream, p, gate, extent, static_cast<int>(dim));
}

int64_t weight_gradient_workspace(const Extent& extent, int64_t dim) {
  return splits(extent, dim) * extent.heads * dim * dim;
}

cudaError_t recurrence_weight_gradient(const RecurrenceBackward& p, float* workspace, const Extent& extent,
                                       int64_t dim, void* stream) {
  const int64_t rows = extent.batch * extent.time, size = extent.heads * dim * dim;
  const int64_t rows_a_block = ceil_div(ceil_div(rows, splits(extent, dim)), kTile) * kTile;
  const int64_t blocks = ceil_div(rows, rows_a_block), tiles = ceil_div(dim, kTile);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(tiles * tiles));
  const auto kernel = p.u_dtype == kBFloat16 ? weight_gradient_kernel<bf16> : weight_gradient_kernel<float>;
  const cudaError_t error =
      launch(kernel, grid, dim3(128), 0, stream, p, workspace, extent, static_cast<int>(dim), rows_a_block);
  if (error != cudaSuccess) return error;
  return sum_partials(workspace, size, blocks, p.dw_g, size, stream);
}

}  // namespace mm_rec
