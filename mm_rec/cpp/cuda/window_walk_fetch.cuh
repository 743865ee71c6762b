// The warpgroup of window_walk_backward.cu that fetches the tiles two steps ahead, and rotates and otherwise makes ready
// those of the next step.
#ifndef MM_REC_WINDOW_WALK_FETCH_CUH
#define MM_REC_WINDOW_WALK_FETCH_CUH

#include "window_walk_backward.cuh"

namespace mm_rec {

class Fetchers {
 public:
  __device__ __forceinline__ Fetchers(const Runs& runs, WalkShared& shared) : runs_(runs), shared_(shared) {}

  __device__ __forceinline__ void walk() {
    Gate gate(shared_.gate);
    Step ahead(runs_), next = ahead;
#pragma unroll 1
    for (bool begun = false;; begun = true) {  // the first time nothing has been asked for
      if (begun) {
        if (next.real(runs_) && next.tile < next.end) fetch_loads(next);
        if (next.number > 0) gate.wait();
      }
      fetch(ahead);
      if (begun) {
        finish(next);
        gate.arrive();
        if (!next.real(runs_)) break;
      }
      next = ahead;
      ahead.advance(runs_);
    }
  }

 private:
  // Ask for what a step is the first to need.
  __device__ __forceinline__ void fetch(const Step& step) {
    if (step.real(runs_)) {
      if (step.has_contexts()) fetch_contexts(step);
      if (step.tile < step.end) fetch_queries(step);
    }
    cp_async_commit();
  }
  // Make ready what was asked for before the last call of `fetch`.
  __device__ __forceinline__ void finish(const Step& step) {
    cp_async_wait<1>();
    named_barrier(kFetchBarrier, kGroup);
    if (!step.real(runs_)) return;
    const bool has_queries = step.tile < step.end;
    if (has_queries) finish_queries(step);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const Piece piece(shared_, i);
      if (step.has_contexts()) piece.rotate(shared_.k[step.number % kKeyRing], step.turn(shared_));
      if (has_queries) piece.rotate(shared_.q[step.number % kQueryRing], step.turn(shared_, kWalkBehind));
    }
    if (threadIdx.x % kGroup < 32) make_plan(step);
  }
  // Eight columns of both halves of a row, to turn them in any tile.
  class Piece {
   public:
    __device__ __forceinline__ Piece(const WalkShared& shared, int i)
        : row_(ColumnPieces::row(i)), column_(ColumnPieces::column(i)) {
      load_angles(shared.row_angles + row_ * SharedTurn::kStride + column_, cosine_, sine_);
    }
    __device__ __forceinline__ void rotate(SwizzledTile& tile, const SharedTurn& turn) const {
      auto* first = reinterpret_cast<uint4*>(tile.elements + SwizzledTile::at(row_, column_));
      auto* second = reinterpret_cast<uint4*>(tile.elements + SwizzledTile::at(row_, column_ + kWalkDim / 2));
      const auto a = *reinterpret_cast<const Words<bf16, 8>*>(first), b = *reinterpret_cast<const Words<bf16, 8>*>(second);
      float c[8], s[8], x[8], y[8];
      load_angles(turn.tile + column_, c, s);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float cosine = c[j] * cosine_[j] - s[j] * sine_[j], sine = c[j] * sine_[j] + s[j] * cosine_[j];
        x[j] = a[j] * cosine - b[j] * sine;
        y[j] = b[j] * cosine + a[j] * sine;
      }
      *first = pack(x);
      *second = pack(y);
    }

   private:
    static __device__ __forceinline__ void load_angles(const float* from, float (&cosine)[8], float (&sine)[8]) {
      load<8>(from, cosine);
      load<8>(from + kWalkDim / 2, sine);
    }
    static __device__ __forceinline__ uint4 pack(const float (&x)[8]) {
      return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    }

