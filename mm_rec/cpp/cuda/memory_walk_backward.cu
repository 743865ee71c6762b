// memory_read, backward, for the sizes of most models: the gradients of the window, each score computed once. Step j of a
// block of threads is tile j of the contexts, against the tiles of queries j - 2, j - 1 and j.
//
// Four warps have 16 keys and values each, sum up their gradients and put the gradients of the scores down. Four others work
// for them: they fetch and rotate the tiles of the step after, and turn the scores' gradients of the step before into those
// of the queries, in registers, where three tiles of them are under way.
#include "launch.cuh"
#include "memory_read_backward.cuh"
#include "memory_walk.cuh"

namespace mm_rec {
namespace {

constexpr int kServants = 128, kThreads = 256, kSpan = kWalkBehind + 1;  // tiles of queries a step meets
constexpr int kQueryRing = kSpan + 1;
constexpr float kBase2 = kWalkScale * kLog2e;  // of scores

struct Shared {
  WalkTile q[kQueryRing], dout[kQueryRing], k[3], v[2];
  Tile<kWalkTile, kSpan * kWalkTile, false> dscores[2];  // (key, query)
  float2 stat[kQueryRing][kWalkTile];                    // of queries: denominator in base 2, inner
  int low[kQueryRing][kWalkTile];                        // the first context in view
  int2 bounds[2 * kQueryRing][kWalkTile / 16];           // least and largest of 16
  float row_angles[kWalkTile * SharedTurn::kStride];     // of the first tile of contexts
  float tile_angles[(kWalkLongest + 2 * kWalkBehind) * kWalkDim];  // of the first row of each
};

// Which tiles a block walks through: its own queries, and so the steps first ... end + 1. Its first two steps also need the
// two tiles of queries before; its last two leave the contexts' gradients to the block after, if there is one.
struct Walk {
  const ReadBackward& p;
  const MemoryExtent& extent;
  int64_t b, head;
  int first, end, tiles;

  __device__ __forceinline__ Walk(const ReadBackward& p_, const MemoryExtent& extent_, int length)
      : p(p_), extent(extent_), b(blockIdx.z), head(blockIdx.y), first(static_cast<int>(blockIdx.x) * length),
        tiles(static_cast<int>(ceil_div(extent_.time, kWalkTile))) {
    end = min(first + length, tiles);
  }
  __device__ __forceinline__ int last_step() const { return end - 1 + kWalkBehind; }
  __device__ __forceinline__ bool owns_queries(int i) const { return i >= first && i < end; }
  __device__ __forceinline__ bool owns_contexts(int j) const { return j < end || end == tiles; }
  // Places in rings.
  __device__ __forceinline__ int queries_at(int i) const { return (i - first + kWalkBehind) % kQueryRing; }
  __device__ __forceinline__ int bounds_at(int i) const { return (i - first + kWalkBehind) % (2 * kQueryRing); }
  __device__ __forceinline__ int step(int j) const { return j - first; }
  // Angles of a tile of contexts; those of queries i are those of i + kWalkBehind.
  __device__ __forceinline__ SharedTurn turn(const Shared& shared, int j) const {
    return {shared.row_angles, shared.tile_angles + step(j) * kWalkDim};
  }
  // All threads of the block take part, and have to wait for each other after.
  __device__ __forceinline__ void load_angles(Shared& shared) const {
    for (int i = threadIdx.x; i < kWalkTile * kWalkDim; i += kThreads) {
      shared.row_angles[i / kWalkDim * SharedTurn::kStride + i % kWalkDim] = p.in.rotary[i];
    }
    for (int i = threadIdx.x; i < (end - first + 2 * kWalkBehind) * kWalkDim; i += kThreads) {
      shared.tile_angles[i] = p.in.rotary[i / kWalkDim * kWalkTile * kWalkDim + i % kWalkDim];
    }
  }
  // Whether the 16 queries of block n of tile i may see one of the 16 contexts from c on.
  __device__ __forceinline__ bool meets(const Shared& shared, int i, int n, int c) const {
    return c + 15 >= shared.bounds[bounds_at(i)][n].x;
  }
};

class Service {
 public:
  __device__ __forceinline__ explicit Service(const Walk& walk) : walk_(walk) {}

