// The two warpgroups of window_walk_backward.cu that have 64 contexts each step. Values makes scores into weights and sums up
// the gradients of the values; Keys takes the weights from it, makes the gradients of the scores, puts them down for Queries
// and sums up the gradients of the keys.
#ifndef MM_REC_WINDOW_WALK_KEYS_CUH
#define MM_REC_WINDOW_WALK_KEYS_CUH

#include "window_walk_backward.cuh"

namespace mm_rec {

// The tiles of queries that a step meets, one after the other.
class Tiles {
 public:
  __device__ __forceinline__ Tiles(const WalkShared& shared, const Step& step) {
    const Plan plan = shared.plan[step.number % 2];
    met_ = __shfl_sync(kFullWarp, plan.met, 0);  // tells the compiler that the warp is of one mind
    whole_ = plan.whole;
    plain_ = plan.plain;
  }
  __device__ __forceinline__ unsigned met() const { return met_; }
  __device__ __forceinline__ bool more() const { return met_ != 0; }
  __device__ __forceinline__ int take() {
    const int d = __ffs(static_cast<int>(met_)) - 1;
    met_ &= met_ - 1;
    return d;
  }
  __device__ __forceinline__ bool whole(int d) const { return (whole_ >> d & 1) != 0; }
  __device__ __forceinline__ bool plain(int d) const { return (plain_ >> d & 1) != 0; }

 private:
  unsigned met_, whole_, plain_;
};

// What is said of each query to a thread that has its column of a tile.
using OfQueries = float2[kWalkTile / 8];
__device__ __forceinline__ void load_queries(const float (&of_tile)[kWalkTile], OfQueries& x) {
#pragma unroll
  for (int n = 0; n < kWalkTile / 8; ++n) x[n] = *reinterpret_cast<const float2*>(&of_tile[fragment_column(n, 0)]);
}

// What both have in common: 16 contexts a warp.
struct Contexts {
  const Runs& runs;
  WalkShared& shared;
  const Step& step;
  int warp_row, rank;  // of the thread in its group

  __device__ __forceinline__ Contexts(const Runs& runs_, WalkShared& shared_, const Step& step_)
      : runs(runs_), shared(shared_), step(step_), rank(static_cast<int>(threadIdx.x) % kGroup) {
    warp_row = rank / 32 * 16;
  }
  __device__ __forceinline__ void store(void* gradient, const Sums64& sums) const {
    if (!step.owns_contexts(runs)) return;
    const auto& extent = runs.extent;
    const int64_t c0 = static_cast<int64_t>(step.tile) * kWalkTile + warp_row;
    store_heads(static_cast<bf16*>(gradient) + extent.context_at(step.b, c0, step.head), extent.width(),
                static_cast<int>(min(extent.context() - c0, int64_t{16})), sums);
  }
};

class Values : Contexts {
 public:
  using Contexts::Contexts;

  // `first` if no weights have been handed over yet.
  __device__ __forceinline__ void meet_queries(bool& first) {
    Tiles tiles(shared, step);
    if (tiles.more()) {
      int d = tiles.take();
      load_queries(shared.lse[step.queries_at(d)], lse_);
      settle(dv_);
      wgmma_begin();
      ask_scores(d);
      wgmma_commit();
      wgmma_wait<0>();
      settle(scores_);
#pragma unroll 1
      for (bool more = true; more;) {
        more = tiles.more();
        const int next = more ? tiles.take() : d;  // one product too many at the end costs less than a branch
        weigh();
        if (d == 0) hide_later();
        if (!tiles.whole(d)) {
          if (d == kWalkBehind && tiles.plain(d)) {
            hide_earlier();
          } else {
            hide_others(d);
          }
        }
        if (!first) named_barrier(kEmptyBarrier, 2 * kGroup);
        first = false;
#pragma unroll
        for (int k = 0; k < kWalkTile / 16; ++k) {
          weights_[k] = to_left<false>(scores_, k);
          const uint32_t(&pairs)[4] = weights_[k].hi;
          shared.weights[k][rank] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        arrive_at_barrier(kFullBarrier, 2 * kGroup);
        wgmma_begin();
        wgmma<Along::kOther, true>(dv_, weights_, describe(shared.dout[step.queries_at(d)]));
        ask_scores(next);
        wgmma_commit();
        load_queries(shared.lse[step.queries_at(next)], lse_);
        wgmma_wait<0>();
        settle(scores_);
        settle(dv_);
        hold(weights_);
        d = next;
      }
    }
  }
  __device__ __forceinline__ void store() const { Contexts::store(runs.p.dv, dv_); }

 private:
  __device__ __forceinline__ void ask_scores(int d) {
    wgmma<Along::kSummed, Along::kSummed, false>(scores_, describe(shared.k[step.number % kKeyRing]),
                                                 describe(shared.q[step.queries_at(d)]));
  }
  // Scores to weights.
  __device__ __forceinline__ void weigh() {
#pragma unroll
    for (int n = 0; n < kWalkTile / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores_[n][e] = exp2f(fmaf(scores_[n][e], kLog2e, e % 2 == 0 ? -lse_[n].x : -lse_[n].y));
      }
    }
  }
  // Contexts after the queries' own, in the oldest tile.
  __device__ __forceinline__ void hide_later() {
#pragma unroll
    for (int n = 0; n < kWalkTile / 8; ++n) {
      if (8 * n >= warp_row + 16) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (fragment_column(n, e) < warp_row + fragment_row(e)) scores_[n][e] = 0.0f;
      }
    }
  }
  // Those before the window of queries that see all of it, in the newest tile.
  __device__ __forceinline__ void hide_earlier() {
#pragma unroll
    for (int n = kWalkTile / 8 - 1; n >= 0; --n) {
      if (8 * n + 8 <= warp_row) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (fragment_column(n, e) >= warp_row + fragment_row(e)) scores_[n][e] = 0.0f;
      }
    }
  }
  // Those before the window or the document of queries of tile d.
  __device__ __forceinline__ void hide_others(int d) {
    const int c0 = step.tile * kWalkTile + warp_row;
    const int(&lows)[kWalkTile] = shared.low[step.queries_at(d)];
#pragma unroll
    for (int n = 0; n < kWalkTile / 8; ++n) {
      const int2 low = *reinterpret_cast<const int2*>(&lows[fragment_column(n, 0)]);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (c0 + fragment_row(e) < (e % 2 == 0 ? low.x : low.y)) scores_[n][e] = 0.0f;
      }
    }
  }

  Sums64 scores_, dv_ = {};
  OfQueries lse_;
  Left<false> weights_[kWalkTile / 16] = {};  // of the product under way
};

