// The first warpgroup of memory_walk_backward.cu: it fetches the tiles two steps ahead, rotates those of the next step, and turns
// the gradients of the scores of the step before into those of the queries, in registers, where three tiles of them are
// under way.
#ifndef MM_REC_MEMORY_WALK_SERVANTS_CUH
#define MM_REC_MEMORY_WALK_SERVANTS_CUH

#include "memory_walk_backward.cuh"

namespace mm_rec {

class Servants {
 public:
  __device__ __forceinline__ Servants(const Runs& runs, WalkShared& shared) : runs_(runs), shared_(shared) {}

  // Ask for what a step is the first to need.
  __device__ __forceinline__ void fetch(const Step& step) {
    arrived_ = coming_;
    if (step.real(runs_)) {
      if (step.has_contexts()) fetch_contexts(step);
      if (step.tile < step.end) fetch_queries(step);
    }
    cp_async_commit();
  }
  // Make ready what was asked for before the last call of `fetch`.
  __device__ __forceinline__ void finish(const Step& step) {
    cp_async_wait<1>();
    named_barrier(2, kGroup);
    if (step.real(runs_)) {
      if (step.has_contexts()) Angles<ColumnPieces>(step.turn(shared_)).rotate(shared_.k[step.number % kKeyRing]);
      if (step.tile < step.end) finish_queries(step);
      if (threadIdx.x < 32) make_plan(step);
    }
    publish_to_wgmma();
  }
  // Take in the gradients of a step's scores, which completes those of its oldest queries.
  __device__ __forceinline__ void add_queries(const Step& step) {
    if (!__shfl_sync(kFullWarp, step.has_contexts(), 0)) return;
    const uint64_t keys = describe(shared_.k[step.number % kKeyRing]);
    const SwizzledTile(&dscores)[kSpan] = shared_.dscores[step.number % 2];
#pragma unroll
    for (int d = 0; d < kWalkBehind; ++d) {  // those of the newest begin here
#pragma unroll
      for (int n = 0; n < kWalkDim / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) dq_[d][n][e] = dq_[d + 1][n][e];
      }
      settle(dq_[d]);
    }
    forget(dq_[2]);
    wgmma_begin();
    wgmma<Along::kOther, Along::kOther, true>(dq_[0], describe(dscores[0]), keys);
    wgmma<Along::kOther, Along::kOther, true>(dq_[1], describe(dscores[1]), keys);
    wgmma<Along::kOther, Along::kOther, false>(dq_[2], describe(dscores[2]), keys);
    wgmma_commit();
    wgmma_wait<0>();
    settle(dq_[0]);
    settle(dq_[1]);
    settle(dq_[2]);
    if (!step.owns_queries(0)) return;
    const auto& extent = runs_.extent;
    const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
    const int64_t t0 = static_cast<int64_t>(step.queries(0)) * kWalkTile + warp_row;
    walk_back(dq_[0], step.turn(shared_), warp_row);
    store_heads(static_cast<bf16*>(runs_.p.dq) + extent.token_at(step.b, t0, step.head), extent.width(),
                static_cast<int>(min(extent.time - t0, int64_t{16})), kWalkScale, dq_[0]);
  }

 private:
  // Of a tile of queries, what passes through registers: of two rows the results, 8 columns of both halves, and denominators;
  // of the first warp two positions.
  struct Loads {
    Words<bf16, 8> out[2][2];
    float lse[2];
    int64_t position[2];
  };

