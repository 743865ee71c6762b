// memory_read, forward, for the sizes of most models. The last three tiles of keys and values are kept in a ring; the next
// is on its way while the slots are read.
#include "launch.cuh"
#include "memory_walk.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 128, kResident = 3, kBlocks = kWalkWindow / 16 + 1, kRing = (kWalkBehind + 1) * kWalkTile;
constexpr float kBase2 = kWalkScale * kLog2e;  // of scores

struct Shared {
  Tile<kRing, kWalkDim, false> k, v;
  WalkTile slot_key, slot_value;
  float bias[kWalkTile];
  Visible<kWalkTile> visible;
};

// Start copying 64 rows to a tile, each thread what it will turn, so that it need not wait for others.
__device__ __forceinline__ void copy_pieces(bf16* tile, const bf16* source, int64_t stride, int rows) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = RowPieces::row(i), column = RowPieces::column(i);
    const bool inside = row < rows;
    const bf16* from = source + (inside ? row * stride + column : 0);
    bf16* to = tile + row * WalkTile::kStride + column;
    cp_async_16(to, from, inside);
    cp_async_16(to + kWalkDim / 2, from + (inside ? kWalkDim / 2 : 0), inside);
  }
}

// What decides what query `threadIdx.x` of a tile may see, on its way.
struct View {
  int64_t t, position;
  int version;
  bool real;

  __device__ __forceinline__ void fetch(const ReadInputs& in, const MemoryExtent& extent, int64_t b, int64_t t0) {
    t = t0 + threadIdx.x;
    real = threadIdx.x < kWalkTile && t < extent.time;
    const int64_t at = real ? b * extent.time + t : 0;
    position = in.position[at];
    version = in.index.version[at];
  }
  __device__ __forceinline__ void put(Visible<kWalkTile>& visible) const {
    if (threadIdx.x >= kWalkTile) return;
    visible.low[threadIdx.x] = real ? static_cast<int>(max(kWalkWindow + t - position, t + 1)) : INT_MAX;
    visible.version[threadIdx.x] = real && position >= kWalkWindow ? version : -1;
  }
};

// A warp's 16 queries as left operands.
struct Queries {
  Left<false> part[kWalkDim / 16];

  // Rows `stride` apart from the warp's first on; those past the first `rows` are zero.
  __device__ __forceinline__ void load(const bf16* source, int64_t stride, int rows) {
    const int column = fragment_column(0, 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = fragment_row(i % 2 * 2);
      const bf16* from = source + row * stride + column + i / 2 * 8;
#pragma unroll
      for (int k = 0; k < kWalkDim / 16; ++k) {
        part[k].hi[i] = row < rows ? *reinterpret_cast<const uint32_t*>(from + 16 * k) : 0u;
      }
    }
  }
  // The same, rotated by the angles of a tile's rows from `first` on.
  template <typename Turn>
  __device__ __forceinline__ Queries rotated(const Turn& turn, int first) const {
    constexpr int kHalf = kWalkDim / 32;
    Queries result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < kHalf; ++k) {
        float cosine[2], sine[2], x[2], y[2];
        turn.template load<2>(first + fragment_row(i % 2 * 2), 16 * k + fragment_column(0, 0) + i / 2 * 8, cosine, sine);
        const uint32_t left = part[k].hi[i], right = part[k + kHalf].hi[i];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float a = __uint_as_float(j == 0 ? left << 16 : left & 0xffff0000u);
          const float b = __uint_as_float(j == 0 ? right << 16 : right & 0xffff0000u);
          x[j] = a * cosine[j] - b * sine[j];
          y[j] = b * cosine[j] + a * sine[j];
        }
        result.part[k].hi[i] = pack_bf16(x[0], x[1]);
        result.part[k + kHalf].hi[i] = pack_bf16(y[0], y[1]);
      }
    }
    return result;
  }
};

// Running softmax of the two rows of a thread, in base 2, and the weighted sum of values.
struct Running {
  Fragments<kWalkDim / 8> sum;
  float top[2], total[2];

