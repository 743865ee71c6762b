// window_attention, forward, for the sizes of most models. A block of threads walks through its tokens in tiles of 64; their
// contexts go to a ring that keeps the last W.
#include "launch.cuh"
#include "window_walk_forward.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 128, kResident = 3;
constexpr int kBlocks = kWalkWindow / 16 + 1, kTogether = 3;  // of 16 contexts, and how many are scored at a time
static_assert(kBlocks % kTogether == 0, "whole groups");

// The tokens of a block of threads, `length` tiles of 64 from `begin` on; and its tile of them, from t on.
struct Walk {
  const AttentionInputs& in;
  const WindowExtent& extent;
  int64_t b, head;
  int begin, end, t;

  __device__ __forceinline__ Walk(const AttentionInputs& in_, const WindowExtent& extent_, int length)
      : in(in_), extent(extent_), b(blockIdx.z), head(blockIdx.y) {
    begin = t = static_cast<int>(blockIdx.x) * length * kWalkTile;
    end = static_cast<int>(min(extent.time, static_cast<int64_t>(begin) + length * kWalkTile));
  }
  __device__ __forceinline__ int tokens() const { return min(end - t, kWalkTile); }
  __device__ __forceinline__ int64_t line() const { return b * extent.time + t; }
  __device__ __forceinline__ int64_t query_at(int row) const { return extent.token_at(b, t + row, head); }
  // Angles of a warp's 16 contexts.
  __device__ __forceinline__ QuadAngles angles(int context) const {
    return QuadAngles(in.rotary + static_cast<int64_t>(context - begin + warp_row()) * kWalkDim);
  }
  // Start copying 64 contexts to the ring from row `place` on, 16 rows a warp; those past the first `rows` become zero.
  __device__ __forceinline__ void fetch(ForwardShared& shared, int context, int place, int rows) const {
    const int64_t from = extent.context_at(b, context, head), width = extent.width();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = warp_row() + static_cast<int>(threadIdx.x) % 32 / 8 + 4 * i, column = threadIdx.x % 8 * 8;
      const int64_t at = from + (row < rows ? row * width + column : 0);
      const int to = in_ring(place + row) * WalkTile::kStride + column;
      cp_async_16(shared.k.hi + to, static_cast<const bf16*>(in.k) + at, row < rows);
      cp_async_16(shared.v.hi + to, static_cast<const bf16*>(in.v) + at, row < rows);
    }
    cp_async_commit();
  }
  // Have what the tile needs brought to the second-level cache.
  __device__ __forceinline__ void ask_ahead() const {
    const int row = threadIdx.x % kWalkTile;
    if (t + row >= extent.time) return;
    const int64_t at = extent.context_at(b, t + kWalkWindow + row, head);
    if (threadIdx.x < kWalkTile) {
      prefetch_l2(static_cast<const bf16*>(in.k) + at);
      prefetch_l2(static_cast<const bf16*>(in.q) + query_at(row));
    } else {
      prefetch_l2(static_cast<const bf16*>(in.v) + at);
    }
  }
};

// 16 keys a warp were copied to the ring from row `place` on: rotate them.
__device__ __forceinline__ void rotate_keys(ForwardShared& shared, int place, const QuadAngles& angles) {
  uint2 x[2][kWalkDim / 16];
  bf16* row[2];
  cp_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row[i] = shared.k.hi + in_ring(place + warp_row() + Quad::row(i)) * WalkTile::kStride;
#pragma unroll
    for (int j = 0; j < kWalkDim / 16; ++j) x[i][j] = *reinterpret_cast<const uint2*>(row[i] + Quad::column(j));
  }
  __syncwarp();
  angles.rotate(x);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < kWalkDim / 16; ++j) Quad::put(row[i], j, x[i][j]);
  }
}