  // Ask for tiles: the contexts j, the queries i.
  __device__ __forceinline__ void fetch_contexts(Shared& shared, int j) const {
    const auto& extent = walk_.extent;
    const int64_t c0 = static_cast<int64_t>(j) * kWalkTile, at = extent.context_at(walk_.b, c0, walk_.head);
    const int rows = static_cast<int>(min(extent.context() - c0, int64_t{kWalkTile})), step = walk_.step(j);
    walk_copy(shared.k[step % 3].hi, static_cast<const bf16*>(walk_.p.in.k) + at, extent.width(), rows);
    walk_copy(shared.v[step % 2].hi, static_cast<const bf16*>(walk_.p.in.v) + at, extent.width(), rows);
  }
  __device__ __forceinline__ void fetch_queries(Shared& shared, int i) {
    const auto& extent = walk_.extent;
    const int64_t t0 = static_cast<int64_t>(i) * kWalkTile, at = extent.token_at(walk_.b, t0, walk_.head);
    const int64_t line = (walk_.b * extent.heads + walk_.head) * extent.time + t0;
    const int rows = static_cast<int>(min(extent.time - t0, int64_t{kWalkTile})), place = walk_.queries_at(i);
    walk_copy(shared.q[place].hi, static_cast<const bf16*>(walk_.p.in.q) + at, extent.width(), rows);
    walk_copy(shared.dout[place].hi, static_cast<const bf16*>(walk_.p.dout) + at, extent.width(), rows);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = RowPieces::row(r);
      const bool real = row < rows;
      const bf16* out = static_cast<const bf16*>(walk_.p.out) + at + (real ? row * extent.width() : 0) + RowPieces::column(r);
      out_[r][0] = *reinterpret_cast<const Words<bf16, 8>*>(out);
      out_[r][1] = *reinterpret_cast<const Words<bf16, 8>*>(out + kWalkDim / 2);
      lse_[r] = INFINITY;  // queries that are not there have no weights
      if (real) lse_[r] = walk_.p.lse[line + row];
    }
    const int64_t t = t0 + threadIdx.x;
    if (threadIdx.x < kWalkTile) position_ = t < extent.time ? walk_.p.in.position[walk_.b * extent.time + t] : 0;
  }
  // Wait until all is there that was asked for.
  __device__ __forceinline__ void wait() const {
    cp_async_wait<0>();
    named_barrier(2, kServants);
  }
  // Make fetched tiles ready.
  __device__ __forceinline__ void finish_contexts(Shared& shared, int j) const {
    Angles<ColumnPieces>(walk_.turn(shared, j)).rotate(shared.k[walk_.step(j) % 3].hi);
  }
  __device__ __forceinline__ void finish_queries(Shared& shared, int i) const {
    const auto& extent = walk_.extent;
    const int place = walk_.queries_at(i);
    const int64_t t0 = static_cast<int64_t>(i) * kWalkTile;
    const int64_t line = (walk_.b * extent.heads + walk_.head) * extent.time + t0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = RowPieces::row(r);
      float inner = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto dout = *reinterpret_cast<const Words<bf16, 8>*>(
            shared.dout[place].hi + row * WalkTile::kStride + half * kWalkDim / 2 + RowPieces::column(r));
#pragma unroll
        for (int j = 0; j < 8; ++j) inner = fmaf(dout[j], out_[r][half][j], inner);
      }
      inner = group_sum<4>(inner);
      if (threadIdx.x % 4 != 0) continue;
      shared.stat[place][row] = make_float2(lse_[r] * kLog2e, inner);
      if (walk_.owns_queries(i) && t0 + row < extent.time) walk_.p.inner[line + row] = inner;
    }
    Angles<ColumnPieces>(walk_.turn(shared, i + kWalkBehind)).rotate(shared.q[place].hi);
    if (threadIdx.x >= kWalkTile) return;
    const int64_t t = t0 + threadIdx.x;
    const int low = static_cast<int>(max(extent.window + t - position_, t + 1));
    int least = low, largest = low;
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) {
      least = min(least, __shfl_xor_sync(kFullWarp, least, mask));
      largest = max(largest, __shfl_xor_sync(kFullWarp, largest, mask));
    }
    shared.low[place][threadIdx.x] = low;
    if (threadIdx.x % 16 == 0) shared.bounds[walk_.bounds_at(i)][threadIdx.x / 16] = make_int2(least, largest);
  }

  // Take in the gradients of the scores of step j, which completes those of the queries j - 2.
  __device__ __forceinline__ void add_queries(const Shared& shared, int j) {
    const auto& scores = shared.dscores[walk_.step(j) % 2];
    const auto& keys = shared.k[walk_.step(j) % 3];
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
    for (int d = 0; d < kSpan; ++d) {
      const int i = j - kWalkBehind + d, column = kWalkTile * d + 16 * warp;
      if (!walk_.owns_queries(i)) continue;
#pragma unroll
      for (int n = 0; n < kWalkTile / 16; ++n) {
        // Where a tile is seen in part, the queries' block n or earlier, or n or later.
        if ((d == 0 && n > warp) || (d == kWalkBehind && n < warp)) continue;
        if (!walk_.meets(shared, i, warp, j * kWalkTile + 16 * n)) continue;
        multiply_step<true>(dq_[d], load_left<true>(scores, column, 16 * n), keys, 0, 16 * n);
      }
    }
    const int done = j - kWalkBehind;
    if (walk_.owns_queries(done)) {
      const auto& extent = walk_.extent;
      const int64_t t0 = static_cast<int64_t>(done) * kWalkTile + 16 * warp;
      walk_back(dq_[0], walk_.turn(shared, j), 16 * warp);
      walk_store(static_cast<bf16*>(walk_.p.dq) + extent.token_at(walk_.b, t0, walk_.head), extent.width(),
                 static_cast<int>(min(extent.time - t0, int64_t{16})), kWalkScale, dq_[0]);
    }
#pragma unroll
    for (int n = 0; n < kWalkDim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int d = 0; d < kWalkBehind; ++d) dq_[d][n][e] = dq_[d + 1][n][e];
        dq_[kWalkBehind][n][e] = 0.0f;
      }
    }
  }

 private:
  const Walk& walk_;
  Fragments<kWalkDim / 8> dq_[kSpan] = {};
  Words<bf16, 8> out_[2][2];
  float lse_[2];
  int64_t position_ = 0;
};