  // Turn scores, which `scale` brings to base 2, -inf for what is not seen, into weights.
  template <bool First, int N>
  __device__ __forceinline__ void weigh(Fragments<2> (&scores)[N], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < 2 * N; ++n) {
        largest = fmaxf(largest, fmaxf(scores[n / 2][n % 2][2 * r], scores[n / 2][n % 2][2 * r + 1]));
      }
      largest = scale * group_max<4>(largest);
      if (!First) largest = fmaxf(top[r], largest);
      const float base = largest == -INFINITY ? 0.0f : largest, shrink = First ? 0.0f : exp2f(top[r] - base);
      top[r] = largest;
      float added = 0.0f;
#pragma unroll
      for (int n = 0; n < 2 * N; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[n / 2][n % 2][2 * r + j];
          x = exp2f(fmaf(x, scale, -base));
          added += x;
        }
      }
      added = group_sum<4>(added);
      total[r] = First ? added : fmaf(total[r], shrink, added);
#pragma unroll
      for (int n = 0; n < kWalkDim / 8; ++n) {
        sum[n][2 * r] = First ? 0.0f : shrink * sum[n][2 * r];
        sum[n][2 * r + 1] = First ? 0.0f : shrink * sum[n][2 * r + 1];
      }
    }
  }
};