// What the first `rows` of a warp's 16 rotated queries see of the window, whose first context is in row `place` of the ring.
// Block n of 16 contexts begins 16 n after the warp's first query; query r sees those from low on up to W + r.
__device__ __forceinline__ void read_window(const ForwardShared& shared, const Queries& queries, int place, int age, int rows,
                                            Running& running) {
  const int r = threadIdx.x % 16, low = max(kWalkWindow + r - age, r + 1);
  const int least = __reduce_min_sync(kFullWarp, r < rows ? low : INT_MAX);
  const int largest = __reduce_max_sync(kFullWarp, r < rows ? low : 0);
  const int lows[2] = {__shfl_sync(kFullWarp, low, Quad::row(0)), __shfl_sync(kFullWarp, low, Quad::row(1))};
#pragma unroll
  for (int g = 0; g < kBlocks; g += kTogether) {
    if (16 * (g + kTogether) <= least) continue;
    Fragments<2> scores[kTogether];
    const bf16 *keys[kTogether], *values[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const int from = place + warp_row() + 16 * (g + n);
      keys[n] = shared.k.hi + in_ring(from + Queries::key_lane()) * WalkTile::kStride;
      values[n] = shared.v.hi + in_ring(from + Running::value_lane()) * WalkTile::kStride;
    }
    queries.multiply(scores, keys);
    if (16 * g < largest) {
#pragma unroll
      for (int n = 0; n < kTogether; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (16 * (g + n) + fragment_column(i / 4, i % 4) < lows[i % 4 / 2]) scores[n][i / 4][i % 4] = -INFINITY;
        }
      }
    }
    if (g + kTogether == kBlocks) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (fragment_column(i / 4, i % 4) > fragment_row(i % 4)) scores[kTogether - 1][i / 4][i % 4] = -INFINITY;
      }
    }
    running.weigh(scores);
    running.add(scores, values);
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    forward_kernel(const AttentionInputs in, bf16* __restrict__ out, float* __restrict__ lse, const WindowExtent extent,
                   int length) {
  auto& shared = *reinterpret_cast<ForwardShared*>(dynamic_shared());
  Walk walk(in, extent, length);
#pragma unroll
  for (int i = 0; i < kWalkBehind; ++i) {
    walk.fetch(shared, walk.begin + i * kWalkTile, i * kWalkTile, kWalkTile);
  }
#pragma unroll
  for (int i = 0; i < kWalkBehind; ++i) rotate_keys(shared, i * kWalkTile, walk.angles(walk.begin + i * kWalkTile));

  int place = 0;  // of context t in the ring
  while (true) {
    const int rows = walk.tokens() - warp_row(), newest = in_ring(place + kWalkWindow);
    const bool goes_on = walk.t + kWalkTile < walk.end;
    const int64_t query = walk.query_at(warp_row()), line = walk.line() + warp_row();
    const int64_t home = (walk.b * extent.heads + walk.head) * extent.time + walk.t + warp_row();
    walk.fetch(shared, walk.t + kWalkWindow, newest, walk.tokens());
    Queries queries;
    queries.load(static_cast<const bf16*>(in.q) + query, extent.width(), rows);
    const int row = threadIdx.x % 16;
    const int age = static_cast<int>(min(in.position[row < rows ? line + row : walk.line()], int64_t{kWalkWindow}));
    const QuadAngles angles = walk.angles(walk.t + kWalkWindow);
    angles.rotate(queries.x);
    rotate_keys(shared, newest, angles);
    __syncthreads();

    walk.t += kWalkTile;
    if (goes_on) walk.ask_ahead();
    if (rows > 0) {
      Running running;
      running.clear();
      read_window(shared, queries, place, age, rows, running);
      running.finish();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (threadIdx.x % 4 == 0 && Quad::row(i) < rows) {
          lse[home + Quad::row(i)] = (running.top[i] + __log2f(running.total[i])) / kLog2e;
        }
      }
      walk_store(out + query, extent.width(), rows, running.sum);
    }
    if (!goes_on) return;
    __syncthreads();  // the tile's oldest contexts may be overwritten
    place = in_ring(place + kWalkTile);
  }
}

}  // namespace

cudaError_t walk_forward(const AttentionInputs& in, void* out, float* lse, const WindowExtent& extent, void* stream) {
  const int64_t resident = int64_t{resident_blocks(kResident, sizeof(ForwardShared))} * multiprocessors();
  const int length = walk_length(extent, resident, 1);
  const dim3 grid(static_cast<unsigned>(ceil_div(walk_tiles(extent), length)), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(forward_kernel, grid, dim3(kThreads), sizeof(ForwardShared), stream, in, static_cast<bf16*>(out), lse, extent,
                length);
}

}  // namespace mm_rec
