// The warpgroup of window_walk_backward.cu that has the gradients of queries, one step after the keys have put down those of
// the scores: three tiles of them are under way in registers.
#ifndef MM_REC_WINDOW_WALK_QUERIES_CUH
#define MM_REC_WINDOW_WALK_QUERIES_CUH

#include "window_walk_backward.cuh"

namespace mm_rec {

class Queries {
 public:
  __device__ __forceinline__ Queries(const Runs& runs, WalkShared& shared) : runs_(runs), shared_(shared) {}

  __device__ __forceinline__ void walk() {
    Gate gate(shared_.gate);
    gate.arrive();
    Step step(runs_), behind = step;
#pragma unroll 1
    for (bool more = true; more;) {
      gate.wait();
      more = step.real(runs_);
      const bool work = __shfl_sync(kFullWarp, step.number > 0 && behind.has_contexts(), 0);
      if (work) add(behind);
      if (more) gate.arrive();
      if (work) store(behind);
      behind = step;
      step.advance(runs_);
    }
  }

 private:
  // Take in the gradients of a step's scores, which completes those of its oldest queries.
  __device__ __forceinline__ void add(const Step& step) {
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
  }
  __device__ __forceinline__ void store(const Step& step) {
    if (!step.owns_queries(0)) return;
    const auto& extent = runs_.extent;
    const int warp_row = static_cast<int>(threadIdx.x) % kGroup / 32 * 16;
    const int64_t t0 = static_cast<int64_t>(step.queries(0)) * kWalkTile + warp_row;
    walk_back(dq_[0], step.turn(shared_), warp_row);
    store_heads(static_cast<bf16*>(runs_.p.dq) + extent.token_at(step.b, t0, step.head), extent.width(),
                static_cast<int>(min(extent.time - t0, int64_t{16})), dq_[0]);
  }

  const Runs& runs_;
  WalkShared& shared_;
  Sums64 dq_[kSpan] = {};
};

}  // namespace mm_rec

#endif