  // Which columns a thread has first; neighbouring rows begin with different halves, so that they fall in different banks.
  static __device__ __forceinline__ int column(int row, int half) {
    return static_cast<int>(threadIdx.x) % 4 * 8 + (row + half) % 2 * (kWalkDim / 2);
  }
  static __device__ __forceinline__ void copy(SwizzledTile& tile, const void* source, int64_t at, int64_t stride, int rows) {
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
    const int64_t line = line_of(step);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = RowPieces::row(r);
      const bool real = row < rows;
      const bf16* out = static_cast<const bf16*>(runs_.p.out) + at + (real ? row * extent.width() : 0);
      coming_.out[r][0] = *reinterpret_cast<const Words<bf16, 8>*>(out + column(row, 0));
      coming_.out[r][1] = *reinterpret_cast<const Words<bf16, 8>*>(out + column(row, 1));
      coming_.lse[r] = INFINITY;  // queries that are not there have no weights
      if (real) coming_.lse[r] = runs_.p.lse[line + row];
    }
    if (threadIdx.x >= 32) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t t = t0 + threadIdx.x + 32 * i;
      coming_.position[i] = t < extent.time ? runs_.p.in.position[step.b * extent.time + t] : 0;
    }
  }
  // The step's newest query among lines (B, H, T).
  __device__ __forceinline__ int64_t line_of(const Step& step) const {
    const auto& extent = runs_.extent;
    return (step.b * extent.heads + step.head) * extent.time + static_cast<int64_t>(step.tile) * kWalkTile;
  }
  __device__ __forceinline__ void finish_queries(const Step& step) {
    const auto& extent = runs_.extent;
    const int place = step.number % kQueryRing;
    const int64_t t0 = static_cast<int64_t>(step.tile) * kWalkTile, line = line_of(step);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = RowPieces::row(r);
      float inner = 0.0f;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto dout = *reinterpret_cast<const Words<bf16, 8>*>(shared_.dout[place].elements +
                                                                   SwizzledTile::at(row, column(row, half)));
#pragma unroll
        for (int j = 0; j < 8; ++j) inner = fmaf(dout[j], arrived_.out[r][half][j], inner);
      }
      inner = group_sum<4>(inner);
      if (threadIdx.x % 4 != 0) continue;
      shared_.lse[place][row] = arrived_.lse[r] * kLog2e;
      shared_.inner[place][row] = inner;
      if (step.tile >= step.first && t0 + row < extent.time) runs_.p.inner[line + row] = inner;
    }
    Angles<ColumnPieces>(step.turn(shared_, kWalkBehind)).rotate(shared_.q[place]);
  }
  // By the first warp.
  __device__ __forceinline__ void make_plan(const Step& step) {
#pragma unroll
    for (int d = 0; d < kWalkBehind; ++d) bounds_[d] = bounds_[d + 1];
    if (step.tile < step.end) {
      int low[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t t = static_cast<int64_t>(step.tile) * kWalkTile + threadIdx.x + 32 * i;
        low[i] = static_cast<int>(max(kWalkWindow + t - arrived_.position[i], t + 1));
        shared_.low[step.number % kQueryRing][threadIdx.x + 32 * i] = low[i];
      }
      bounds_[kWalkBehind] = make_int2(__reduce_min_sync(kFullWarp, min(low[0], low[1])),
                                       __reduce_max_sync(kFullWarp, max(low[0], low[1])));
    }
    Plan plan = {};
#pragma unroll
    for (int d = 0; d < kSpan; ++d) {
      const bool met = step.has_queries(d) && bounds_[d].x < (step.tile + 1) * kWalkTile;
      plan.met |= met ? 1u << d : 0u;
      plan.whole |= bounds_[d].y <= step.tile * kWalkTile ? 1u << d : 0u;
    }
    if (threadIdx.x == 0) shared_.plan[step.number % 2] = plan;
  }

  const Runs& runs_;
  WalkShared& shared_;
  Sums64 dq_[kSpan] = {};
  Loads coming_, arrived_;
  int2 bounds_[kSpan] = {};  // of each tile that a step meets, the least and largest context that a query sees first
};

__device__ __forceinline__ void serve(const Runs& runs, WalkShared& shared) {
  Step step(runs), ahead(runs), behind(runs);
  Servants servants(runs, shared);
  servants.fetch(ahead);
  ahead.advance(runs);
  servants.fetch(ahead);
  servants.finish(step);
  named_barrier(kStepBarrier, kWalkThreads);
  while (step.real(runs)) {
    const Step next = ahead;
    ahead.advance(runs);
    servants.fetch(ahead);
    if (step.number > 0) servants.add_queries(behind);
    servants.finish(next);
    named_barrier(kStepBarrier, kWalkThreads);
    behind = step;
    step = next;
  }
  servants.add_queries(behind);
}

}  // namespace mm_rec

#endif