__global__ void __launch_bounds__(kThreads, kResident)
    forward_kernel(const ReadInputs in, bf16* __restrict__ out, float* __restrict__ lse, const MemoryExtent extent,
                   int length) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y, width = extent.width();
  const int first_tile = static_cast<int>(blockIdx.x) * length;
  const int end_tile = min(first_tile + length, static_cast<int>(ceil_div(extent.time, kWalkTile)));
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const auto place = [&](int tile) { return (tile - first_tile) % (kWalkBehind + 1) * kWalkTile; };  // in the ring
  const auto turn = [&](int j) { return TableTurn{in.rotary + static_cast<int64_t>(j - first_tile) * kWalkTile * kWalkDim}; };
  // Tile j of the contexts.
  const auto fetch = [&](int j) {
    const int64_t from = extent.context_at(b, static_cast<int64_t>(j) * kWalkTile, head);
    const int rows = static_cast<int>(min(extent.context() - static_cast<int64_t>(j) * kWalkTile, int64_t{kWalkTile}));
    const int at = place(j) * WalkTile::kStride;
    copy_pieces(shared.k.hi + at, static_cast<const bf16*>(in.k) + from, width, rows);
    walk_copy(shared.v.hi + at, static_cast<const bf16*>(in.v) + from, width, rows);
    cp_async_commit();
  };

  for (int j = first_tile; j <= first_tile + kWalkBehind; ++j) fetch(j);
  View view;
  view.fetch(in, extent, b, static_cast<int64_t>(first_tile) * kWalkTile);
  cp_async_wait<0>();
  for (int j = first_tile; j < first_tile + kWalkBehind; ++j) {
    Angles<RowPieces>(turn(j)).rotate(shared.k.hi + place(j) * WalkTile::kStride);
  }

  for (int tile = first_tile; tile < end_tile; ++tile) {
    const int64_t t0 = static_cast<int64_t>(tile) * kWalkTile;
    const int rows = static_cast<int>(min(extent.time - t0, int64_t{kWalkTile})) - warp_row;
    const int newest_context = tile + kWalkBehind;  // tile of the queries' own contexts
    const bf16* q = static_cast<const bf16*>(in.q) + extent.token_at(b, t0 + warp_row, head);
    Queries turned;
    turned.load(q, width, rows);
    {
      const Angles<RowPieces> angles(turn(newest_context));
      view.put(shared.visible);
      cp_async_wait<0>();
      angles.rotate(shared.k.hi + place(newest_context) * WalkTile::kStride);
    }
    turned = turned.rotated(turn(newest_context), warp_row);
    __syncthreads();
    int unused, oldest, newest;
    shared.visible.bounds(unused, oldest, newest);
    for (int version = oldest; version <= newest; ++version) {
      const int64_t slot = extent.slots_at(b, version, head) * kWalkDim + threadIdx.x * 32;
      if (static_cast<int>(threadIdx.x) * 32 >= extent.slots * kWalkDim) continue;
      prefetch_l2(in.key + slot);
      prefetch_l2(in.value + slot);
    }

    Running running;
    {
      // Block n of 16 contexts begins at c0 + 16 n. Before the warp's first block in view nothing is seen.
      const int c0 = tile * kWalkTile + warp_row, at = place(tile) + warp_row;
      const int low = shared.visible.low[warp_row + threadIdx.x % 16];
      const int hidden = (__reduce_min_sync(kFullWarp, low) - c0) / 16, cut = __reduce_max_sync(kFullWarp, low) - c0;
      const auto ring_row = [&](int n) { return at + 16 * n < kRing ? at + 16 * n : at + 16 * n - kRing; };
      Fragments<2> scores[kBlocks];
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (n < hidden) {
#pragma unroll
          for (int i = 0; i < 8; ++i) scores[n][i / 4][i % 4] = -INFINITY;
          continue;
        }
        zero(scores[n]);
#pragma unroll
        for (int k = 0; k < kWalkDim / 16; ++k) {
          multiply_step<false>(scores[n], turned.part[k], shared.k, ring_row(n), 16 * k);
        }
        if (n == 0 || n == kBlocks - 1 || 16 * n < cut) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int r = fragment_row(i % 4), c = c0 + 16 * n + fragment_column(i / 4, i % 4);
            if (c < shared.visible.low[warp_row + r] || c > c0 + kWalkWindow + r) scores[n][i / 4][i % 4] = -INFINITY;
          }
        }
      }
      running.weigh<true>(scores, kBase2);
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        if (n >= hidden) multiply_step<true>(running.sum, to_left<false>(scores[n], 0), shared.v, 0, ring_row(n));
      }
    }
    __syncthreads();  // the oldest tile's place is free
    if (tile + 1 < end_tile) {
      fetch(newest_context + 1);
      view.fetch(in, extent, b, t0 + kWalkTile);
      if (threadIdx.x < kWalkTile && t0 + kWalkTile + threadIdx.x < extent.time) {
        prefetch_l2(static_cast<const bf16*>(in.q) + extent.token_at(b, t0 + kWalkTile + threadIdx.x, head));
      }
    }

    for (int version = oldest; version <= newest; ++version) {
      WalkPlan::fill_slots(shared.slot_key, shared.slot_value, shared.bias, in, extent.slots_at(b, version, head),
                           extent.slots, kWalkDim);
      __syncthreads();
      if (shared.visible.any_of_warp(warp_row, version)) {
        Queries queries;  // slots have no place: queries meet them un-rotated
        queries.load(q, width, rows);
        Fragments<2> scores[kWalkTile / 16];
#pragma unroll
        for (int n = 0; n < kWalkTile / 16; ++n) {
          zero(scores[n]);
#pragma unroll
          for (int k = 0; k < kWalkDim / 16; ++k) {
            multiply_step<false>(scores[n], queries.part[k], shared.slot_key, 16 * n, 16 * k);
          }
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const bool seen = shared.visible.version[warp_row + fragment_row(i % 4)] == version;
            const float bias = shared.bias[16 * n + fragment_column(i / 4, i % 4)];
            scores[n][i / 4][i % 4] = seen ? fmaf(scores[n][i / 4][i % 4], kBase2, bias) : -INFINITY;
          }
        }
        running.weigh<false>(scores, 1.0f);
#pragma unroll
        for (int n = 0; n < kWalkTile / 16; ++n) {
          multiply_step<true>(running.sum, to_left<false>(scores[n], 0), shared.slot_value, 0, 16 * n);
        }
      }
      __syncthreads();
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = 1.0f / running.total[r];
#pragma unroll
      for (int n = 0; n < kWalkDim / 8; ++n) {
        running.sum[n][2 * r] *= inverse;
        running.sum[n][2 * r + 1] *= inverse;
      }
      if (threadIdx.x % 4 == 0 && fragment_row(2 * r) < rows) {
        lse[(b * extent.heads + head) * extent.time + t0 + warp_row + fragment_row(2 * r)] =
            (running.top[r] + __log2f(running.total[r])) / kLog2e;
      }
    }
    walk_store(out + extent.token_at(b, t0 + warp_row, head), width, rows, 1.0f, running.sum);
  }
}

}  // namespace

cudaError_t walk_forward(const ReadInputs& in, void* out, float* lse, const MemoryExtent& extent, void* stream) {
  const int length = walk_length(extent, int64_t{kResident} * multiprocessors(), 1);
  const dim3 grid(static_cast<unsigned>(ceil_div(walk_tiles(extent), length)), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(forward_kernel, grid, dim3(kThreads), sizeof(Shared), stream, in, static_cast<bf16*>(out), lse, extent,
                length);
}

}  // namespace mm_rec
