// memory_read for the sizes of most models: bfloat16, heads of 64, a window of 128, up to 64 slots. Tokens come in tiles of
// 64 and so do their contexts: the queries of tile i see the contexts of tiles i, i + 1 and i + 2, of the first those later
// than their own place in it, of the last those up to it. So a block of threads walks through many tiles of one head of one
// sequence, one at a time, and each is fetched and rotated once. A warp has 16 rows and meets 9 blocks of 16 of the other
// side.
#ifndef MM_REC_MEMORY_WALK_CUH
#define MM_REC_MEMORY_WALK_CUH

#include "device.cuh"
#include "memory_read.cuh"

namespace mm_rec {

constexpr int kWalkDim = 64, kWalkTile = 64, kWalkWindow = 128, kWalkBehind = kWalkWindow / kWalkTile, kWalkLongest = 32;
constexpr float kWalkScale = 0.125f;  // 1 / sqrt(kWalkDim)
using WalkTile = Tile<kWalkTile, kWalkDim, false>;
using WalkPlan = ReadPlan<bf16, kWalkDim>;

inline bool walks(int64_t dtype, const MemoryExtent& extent) {
  return dtype == kBFloat16 && extent.dim == kWalkDim && extent.window == kWalkWindow && extent.slots <= kWalkTile;
}

inline int64_t walk_tiles(const MemoryExtent& extent) { return ceil_div(extent.time, kWalkTile); }  // of queries

cudaError_t walk_forward(const ReadInputs& in, void* out, float* lse, const MemoryExtent& extent, void* stream);

// Tiles of queries a block should walk through, up to kWalkLongest, if `resident` blocks run at a time: a block begins with
// two tiles more, and the last blocks to run leave part of the device idle.
inline int walk_length(const MemoryExtent& extent, int64_t resident) {
  const int64_t tiles = walk_tiles(extent);
  int best = 1;
  int64_t least = INT64_MAX;
  for (int length = 1; length <= kWalkLongest; length *= 2) {
    const int64_t blocks = extent.batch * extent.heads * ceil_div(tiles, length);
    const int64_t cost = ceil_div(blocks, resident) * ((length < tiles ? length : tiles) + kWalkBehind);
    if (cost < least) {
      least = cost;
      best = length;
    }
  }
  return best;
}

// Copies of tiles by 128 threads, each of which moves, and may then rotate, 8 elements of both halves of two rows.
class WalkCopy {
 public:
  // Start copying 64 rows, `stride` elements apart, to a tile; rows past the first `rows` are zero.
  static __device__ __forceinline__ void start(bf16* tile, const bf16* source, int64_t stride, int rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool inside = row(i) < rows;
      const bf16* from = source + (inside ? row(i) * stride + column() : 0);
      bf16* to = tile + row(i) * WalkTile::kStride + column();
      cp_async_16(to, from, inside);
      cp_async_16(to + kWalkDim / 2, from + (inside ? kWalkDim / 2 : 0), inside);
    }
  }
  // Rotate the rows that this thread has copied; row r of the tile by the angles at turn + r * kWalkDim.
  static __device__ __forceinline__ void rotate(bf16* tile, const float* turn) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bf16* first = tile + row(i) * WalkTile::kStride + column();
      const float* angle = turn + row(i) * kWalkDim + column();
      float a[8], b[8], cosine[8], sine[8], x[8], y[8];
      load<8>(first, a);
      load<8>(first + kWalkDim / 2, b);
      load_wide(angle, cosine);
      load_wide(angle + kWalkDim / 2, sine);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        x[j] = a[j] * cosine[j] - b[j] * sine[j];
        y[j] = b[j] * cosine[j] + a[j] * sine[j];
      }
      *reinterpret_cast<uint4*>(first) = packed(x);
      *reinterpret_cast<uint4*>(first + kWalkDim / 2) = packed(y);
    }
  }

  // A tile moved by a thread goes through these 16-byte pieces.
  static __device__ __forceinline__ int row(int i) { return static_cast<int>(threadIdx.x) % 128 / 4 + 32 * i; }
  static __device__ __forceinline__ int column() { return static_cast<int>(threadIdx.x) % 4 * 8; }

 private:
  static __device__ __forceinline__ void load_wide(const float* source, float (&out)[8]) {
    const float4 low = *reinterpret_cast<const float4*>(source), high = *reinterpret_cast<const float4*>(source + 4);
    out[0] = low.x, out[1] = low.y, out[2] = low.z, out[3] = low.w;
    out[4] = high.x, out[5] = high.y, out[6] = high.z, out[7] = high.w;
  }
  static __device__ __forceinline__ uint4 packed(const float (&x)[8]) {
    return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
  }
};

// Turn accumulators of 16 rows back; `turn` is where the angles of the first of them are.
__device__ __forceinline__ void walk_back(Fragments<kWalkDim / 8>& x, const float* turn) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < kWalkDim / 16; ++n) {
      const float* at = turn + fragment_row(2 * r) * kWalkDim + fragment_column(n, 0);
      float cosine[2], sine[2];
      load<2>(at, cosine);
      load<2>(at + kWalkDim / 2, sine);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float a = x[n][2 * r + j], b = x[n + kWalkDim / 16][2 * r + j];
        x[n][2 * r + j] = a * cosine[j] + b * sine[j];
        x[n + kWalkDim / 16][2 * r + j] = b * cosine[j] - a * sine[j];
      }
    }
  }
}

// Accumulators of 16 rows, times `scale`, to rows of heads `stride` apart, if they are among the first `rows`.
__device__ __forceinline__ void walk_store(bf16* target, int64_t stride, int rows, float scale,
                                           const Fragments<kWalkDim / 8>& x) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (fragment_row(2 * r) >= rows) continue;
    bf16* to = target + fragment_row(2 * r) * stride + fragment_column(0, 0);
#pragma unroll
    for (int n = 0; n < kWalkDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(to + 8 * n) = pack_bf16(scale * x[n][2 * r], scale * x[n][2 * r + 1]);
    }
  }
}

}  // namespace mm_rec

#endif
