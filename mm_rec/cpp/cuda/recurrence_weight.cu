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

// Where h_{t-1} of row n = b * T + t is, resets left aside, or null if there is none. Offsets are those of the first head.
__device__ __forceinline__ const float* previous_state(const RecurrenceBackward& p, const Extent& extent, int64_t width,
                                                       int64_t n) {
  if (n >= extent.batch * extent.time) return nullptr;
  const unsigned time = static_cast<unsigned>(extent.time), b = static_cast<unsigned>(n) / time;
  if (static_cast<unsigned>(n) != b * time) return p.h + (n - 1) * width;
  return p.h0 == nullptr ? nullptr : p.h0 + b * width;
}

// Two neighbouring elements, 0 past the end of the head.
template <typename T>
__device__ __forceinline__ float2 load_pair(const T* row, int column, int dim) {
  float pair[2] = {0.0f, 0.0f};
  if (row != nullptr && column < dim) {
    if (dim % 2 == 0) {
      load<2>(row + column, pair);
    } else {
      pair[0] = to_float(row[column]);
      pair[1] = column + 1 < dim ? to_float(row[column + 1]) : 0.0f;
    }
  }
  return make_float2(pair[0], pair[1]);
}

// 64 rows of h_{t-1} on their way to a tile: a warp has rows `warp`, `warp` + 4, ..., a lane two columns. Resets are asked
// for with them and looked at when they are put down, so that one wait serves for both.
struct PreviousStates {
  static constexpr int kRows = kTile / 4;
  float2 pair[kRows];
  bool cut;  // lane i: whether row i of the warp is reset

  __device__ __forceinline__ void fetch(const RecurrenceBackward& p, const Extent& extent, int64_t head, int64_t first,
                                        int64_t end, int column, int dim) {
    const int64_t width = extent.heads * dim;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t own = first + 4 * lane + warp;
    cut = p.reset != nullptr && lane < kRows && own < end && p.reset[own];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t n = first + 4 * i + warp;
      const float* row = n < end ? previous_state(p, extent, width, n) : nullptr;
      pair[i] = load_pair(row == nullptr ? nullptr : row + head * dim, column, dim);
    }
  }
  __device__ __forceinline__ void put(Tile<kTile, kTile, true>& tile) const {
    const unsigned resets = __ballot_sync(kFullWarp, cut);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool reset = (resets >> i) & 1;
      tile.set(4 * i + threadIdx.x / 32, 2 * (threadIdx.x % 32), reset ? 0.0f : pair[i].x, reset ? 0.0f : pair[i].y);
    }
  }
};

// Gates of 64 elements of a head, 64 rows of N at a time.
template <typename U>
__global__ void __launch_bounds__(128, 4)
    gate_kernel(const RecurrenceBackward p, float* __restrict__ gate, const Extent extent, int dim) {
  __shared__ Tile<kTile, kTile, true> h_tile, w_tile;
  const int64_t head = blockIdx.z, width = extent.heads * dim, rows = extent.batch * extent.time;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTile;
  const int row0 = static_cast<int>(blockIdx.y) * kTile, warp = threadIdx.x / 32, pair = 2 * (threadIdx.x % 32);
  const float* w_g = p.w_g + head * dim * dim;
  PreviousStates h;
  const auto fetch = [&](int64_t first, int k) { h.fetch(p, extent, head, first, rows, k + pair, dim); };
  int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  bool fresh = true;
  fetch(first, 0);
  for (; first < rows; first += stride) {
    Fragments<kTile / 8> sum = {};
    for (int k = 0; k < dim; k += kTile) {
      h.put(h_tile);
      if (fresh || dim > kTile) {
#pragma unroll 8
        for (int i = warp; i < kTile; i += 4) {
          const float2 y = load_pair(row0 + i < dim ? w_g + static_cast<int64_t>(row0 + i) * dim : nullptr, k + pair, dim);
          w_tile.set(i, pair, y.x, y.y);
        }
        fresh = false;
      }
      __syncthreads();
      const bool on = k + kTile < dim;
      if (on || first + stride < rows) fetch(on ? first : first + stride, on ? k + kTile : 0);
      multiply<false, false, kTile>(sum, h_tile, 16 * warp, w_tile, 0);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t line = first + 16 * warp + fragment_row(2 * r);
      if (line >= rows) continue;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        const int column = row0 + fragment_column(n, 0);
        const float2 u = load_pair(static_cast<const U*>(p.u) + line * p.u_stride + head * dim, column, dim);
        float2 bias = make_float2(0.0f, 0.0f);
        if (p.u_bias != nullptr) bias = load_pair(p.u_bias + head * dim, column, dim);
        const float result[2] = {sigmoid(u.x + bias.x + sum[n][2 * r]), sigmoid(u.y + bias.y + sum[n][2 * r + 1])};
        float* to = gate + line * width + head * dim + column;
        if (dim % 2 == 0) {
          if (column < dim) store<2>(to, result);
        } else {
          if (column < dim) to[0] = result[0];
          if (column + 1 < dim) to[1] = result[1];
        }
      }
    }
  }
}

// 64 x 64 of one head's dW_g over a range of rows of N: partial sums, to be added up. du in bf16 is exact as
// a bf16 tile; float32 operands are split.
template <typename DU>
__global__ void __launch_bounds__(128, 4)
    weight_gradient_kernel(const RecurrenceBackward p, float* __restrict__ partial, const Extent extent, int dim,
                           int64_t rows_a_block) {
  constexpr int kPairs = kTile * kTile / 2 / 128;
  __shared__ Tile<kTile, kTile, sizeof(DU) == 4> du_tile;
  __shared__ Tile<kTile, kTile, true> h_tile;
  const int tiles = static_cast<int>(ceil_div(dim, kTile));
  const int64_t head = blockIdx.y;
  const int row0 = static_cast<int>(blockIdx.z) / tiles * kTile, column0 = static_cast<int>(blockIdx.z) % tiles * kTile;
  const int warp = threadIdx.x / 32, pair = 2 * (threadIdx.x % 32);
  const int64_t begin = blockIdx.x * rows_a_block;
  const int64_t end = min(begin + rows_a_block, extent.batch * extent.time);

  float2 du[kPairs];  // the next tile, on its way: rows warp, warp + 4, ...
  PreviousStates h;
  const auto fetch = [&](int64_t first) {
    h.fetch(p, extent, head, first, end, column0 + pair, dim);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int64_t n = first + 4 * i + warp;
      const DU* row = n < end ? static_cast<const DU*>(p.du) + n * p.du_stride + head * dim : nullptr;
      du[i] = load_pair(row, row0 + pair, dim);
    }
  };

  Fragments<kTile / 8> sum = {};
  fetch(begin);
  for (int64_t first = begin; first < end; first += kTile) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) du_tile.set(4 * i + warp, pair, du[i].x, du[i].y);
    h.put(h_tile);
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
  // About four blocks a multiprocessor, each of which keeps its part of W_g.
  const int64_t parts = ceil_div(dim, kTile), tiles = ceil_div(extent.batch * extent.time, kTile);
  const dim3 grid(static_cast<unsigned>(min(tiles, ceil_div(4 * multiprocessors(), parts * extent.heads))),
                  static_cast<unsigned>(parts), static_cast<unsigned>(extent.heads));
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
