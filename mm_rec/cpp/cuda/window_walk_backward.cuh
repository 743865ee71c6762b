// What the warpgroups of window_walk_backward.cu share: tiles on their way, and which step of the walk is which. Step j of a
// run is tile j of the contexts, against the tiles of queries j - 2, j - 1 and j.
#ifndef MM_REC_WINDOW_WALK_BACKWARD_CUH
#define MM_REC_WINDOW_WALK_BACKWARD_CUH

#include "head_rows.cuh"
#include "window_attention_backward.cuh"
#include "window_walk.cuh"
#include "wgmma.cuh"

namespace mm_rec {

constexpr int kGroup = 128, kWalkThreads = 4 * kGroup;
constexpr int kFetchBarrier = 1, kFullBarrier = 2, kEmptyBarrier = 3;  // of Fetchers; of weights from Values to Keys
constexpr int kSpan = kWalkBehind + 1;  // tiles of queries that a step meets
// Tiles are asked for two steps ahead and made ready one step ahead; the queries' gradients need keys a step longer.
constexpr int kQueryRing = kSpan + 2, kKeyRing = 4, kValueRing = 3;

// A block walks along one run of tiles after the other; a run is `length` tiles of queries of a head of a sequence.
struct Runs {
  const AttentionBackward& p;
  const WindowExtent& extent;
  int length, tiles, parts, count;

  __device__ __forceinline__ Runs(const AttentionBackward& p_, const WindowExtent& extent_, int length_)
      : p(p_), extent(extent_), length(length_), tiles(static_cast<int>(ceil_div(extent_.time, kWalkTile))) {
    parts = (tiles + length - 1) / length;
    count = static_cast<int>(extent.batch * extent.heads) * parts;
  }
};

// Which tiles of queries meet the contexts of a step at all; of which every query sees all of them; of which each sees the
// whole window before it. (Beside that, no query sees what is later.)
struct Plan {
  unsigned met, whole, plain;
};

struct WalkShared {  // in a ring of n, tiles of step s are at s % n
  SwizzledTile q[kQueryRing], dout[kQueryRing], k[kKeyRing], v[kValueRing];
  SwizzledTile dscores[2][kSpan];                     // (key, query)
  uint4 weights[kWalkTile / 16][kGroup];              // of one tile of queries, as left operands of each thread
  float lse[kQueryRing][kWalkTile];                   // of queries: denominator in base 2, ...
  float inner[kQueryRing][kWalkTile];                 // ... out . dout, ...
  int low[kQueryRing][kWalkTile];                     // ... the first context in view
  float row_angles[kWalkTile * SharedTurn::kStride];  // of the first tile of contexts
  float tile_angles[(kWalkLongest + kWalkBehind) * kWalkDim];  // of the first row of each
  Plan plan[2];
  uint64_t gate;  // of all warpgroups

  __device__ __forceinline__ void load_angles(const Runs& runs) {
    const float* rotary = runs.p.in.rotary;
    for (int i = threadIdx.x; i < kWalkTile * kWalkDim; i += kWalkThreads) {
      row_angles[i / kWalkDim * SharedTurn::kStride + i % kWalkDim] = rotary[i];
    }
    for (int i = threadIdx.x; i < (runs.length + kWalkBehind) * kWalkDim; i += kWalkThreads) {
      tile_angles[i] = rotary[i / kWalkDim * kWalkTile * kWalkDim + i % kWalkDim];
    }
  }
};

// One step: tile `tile` of the contexts against the tiles of queries tile - 2 ... tile, of a run that owns the queries first
// ... end - 1. A run's first two steps need two tiles of queries before its own, which are fetched in steps without contexts;
// its last two leave the contexts' gradients to the next run, if there is one.
struct Step {
  int run, number, b, head, first, end, tile;

  __device__ __forceinline__ explicit Step(const Runs& runs) : run(static_cast<int>(blockIdx.x)), number(0) {
    begin(runs);
  }
  __device__ __forceinline__ void begin(const Runs& runs) {
    const int heads = static_cast<int>(runs.extent.heads), part = run / heads % runs.parts;
    head = run % heads;
    b = run / heads / runs.parts;
    first = part * runs.length;
    end = min(first + runs.length, runs.tiles);
    tile = max(first - kWalkBehind, 0);
  }
  __device__ __forceinline__ bool real(const Runs& runs) const { return run < runs.count; }
  __device__ __forceinline__ void advance(const Runs& runs) {
    ++number;
    if (++tile < end + kWalkBehind) return;
    run += static_cast<int>(gridDim.x);
    begin(runs);
  }
  __device__ __forceinline__ bool has_contexts() const { return tile >= first; }
  __device__ __forceinline__ bool owns_contexts(const Runs& runs) const { return tile < end || end == runs.tiles; }
  // Tile d of the queries that the step meets.
  __device__ __forceinline__ int queries(int d) const { return tile - kWalkBehind + d; }
  __device__ __forceinline__ bool owns_queries(int d) const { return queries(d) >= first && queries(d) < end; }
  __device__ __forceinline__ bool has_queries(int d) const {
    return queries(d) >= max(first - kWalkBehind, 0) && queries(d) < end;
  }
  // Where it is in the ring.
  __device__ __forceinline__ int queries_at(int d) const { return (number + kQueryRing - kWalkBehind + d) % kQueryRing; }
  // Angles of the tile of contexts, which are also those of the newest queries two steps before.
  __device__ __forceinline__ SharedTurn turn(const WalkShared& shared, int ahead = 0) const {
    return {shared.row_angles, shared.tile_angles + (tile + ahead - first) * kWalkDim};
  }
};

}  // namespace mm_rec

#endif
