// memory_update for the sizes of most models (as in memory_walk.cuh): bfloat16, heads of 64, a window of 128, up to 64 slots.
// A write is then one tile of 64 tokens and one of slots. Its weights don't depend on what is in the memory, so some warps
// compute those of the write after while others apply the one before. Where sequences are few they are cut in parts where a
// document makes its first write, before which nothing counts.
#ifndef MM_REC_MEMORY_WRITE_CUH
#define MM_REC_MEMORY_WRITE_CUH

#include "memory_update.cuh"
#include "memory_walk.cuh"

namespace mm_rec {

constexpr int kWriteSlots = 64, kWriteWarps = 4;
using SplitTile = Tile<64, 64, true>;

// The writes of sequence b.
struct Writes {
  const UpdateInputs& in;
  const MemoryExtent& extent;
  int64_t b;

  __device__ __forceinline__ int count() const { return in.index.version[(b + 1) * extent.time - 1]; }
  // The token that causes a write, which reads the 64 contexts from that number on; -1 past the last.
  __device__ __forceinline__ int token(int64_t e) const {
    return e < extent.writes() ? in.index.event[b * extent.writes() + e] : -1;
  }
  // 0 if a document's first write, which starts from an empty memory.
  __device__ __forceinline__ float keep(int token) const {
    return token >= 0 && in.position[b * extent.time + token] == kWalkWindow ? 0.0f : 1.0f;
  }
  // Where the writes are cut near the `e`-th: at a document's first write, the nearest of the 32 around `e` or else the first
  // after them; at the end if there is none. Whole warps take part.
  __device__ __forceinline__ int cut(int e, int all) const {
    for (int from = max(e - 16, 0); from < all; from += 32) {
      const int own = from + static_cast<int>(threadIdx.x) % 32;
      const unsigned starts = __ballot_sync(kFullWarp, own < all && keep(token(own)) == 0.0f);
      if (starts == 0) continue;
      const unsigned before = from < e ? starts & ((1u << (e - from)) - 1) : 0, after = starts ^ before;
      const int last = from + 31 - __clz(before), next = from + __ffs(after) - 1;
      return after == 0 || (before != 0 && e - last < next - e) ? last : next;
    }
    return all;
  }
};

// The writes of a block of threads: all of a sequence or, if `Cut`, one of its parts, from one that starts a document to
// another.
template <bool Cut>
struct WritePart {
  int begin, end;
  bool first, last;  // of the parts that have any

  __device__ __forceinline__ WritePart(const Writes& writes, int part, int parts)
      : begin(0), end(writes.count()), first(true), last(true) {
    if (!Cut) return;
    const int all = end;
    const auto cut = [&](int i) { return writes.cut(static_cast<int>(static_cast<int64_t>(all) * i / parts), all); };
    first = part == 0;
    if (!first) begin = cut(part);
    if (part + 1 < parts) end = cut(part + 1);
    last = end == all;
  }
  __device__ __forceinline__ bool idle() const { return !first && begin == end; }
};

// How many parts let `blocks`, one for each whole sequence, become as many as run at a time. Parts have eight writes or more on
// average, so that their beginnings don't count.
inline int write_parts(const MemoryExtent& extent, int64_t blocks, int64_t resident) {
  const int64_t room = resident / blocks, most = extent.writes() / 8, parts = room < most ? room : most;
  return static_cast<int>(parts > 1 ? parts : 1);
}
int write_backward_parts(const MemoryExtent& extent);

// Products and sums over the tokens of a warp, of the two slots that a lane is left with.
struct ColumnParts {
  float product[2], sum[2];
  int slot;  // the first of the two
};

// Hand one half of 2 * Half columns to the lane across, and take in what it has of the other.
template <int Half>
__device__ __forceinline__ void hand_over(float (&product)[16], float (&sum)[16]) {
  const bool upper = threadIdx.x & (2 * Half);
#pragma unroll
  for (int c = 0; c < Half; ++c) {
    const float other_product = __shfl_xor_sync(kFullWarp, upper ? product[c] : product[c + Half], 2 * Half);
    const float other_sum = __shfl_xor_sync(kFullWarp, upper ? sum[c] : sum[c + Half], 2 * Half);
    product[c] = (upper ? product[c + Half] : product[c]) * other_product;
    sum[c] = (upper ? sum[c + Half] : sum[c]) + other_sum;
  }
}

// The two rows of each lane, then the lanes of a column.
__device__ __forceinline__ ColumnParts reduce_columns(const Fragments<kWriteSlots / 8>& w) {
  float product[16], sum[16];
#pragma unroll
  for (int c = 0; c < 16; ++c) {
    const float x = w[c / 2][c % 2], y = w[c / 2][c % 2 + 2];
    product[c] = (1.0f - x) * (1.0f - y);
    sum[c] = x + y;
  }
  hand_over<8>(product, sum);
  hand_over<4>(product, sum);
  hand_over<2>(product, sum);
  const int lane = threadIdx.x % 32, column = lane / 4;  // bits 4, 3 and 2 of the lane chose the fragment
  return {{product[0], product[1]}, {sum[0], sum[1]}, 8 * column + lane % 4 * 2};
}

// Weights of a warp's 16 tokens, from row `token` of the tile on, in all slots.
__device__ __forceinline__ void write_weights(const WalkTile& k, int token, const SplitTile& address, int slots, float rate,
                                              Fragments<kWriteSlots / 8>& w) {
  zero(w);
  multiply<false, false, kWalkDim>(w, k, token, address, 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY, total = 0.0f;
#pragma unroll
    for (int n = 0; n < kWriteSlots / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = w[n][2 * r + j];
        if (fragment_column(n, j) >= slots) x = -INFINITY;
        top = fmaxf(top, x);
      }
    }
    top = group_max<4>(top);
#pragma unroll
    for (int n = 0; n < kWriteSlots / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = w[n][2 * r + j];
        x = __expf(x - top);
        total += x;
      }
    }
    const float scale = rate / group_sum<4>(total);
#pragma unroll
    for (int n = 0; n < kWriteSlots / 8; ++n) {
      w[n][2 * r] *= scale;
      w[n][2 * r + 1] *= scale;
    }
  }
}

// Accumulators of 16 rows, from row `row` on, as part of a tile.
template <typename TileType, int N>
__device__ __forceinline__ void put_rows(TileType& tile, int row, const Fragments<N>& x) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      tile.set(row + fragment_row(2 * r), fragment_column(n, 0), x[n][2 * r], x[n][2 * r + 1]);
    }
  }
}

// A tile of float32 rows of heads, the first `rows` of them, by `threads` threads.
__device__ __forceinline__ void load_split(SplitTile& tile, const float* source, int rows, int thread, int threads) {
  for (int i = thread; i < 64 * kWalkDim / 8; i += threads) {
    const int row = i / (kWalkDim / 8), column = i % (kWalkDim / 8) * 8;
    float x[8] = {};
    if (row < rows) load<8>(source + row * kWalkDim + column, x);
    tile.set(row, column, x);
  }
}

// Whether these kernels are for such sizes and fit the device.
bool writes_forward(int64_t dtype, const MemoryExtent& extent);
bool writes_backward(int64_t dtype, const MemoryExtent& extent);
cudaError_t write_forward(const UpdateInputs& in, const UpdateOutputs& out, const MemoryExtent& extent, void* stream);
cudaError_t write_backward(const UpdateInputs& in, const UpdateGradients& out, const MemoryExtent& extent, void* stream);

}  // namespace mm_rec

#endif
