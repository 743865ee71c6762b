// memory_read, backward, from the side of what is read: a block owns 64 keys and values (of the window or of slots) and
// goes through tiles of the queries that may see them.
#ifndef MM_REC_MEMORY_READ_BACKWARD_KEYS_CUH
#define MM_REC_MEMORY_READ_BACKWARD_KEYS_CUH

#include "memory_read_backward.cuh"

namespace mm_rec {

// Which gradients a kernel adds up. Both at once don't fit in registers for the largest heads.
enum class Side { kBoth, kKeys, kValues };

template <typename Plan>
struct KeysShared {
  typename Plan::Own k, v;
  typename Plan::Other q, dout;
  float lse[Plan::kOther], inner[Plan::kOther];  // base 2
  float bias[Plan::kOwn];
  Visible<Plan::kOther> visible;
};

// If `Ahead`, a tile of queries is fetched while the one before is worked on.
template <typename T, typename Plan, Side kSide, bool Ahead>
struct KeyGradients {
  static constexpr bool kKeys = kSide != Side::kValues, kValues = kSide != Side::kKeys;
  typename Plan::Sums dk = {}, dv = {};
  typename Plan::OtherLoads q, dout;  // on their way, as lse (base 2) and inner of query `threadIdx.x`
  float lse = 0.0f, inner = 0.0f;
  float weighted_inner[2] = {0.0f, 0.0f};  // sums of weight * inner of this thread's two rows

  // Ask for the tile of queries from token t0 on.
  __device__ __forceinline__ void fetch(const ReadBackward& p, const MemoryExtent& extent, int64_t b, int64_t head,
                                        int64_t t0) {
    const int dim = extent.dim, tokens = static_cast<int>(min(extent.time - t0, int64_t{Plan::kOther}));
    const int64_t at = extent.token_at(b, t0, head);
    q.fetch(static_cast<const T*>(p.in.q) + at, extent.width(), tokens, dim);
    dout.fetch(static_cast<const T*>(p.dout) + at, extent.width(), tokens, dim);
    if (threadIdx.x < Plan::kOther) {
      const int64_t token = (b * extent.heads + head) * extent.time + t0 + threadIdx.x;
      const bool real = static_cast<int>(threadIdx.x) < tokens;
      lse = real ? p.lse[token] * kLog2e : 0.0f;
      inner = real ? p.inner[token] : 0.0f;
    }
  }

  // Take in the tile of queries from token t0 on; if `Ahead` it has been fetched, and so is the one from `next` on, if there
  // is one.
  // `seen(row, column)` says whether key `row` is seen by query `column`; `rotated` queries meet keys of the window,
  // whose distances count from context `origin`.
  template <bool Rotated, typename Seen>
  __device__ __forceinline__ void add(KeysShared<Plan>& shared, const ReadBackward& p, const MemoryExtent& extent,
                                      int64_t b, int64_t head, int64_t t0, int64_t next, int64_t origin,
                                      const Seen& seen) {
    const int dim = extent.dim, tokens = static_cast<int>(min(extent.time - t0, int64_t{Plan::kOther}));
    const float scale = rsqrtf(static_cast<float>(dim));
    if (!Ahead) fetch(p, extent, b, head, t0);
    if constexpr (Rotated) {
      q.put_rotated(shared.q, tokens, dim, p.in.rotary, static_cast<int>(extent.window + t0 - origin));
    } else {
      q.put(shared.q);
    }
    dout.put(shared.dout);
    if (threadIdx.x < Plan::kOther) {
      shared.lse[threadIdx.x] = lse;
      shared.inner[threadIdx.x] = inner;
    }
    __syncthreads();
    if (Ahead && next >= 0) fetch(p, extent, b, head, next);
    typename Plan::Scores weights = {};
    multiply<false, false, Plan::kDim>(weights, shared.k, Plan::own_row(), shared.q, 0);
#pragma unroll
    for (int n = 0; n < Plan::kOther / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = Plan::own_row() + fragment_row(i), column = fragment_column(n, i);
        const float score = weights[n][i] * (scale * kLog2e) + shared.bias[row];
        weights[n][i] = seen(row, column) ? exp2f(score - shared.lse[column]) : 0.0f;
      }
    }
    if constexpr (kValues) multiply<Plan::kSplit, true, Plan::kOther>(dv, weights, shared.dout, 0);
    if constexpr (kKeys) {
      typename Plan::Scores dscores = {};
      multiply<false, false, Plan::kDim>(dscores, shared.v, Plan::own_row(), shared.dout, 0);
#pragma unroll
      for (int n = 0; n < Plan::kOther / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float inner_product = shared.inner[fragment_column(n, i)];
          weighted_inner[i / 2] = fmaf(weights[n][i], inner_product, weighted_inner[i / 2]);
          dscores[n][i] = scale * weights[n][i] * (dscores[n][i] - inner_product);
        }
      }
      multiply<Plan::kSplit, true, Plan::kOther>(dk, dscores, shared.q, 0);
    }
    __syncthreads();
  }
};

}  // namespace mm_rec

#endif