    int row_, column_;
    float cosine_[8], sine_[8];
  };

  // Of a tile of queries, what passes through registers: of two rows the results, 8 columns of both halves, and
  // denominators; of the first warp two positions.
  struct Loads {
    Words<bf16, 8> out[2][2];
    float lse[2];
    int64_t position[2];
  };

  // Which columns a thread has first; neighbouring rows begin with different halves, so that they fall in different banks.
  static __device__ __forceinline__ int column(int row, int half) {
    return static_cast<int>(threadIdx.x) % 4 * 8 + (row + half) % 2 * (kWalkDim / 2);
  }
  static __device__ __forceinline__ void copy(SwizzledTile& tile, const void* source, int64_t at, int64_t stride,
                                              int rows) {
    const int column = static_cast<int>(threadIdx.x) % 8 * 8;
    const bf16* from = static_cast<const bf16*>(source) + at + column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = static_cast<int>(threadIdx.x) / 8 + 16 * i;
      cp_async_16(tile.elements + SwizzledTile::at(row, column), from + (row < rows ? row * stride : 0), row < rows);
    }
  }
  __device__ __forceinline__ void fetch_contexts(const Step& step) {
    const auto& extent = runs_.extent;
    const int64_t c0 = static_cast<int64_t>(step.tile) * kWalkTile, at = extent.context_at(step.b, c0, step.head);
    const int rows = static_cast<int>(min(extent.context() - c0, int64_t{kWalkTile}));
    copy(shared_.k[step.number % kKeyRing], runs_.p.in.k, at, extent.width(), rows);
    copy(shared_.v[step.number % kValueRing], runs_.p.in.v, at, extent.width(), rows);
  }
  __device__ __forceinline__ void fetch_queries(const Step& step) {
    const auto& extent = runs_.extent;
    const int64_t t0 = static_cast<int64_t>(step.tile) * kWalkTile, at = extent.token_at(step.b, t0, step.head);
    const int rows = static_cast<int>(min(extent.time - t0, int64_t{kWalkTile})), place = step.number % kQueryRing;
    copy(shared_.q[place], runs_.p.in.q, at, extent.width(), rows);
    copy(shared_.dout[place], runs_.p.dout, at, extent.width(), rows);
  }
  __device__ __forceinline__ void fetch_loads(const Step& step) {
    const auto& extent = runs_.extent;
    const int64_t t0 = static_cast<int64_t>(step.tile) * kWalkTile, at = extent.token_at(step.b, t0, step.head);
    const int rows = static_cast<int>(min(extent.time - t0, int64_t{kWalkTile}));
    const int64_t line = line_of(step);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = RowPieces::row(r);
      const bool real = row < rows;
      const bf16* out = static_cast<const bf16*>(runs_.p.out) + at + (real ? row * extent.width() : 0);
      loads_.out[r][0] = *reinterpret_cast<const Words<bf16, 8>*>(out + column(row, 0));
      loads_.out[r][1] = *reinterpret_cast<const Words<bf16, 8>*>(out + column(row, 1));
      loads_.lse[r] = INFINITY;  // queries that are not there have no weights
      if (real) loads_.lse[r] = runs_.p.lse[line + row];
    }
    if (threadIdx.x >= 32) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t t = t0 + threadIdx.x + 32 * i;
      loads_.position[i] = t < extent.time ? runs_.p.in.position[step.b * extent.time + t] : 0;
    }
  }
  // The step's newest query among lines (B, H, T).
  __device__ __forceinline__ int64_t line_of(const Step& step) const {
    const auto& extent = runs_.extent;
    return (step.b * extent.heads + step.head) * extent.time + static_cast<int64_t>(step.tile) * kWalkTile;
  }
  __device__ __forceinline__ void finish_queries(const Step& step) {
    const int place = step.number % kQueryRing;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = RowPieces::row(r);
      float inner = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto dout = *reinterpret_cast<const Words<bf16, 8>*>(shared_.dout[place].elements +
                                                                   SwizzledTile::at(row, column(row, half)));
#pragma unroll
        for (int j = 0; j < 8; ++j) inner = fmaf(dout[j], loads_.out[r][half][j], inner);
      }
      inner = group_sum<4>(inner);
      if (threadIdx.x % 4 != 0) continue;
      shared_.lse[place][row] = loads_.lse[r] * kLog2e;
      shared_.inner[place][row] = inner;
      const bool owned = step.tile >= step.first && row < runs_.extent.time - int64_t{step.tile} * kWalkTile;
      if (owned) runs_.p.inner[line_of(step) + row] = inner;
    }
  }
  // What the next step has to do, by the first warp.
  __device__ __forceinline__ void make_plan(const Step& step) {
#pragma unroll
    for (int d = 0; d < kWalkBehind; ++d) {
      bounds_[d] = bounds_[d + 1];
      plain_[d] = plain_[d + 1];
    }
    if (step.tile < step.end) {
      int low[2];
      bool plain = true;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t t = static_cast<int64_t>(step.tile) * kWalkTile + threadIdx.x + 32 * i;
        low[i] = static_cast<int>(max(kWalkWindow + t - loads_.position[i], t + 1));
        shared_.low[step.number % kQueryRing][threadIdx.x + 32 * i] = low[i];
        plain = plain && low[i] == t + 1;
      }
      bounds_[kWalkBehind] = make_int2(__reduce_min_sync(kFullWarp, min(low[0], low[1])),
                                       __reduce_max_sync(kFullWarp, max(low[0], low[1])));
      plain_[kWalkBehind] = __all_sync(kFullWarp, plain);
    }
    Plan plan = {};
#pragma unroll
    for (int d = 0; d < kSpan; ++d) {
      const bool met = step.has_queries(d) && bounds_[d].x < (step.tile + 1) * kWalkTile;
      plan.met |= met ? 1u << d : 0u;
      plan.whole |= bounds_[d].y <= step.tile * kWalkTile ? 1u << d : 0u;
      plan.plain |= plain_[d] ? 1u << d : 0u;
    }
    if (threadIdx.x == 0) shared_.plan[step.number % 2] = plan;
  }

  const Runs& runs_;
  WalkShared& shared_;
  Loads loads_;
  int2 bounds_[kSpan] = {};  // of each tile that a step meets, the least and largest context that a query sees first
  bool plain_[kSpan] = {};   // whether each of its queries sees the whole window
};

}  // namespace mm_rec

#endif