class Keys : Contexts {
 public:
  using Contexts::Contexts;

  __device__ __forceinline__ void meet_queries(bool&) {
    Tiles tiles(shared, step);
    if (tiles.met() != (1u << kSpan) - 1) {  // Queries takes all of them
#pragma unroll
      for (int d = 0; d < kSpan; ++d) {
        if ((tiles.met() >> d & 1) == 0) put_down(d, {});
      }
    }
    if (tiles.more()) {
      int d = tiles.take();
      load_queries(shared.inner[step.queries_at(d)], inner_);
      settle(dk_);
      wgmma_begin();
      ask_slopes(d);
      wgmma_commit();
      wgmma_wait<0>();
      settle(slopes_);
#pragma unroll 1
      for (bool more = true; more;) {
        more = tiles.more();
        const int next = more ? tiles.take() : d;
        differentiate();
        put_down(d, dscores_);
        wgmma_begin();
        wgmma<Along::kOther, true>(dk_, dscores_, describe(shared.q[step.queries_at(d)]));
        ask_slopes(next);
        wgmma_commit();
        load_queries(shared.inner[step.queries_at(next)], inner_);
        wgmma_wait<0>();
        settle(slopes_);
        settle(dk_);
        hold(dscores_);
        d = next;
      }
    }
  }
  __device__ __forceinline__ void store() {
    walk_back(dk_, step.turn(shared), warp_row);
    Contexts::store(runs.p.dk, dk_);
  }

 private:
  __device__ __forceinline__ void ask_slopes(int d) {
    wgmma<Along::kSummed, Along::kSummed, false>(slopes_, describe(shared.v[step.number % kValueRing]),
                                                 describe(shared.dout[step.queries_at(d)]));
  }
  // Slopes, with the weights that come next, to gradients of the scores.
  __device__ __forceinline__ void differentiate() {
    named_barrier(kFullBarrier, 2 * kGroup);
#pragma unroll
    for (int k = 0; k < kWalkTile / 16; ++k) {
      const uint4 weights = shared.weights[k][rank];
      dscores_[k] = {{weights.x, weights.y, weights.z, weights.w}, {}};
    }
    arrive_at_barrier(kEmptyBarrier, 2 * kGroup);
#pragma unroll
    for (int n = 0; n < kWalkTile / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint32_t& pair = dscores_[n / 2].hi[n % 2 * 2 + r];
        const float first = __uint_as_float(pair << 16) * (slopes_[n][2 * r] - inner_[n].x);
        const float second = __uint_as_float(pair & 0xffff0000u) * (slopes_[n][2 * r + 1] - inner_[n].y);
        pair = pack_bf16(first, second);
      }
    }
  }
  __device__ __forceinline__ void put_down(int d, const Left<false> (&dscores)[kWalkTile / 16]) {
    const int lane = rank % 32;
    bf16* to = shared.dscores[step.number % 2][d].elements;
#pragma unroll
    for (int k = 0; k < kWalkTile / 16; ++k) {
      stmatrix(to + SwizzledTile::at(warp_row + lane % 16, 16 * k + lane / 16 * 8), dscores[k].hi);
    }
  }

  Sums64 slopes_, dk_ = {};
  OfQueries inner_;
  Left<false> dscores_[kWalkTile / 16] = {};  // of the product under way
};

// All steps of a warpgroup that has contexts.
template <typename Role>
__device__ __forceinline__ void walk_with(const Runs& runs, WalkShared& shared) {
  Gate gate(shared.gate);
  gate.arrive();
  bool first = true;
  for (Step step(runs); step.real(runs); step.advance(runs)) {
    Role role(runs, shared, step);
    gate.wait();
    if (step.has_contexts()) role.meet_queries(first);
    gate.arrive();
    if (step.has_contexts()) role.store();
  }
}

}  // namespace mm_rec

#endif