constexpr int kTileBlocks = kWalkTile / 16, kBlocks = kWalkWindow / 16 + 1;
constexpr int kTogether = 3;  // blocks of queries, so that what one waits for is hidden by the others
static_assert(kBlocks % kTogether == 0, "whole groups");

// 16 keys and values of a warp that has them in step j.
struct Keys {
  const Shared& shared;
  const Walk& walk;
  Tile<kWalkTile, kSpan * kWalkTile, false>& put;
  const Left<false> (&key)[kWalkDim / 16];
  const Left<false> (&value)[kWalkDim / 16];
  Fragments<kWalkDim / 8>& dk;
  Fragments<kWalkDim / 8>& dv;
  int j, warp_row;
  unsigned wholes;  // which blocks are seen whole

  // Take in N blocks of 16 queries from the n-th that the warp meets on.
  template <int N>
  __device__ __forceinline__ void add(int n) {
    const int c0 = j * kWalkTile + warp_row;
    int block[N], tile[N], place[N], row[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      block[u] = warp_row / 16 + n + u;
      tile[u] = j - kWalkBehind + block[u] / kTileBlocks;
      place[u] = walk.queries_at(tile[u]);
      row[u] = block[u] % kTileBlocks * 16;
    }
    Fragments<2> weight[N] = {}, dscore[N] = {};
#pragma unroll
    for (int e = 0; e < kWalkDim / 16; ++e) {
#pragma unroll
      for (int u = 0; u < N; ++u) {
        multiply_step<false>(weight[u], key[e], shared.q[place[u]], row[u], 16 * e);
        multiply_step<false>(dscore[u], value[e], shared.dout[place[u]], row[u], 16 * e);
      }
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      float4 stat[2];  // of two neighbouring queries
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        stat[f] = *reinterpret_cast<const float4*>(&shared.stat[place[u]][row[u] + fragment_column(f, 0)]);
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float lse = e % 2 == 0 ? stat[e / 4].x : stat[e / 4].z;
        weight[u][e / 4][e % 4] = exp2f(fmaf(weight[u][e / 4][e % 4], kBase2, -lse));
      }
      if (!((wholes >> (n + u)) & 1)) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int query = row[u] + fragment_column(e / 4, e % 4), c = c0 + fragment_row(e % 4);
          const bool seen = c >= shared.low[place[u]][query] && c <= kWalkWindow + tile[u] * kWalkTile + query;
          weight[u][e / 4][e % 4] = seen ? weight[u][e / 4][e % 4] : 0.0f;
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const float inner = e % 2 == 0 ? stat[e / 4].y : stat[e / 4].w;
        dscore[u][e / 4][e % 4] = weight[u][e / 4][e % 4] * (dscore[u][e / 4][e % 4] - inner);
      }
    }
    const bool own = walk.owns_contexts(j);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const Left<false> left = to_left<false>(dscore[u], 0);
      if (walk.owns_queries(tile[u])) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int at = (warp_row + fragment_row(e % 2 * 2)) * put.kStride + 16 * block[u] + fragment_column(e / 2, 0);
          *reinterpret_cast<uint32_t*>(put.hi + at) = left.hi[e];
        }
      }
      if (own) {
        multiply_step<true>(dv, to_left<false>(weight[u], 0), shared.dout[place[u]], 0, row[u]);
        multiply_step<true>(dk, left, shared.q[place[u]], 0, row[u]);
      }
    }
  }
};

