// window_attention for the sizes of most models: bfloat16, heads of 64, a window of 128. Tokens come in tiles of 64 and so do
// their contexts: the queries of tile i see the contexts of tiles i, i + 1 and i + 2, of the first those later
// than their own place in it, of the last those up to it. So a block of threads walks through many tiles of one head of one
// sequence, one at a time, and each is fetched and rotated once. A warp has 16 rows and meets 9 blocks of 16 of the other
// side.
#ifndef MM_REC_WINDOW_WALK_CUH
#define MM_REC_WINDOW_WALK_CUH

#include "device.cuh"
#include "window_attention.cuh"

namespace mm_rec {

constexpr int kWalkDim = 64, kWalkTile = 64, kWalkWindow = 128, kWalkBehind = kWalkWindow / kWalkTile, kWalkLongest = 32;
using WalkTile = Tile<kWalkTile, kWalkDim, false>;

inline bool walks(int64_t dtype, const WindowExtent& extent) {
  return dtype == kBFloat16 && extent.dim == kWalkDim && extent.window == kWalkWindow;
}

inline int64_t walk_tiles(const WindowExtent& extent) { return ceil_div(extent.time, kWalkTile); }  // of queries

// Whether the window's kernel of the backward pass is for such sizes and runs on the device.
bool walks_backward(int64_t dtype, const WindowExtent& extent);
cudaError_t walk_forward(const AttentionInputs& in, void* out, float* lse, const WindowExtent& extent, void* stream);

// Tiles of queries a block should walk through, up to kWalkLongest, if `resident` blocks run at a time: a block has as much to
// do as `more` tiles beside, and the last blocks to run leave part of the device idle.
inline int walk_length(const WindowExtent& extent, int64_t resident, int more) {
  const int64_t tiles = walk_tiles(extent), longest = tiles < kWalkLongest ? tiles : kWalkLongest;
  int64_t best = longest, least = INT64_MAX;
  for (int64_t length = longest; length > 0; --length) {
    const int64_t blocks = extent.batch * extent.heads * ceil_div(tiles, length);
    const int64_t cost = ceil_div(blocks, resident) * (length + more);
    if (cost < least) {
      least = cost;
      best = length;
    }
  }
  return static_cast<int>(best);
}

// Angles of a tile of contexts: of its rows in the table of all contexts, ...
struct TableTurn {
  const float* rows;

  template <int N>
  __device__ __forceinline__ void load(int row, int column, float (&cosine)[N], float (&sine)[N]) const {
    const float* at = rows + row * kWalkDim + column;
    mm_rec::load<N>(at, cosine);
    mm_rec::load<N>(at + kWalkDim / 2, sine);
  }
};

// ... or put together from those of the rows of the first tile and those of the tile's first row, both in shared memory.
struct SharedTurn {
  static constexpr int kStride = kWalkDim + 4;  // eight rows fall in different banks
  const float* rows;
  const float* tile;

  template <int N>
  __device__ __forceinline__ void load(int row, int column, float (&cosine)[N], float (&sine)[N]) const {
    TableTurn{tile}.load<N>(0, column, cosine, sine);
    float c[N], s[N];
    mm_rec::load<N>(rows + row * kStride + column, c);
    mm_rec::load<N>(rows + row * kStride + column + kWalkDim / 2, s);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float x = cosine[i], y = sine[i];
      cosine[i] = x * c[i] - y * s[i];
      sine[i] = x * s[i] + y * c[i];
    }
  }
};

// How 128 threads divide a tile to turn it: each has 8 columns of both halves of two rows, along rows, ...
struct RowPieces {
  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) % 128 / 4 + 32 * i; }
  static __device__ __forceinline__ int column(int) { return static_cast<int>(threadIdx.x) % 4 * 8; }
};
// ... or along columns, without bank conflicts.
struct ColumnPieces {
  static __device__ __forceinline__ int row(int) { return static_cast<int>(threadIdx.x) % 64; }
  static __device__ __forceinline__ int column(int i) { return (static_cast<int>(threadIdx.x) % 128 / 64 + 2 * i) * 8; }
};

// Turn accumulators of 16 rows of a tile, from `row` on, back.
template <typename Turn>
__device__ __forceinline__ void walk_back(Fragments<kWalkDim / 8>& x, const Turn& turn, int row) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < kWalkDim / 16; ++n) {
      float cosine[2], sine[2];
      turn.template load<2>(row + fragment_row(2 * r), fragment_column(n, 0), cosine, sine);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float a = x[n][2 * r + j], b = x[n + kWalkDim / 16][2 * r + j];
        x[n][2 * r + j] = a * cosine[j] + b * sine[j];
        x[n + kWalkDim / 16][2 * r + j] = b * cosine[j] - a * sine[j];
      }
    }
  }
}

// Accumulators of 16 rows, to rows of heads `stride` apart, if they are among the first `rows`.
__device__ __forceinline__ void walk_store(bf16* target, int64_t stride, int rows,
                                           const Fragments<kWalkDim / 8>& x) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (fragment_row(2 * r) >= rows) continue;
    bf16* to = target + fragment_row(2 * r) * stride + fragment_column(0, 0);
#pragma unroll
    for (int n = 0; n < kWalkDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(to + 8 * n) = pack_bf16(x[n][2 * r], x[n][2 * r + 1]);
    }
  }
}

}  // namespace mm_rec

#endif
