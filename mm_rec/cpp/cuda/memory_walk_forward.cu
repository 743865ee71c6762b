// memory_read, forward, for the sizes of most models. A block of threads walks through its tokens in tiles of up to 64 that end
// where a write happens, so that a tile meets one version of the slots and each version is fetched once. What a tile needs is
// asked for together: its contexts go to a ring that keeps the last W, slots and queries pass through registers. Two blocks a
// multiprocessor, since these loads take 200 registers.
#include "launch.cuh"
#include "memory_walk_forward.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 128, kResident = 2;
constexpr int kBlocks = kWalkWindow / 16 + 1, kTogether = 3;  // of 16 contexts, and how many are scored at a time
static_assert(kBlocks % kTogether == 0, "whole groups");

// The tokens of a block of threads, `length` tiles of 64 from a fixed place on, or from the write soon after it; and its tile
// of them, [t, next).
struct Walk {
  const ReadInputs& in;
  const MemoryExtent& extent;
  int64_t b, head;
  int begin, end, t, next;
  int write, later;  // the next two writes
  int version;
  bool sees;  // whether any token of the tile sees slots: then its first does

  __device__ __forceinline__ Walk(const ReadInputs& in_, const MemoryExtent& extent_, int length)
      : in(in_), extent(extent_), b(blockIdx.z), head(blockIdx.y) {
    const int fixed = static_cast<int>(blockIdx.x) * length * kWalkTile;
    begin = cut(fixed);
    end = cut(fixed + length * kWalkTile);
    t = begin;
    version = in.index.version[b * extent.time + t];
    write = event(version);
    later = event(version + 1);
    sees = in.position[b * extent.time + t] >= kWalkWindow;
    next = min(min(t + kWalkTile, end), write);
  }
  // Go on to the next tile.
  __device__ __forceinline__ void advance(bool sees_) {
    t = next;
    sees = sees_;
    if (t == write) {
      ++version;
      write = later;
      later = event(version + 1);
    }
    next = min(min(t + kWalkTile, end), write);
  }
  __device__ __forceinline__ int64_t line() const { return b * extent.time + t; }
  __device__ __forceinline__ int64_t slots_at() const { return extent.slots_at(b, version, head); }
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
    if (t + row < extent.time) {
      const int64_t at = extent.context_at(b, t + kWalkWindow + row, head);
      if (threadIdx.x < kWalkTile) {
        prefetch_l2(static_cast<const bf16*>(in.k) + at);
        prefetch_l2(static_cast<const bf16*>(in.q) + query_at(row));
      } else {
        prefetch_l2(static_cast<const bf16*>(in.v) + at);
      }
    }
    const int line = static_cast<int>(threadIdx.x) * 32;
    if (sees && line < extent.slots * kWalkDim) {
      prefetch_l2(in.key + slots_at() * kWalkDim + line);
      prefetch_l2(in.value + slots_at() * kWalkDim + line);
    }
  }

 private:
  // The token of write `e`, past all tokens if there is none.
  __device__ __forceinline__ int event(int e) const {
    const int token = e < extent.writes() ? in.index.event[b * extent.writes() + e] : -1;
    return token < 0 ? INT_MAX : token;
  }
  __device__ __forceinline__ int cut(int token) const {
    if (token == 0 || token >= extent.time) return min(token, static_cast<int>(extent.time));
    const int coming = event(in.index.version[b * extent.time + token - 1]);
    return coming - token < kWalkTile ? coming : token;
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

// What a warp's 16 queries see of the slots; `age` is the position of each, or W past that, in the lane of its number.
__device__ __forceinline__ void read_slots(const ForwardShared& shared, const Queries& queries, int age, Running& running) {
  constexpr int kParts = kWalkTile / 16;
  const bool seen[2] = {__shfl_sync(kFullWarp, age, Quad::row(0)) == kWalkWindow,
                        __shfl_sync(kFullWarp, age, Quad::row(1)) == kWalkWindow};
  Fragments<2> scores[kParts];
  const bf16 *keys[kParts], *values[kParts];
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
    keys[n] = shared.slot_key.hi + (16 * n + Queries::key_lane()) * WalkTile::kStride;
    values[n] = shared.slot_value.hi + (16 * n + Running::value_lane()) * WalkTile::kStride;
  }
  queries.multiply(scores, keys);
#pragma unroll
  for (int n = 0; n < kParts; ++n) {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const float2 bias = *reinterpret_cast<const float2*>(shared.bias + 16 * n + fragment_column(f, 0));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = scores[n][f][i];
        x = seen[i / 2] ? fmaf(x, kBase2, i % 2 == 0 ? bias.x : bias.y) : -INFINITY;
      }
    }
  }
  running.weigh(scores, 1.0f);
  running.add(scores, values);
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
    running.weigh(scores, kBase2);
    running.add(scores, values);
  }
}

__global__ void __launch_bounds__(kThreads, kResident)
    forward_kernel(const ReadInputs in, bf16* __restrict__ out, float* __restrict__ lse, const MemoryExtent extent,
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
    const int t = walk.t, rows = walk.next - t - warp_row(), newest = in_ring(place + kWalkWindow);
    const bool sees = walk.sees, goes_on = walk.next < walk.end;
    const int64_t query = walk.query_at(warp_row()), line = walk.line() + warp_row();
    walk.fetch(shared, t + kWalkWindow, newest, walk.next - t);
    SlotLoads slots;
    if (sees) slots.fetch(in, walk.slots_at() + warp_row(), extent.slots - warp_row());
    Queries queries, turned;
    queries.load(static_cast<const bf16*>(in.q) + query, extent.width(), rows);
    const int row = threadIdx.x % 16;
    const int age = static_cast<int>(min(in.position[row < rows ? line + row : walk.line()], int64_t{kWalkWindow}));
    const bool next_sees = in.position[walk.line() + (goes_on ? walk.next - t : 0)] >= kWalkWindow;
    if (sees) slots.put_keys(shared);
    const QuadAngles angles = walk.angles(t + kWalkWindow);
    if (sees) slots.put_values(shared);
    turned = queries;
    angles.rotate(turned.x);
    rotate_keys(shared, newest, angles);
    __syncthreads();

    walk.advance(next_sees);
    if (goes_on) walk.ask_ahead();
    if (rows > 0) {
      Running running;
      running.clear();
      if (sees) read_slots(shared, queries, age, running);
      read_window(shared, turned, place, age, rows, running);
      running.finish();
      const int64_t home = (walk.b * extent.heads + walk.head) * extent.time + t + warp_row();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (threadIdx.x % 4 == 0 && Quad::row(i) < rows) {
          lse[home + Quad::row(i)] = (running.top[i] + __log2f(running.total[i])) / kLog2e;
        }
      }
      walk_store(out + query, extent.width(), rows, 1.0f, running.sum);
    }
    if (!goes_on) return;
    __syncthreads();  // the tile's oldest contexts and the slots may be overwritten
    place = in_ring(place + walk.t - t);
  }
}

}  // namespace

cudaError_t walk_forward(const ReadInputs& in, void* out, float* lse, const MemoryExtent& extent, void* stream) {
  const int64_t resident = int64_t{resident_blocks(kResident, sizeof(ForwardShared))} * multiprocessors();
  const int length = walk_length(extent, resident, 1);
  const dim3 grid(static_cast<unsigned>(ceil_div(walk_tiles(extent), length)), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(forward_kernel, grid, dim3(kThreads), sizeof(ForwardShared), stream, in, static_cast<bf16*>(out), lse, extent,
                length);
}

}  // namespace mm_rec