// Step j of the warps that have keys.
__device__ __forceinline__ void meet_queries(Shared& shared, const Walk& walk, int j) {
  const auto& extent = walk.extent;
  const int warp_row = (static_cast<int>(threadIdx.x) - kServants) / 32 * 16, c0 = j * kWalkTile + warp_row;
  const bool own = walk.owns_contexts(j);
  const auto &k = shared.k[walk.step(j) % 3], &v = shared.v[walk.step(j) % 2];
  auto& put = shared.dscores[walk.step(j) % 2];
  Left<false> key[kWalkDim / 16], value[kWalkDim / 16];
#pragma unroll
  for (int n = 0; n < kWalkDim / 16; ++n) {
    key[n] = load_left<false>(k, warp_row, 16 * n);
    value[n] = load_left<false>(v, warp_row, 16 * n);
  }
  Fragments<kWalkDim / 8> dk = {}, dv = {};
  // Blocks of 16 queries, counted from tile j - 2 on: the warp's own tokens, and as many before them as make a window. Lane l
  // looks at block l of these; those that see any of the keys come one after the other.
  const int before = j - kWalkBehind, first_block = warp_row / 16, lane = threadIdx.x % 32;
  bool meets = false, whole = false;
  if (lane < kBlocks) {
    const int i = before + (first_block + lane) / kTileBlocks, n = (first_block + lane) % kTileBlocks;
    if (i >= max(walk.first - kWalkBehind, 0) && i < walk.end) {
      meets = walk.meets(shared, i, n, c0);
      whole = lane > 0 && lane < kBlocks - 1 && c0 >= shared.bounds[walk.bounds_at(i)][n].y;
    }
  }
  const unsigned met = __ballot_sync(kFullWarp, meets), wholes = __ballot_sync(kFullWarp, whole);
  if (met != 0) {
    Keys keys{shared, walk, put, key, value, dk, dv, j, warp_row, wholes};
    const int end = 32 - __clz(met);
    int n = __ffs(met) - 1;
#pragma unroll 1
    for (; n + kTogether <= end; n += kTogether) keys.template add<kTogether>(n);
#pragma unroll 1
    for (; n < end; ++n) keys.template add<1>(n);
  }
  if (!own) return;
  const int64_t at = extent.context_at(walk.b, c0, walk.head);
  const int rows = static_cast<int>(min(extent.context() - c0, int64_t{16}));
  walk_back(dk, walk.turn(shared, j), warp_row);
  walk_store(static_cast<bf16*>(walk.p.dk) + at, extent.width(), rows, kWalkScale, dk);
  walk_store(static_cast<bf16*>(walk.p.dv) + at, extent.width(), rows, 1.0f, dv);
}

__global__ void __launch_bounds__(kThreads, 1)
    window_kernel(const ReadBackward p, const MemoryExtent extent, int length) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const Walk walk(p, extent, length);
  const int last = walk.last_step();
  walk.load_angles(shared);
  __syncthreads();
  if (threadIdx.x < kServants) {
    Service service(walk);
    for (int i = max(walk.first - kWalkBehind, 0); i <= walk.first; ++i) {
      if (i == walk.first) service.fetch_contexts(shared, i);
      service.fetch_queries(shared, i);
      cp_async_commit();
      service.wait();
      service.finish_queries(shared, i);
    }
    service.finish_contexts(shared, walk.first);
    named_barrier(1, kThreads);
    for (int j = walk.first; j <= last; ++j) {
      if (j < last) service.fetch_contexts(shared, j + 1);
      if (j + 1 < walk.end) service.fetch_queries(shared, j + 1);
      cp_async_commit();
      if (j > walk.first) service.add_queries(shared, j - 1);
      service.wait();
      if (j < last) service.finish_contexts(shared, j + 1);
      if (j + 1 < walk.end) service.finish_queries(shared, j + 1);
      named_barrier(1, kThreads);
    }
    service.add_queries(shared, last);
  } else {
    named_barrier(1, kThreads);
    for (int j = walk.first; j <= last; ++j) {
      meet_queries(shared, walk, j);
      named_barrier(1, kThreads);
    }
  }
}

}  // namespace

cudaError_t walk_backward_window(const ReadBackward& p, const MemoryExtent& extent, void* stream) {
  const int length = walk_length(extent, multiprocessors(), kWalkBehind);
  const dim3 grid(static_cast<unsigned>(ceil_div(walk_tiles(extent), length)), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(window_kernel, grid, dim3(kThreads), sizeof(Shared), stream, p, extent, length);
}

}  // namespace mm_rec
