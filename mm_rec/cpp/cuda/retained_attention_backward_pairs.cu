// Attention over the retained pairs, backward: the gradients of the pairs from each run. A block owns 64 pairs of a run and goes
// through its queries.
#include "launch.cuh"
#include "retained_attention_backward.cuh"

namespace mm_rec {
namespace {

// Which gradients a kernel adds up. Both at once don't fit in registers for the largest heads.
enum class Side { kBoth, kKeys, kValues };

template <typename Plan>
struct Shared {
  typename Plan::Own k, v;
  typename Plan::Other q, dout;
  PairPlaces<Plan::kOwn> places;
  float lse[Plan::kOther], inner[Plan::kOther];  // base 2
};

// Put a tile of queries of a run, from the u0-th on, in shared memory.
template <typename T, typename Plan>
__device__ __forceinline__ void load_queries(Shared<Plan>& shared, const RetainedBackward& p, const RetainedRun& run, int u0) {
  const int64_t width = run.extent.width(), at = run.query_at(u0);
  const int tokens = run.tokens - u0, dim = run.extent.dim;
  typename Plan::OtherLoads q, dout;
  q.fetch(static_cast<const T*>(p.in.q) + at, width, tokens, dim);
  dout.fetch(static_cast<const T*>(p.dout) + at, width, tokens, dim);
  q.put(shared.q);
  dout.put(shared.dout);
  const int u = threadIdx.x;
  if (u >= Plan::kOther) return;
  shared.lse[u] = u < tokens ? p.lse[run.number_at(u0 + u)] * kLog2e : 0.0f;
  shared.inner[u] = u < tokens ? p.inner[run.number_at(u0 + u)] : 0.0f;
}

template <typename T, typename Plan, Side kSide>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks)
    pair_kernel(const RetainedBackward p, const RetainedExtent extent, const VisiblePairs visible,
                const PairGradients gradients) {
  constexpr bool kKeys = kSide != Side::kValues, kValues = kSide != Side::kKeys;
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const int64_t r = blockIdx.x;
  const RetainedRun run(p.in, extent, visible, gradients.first + blockIdx.y, r);
  const int first = static_cast<int>(blockIdx.z) * Plan::kOwn;
  if (first >= run.count) return;
  {
    PairLoads<T, Plan, Plan::kOwn> pairs;
    pairs.fetch(run, first);
    pairs.put(shared.k, shared.v, shared.places);
  }
  const int row[2] = {Plan::own_row() + fragment_row(0), Plan::own_row() + fragment_row(2)};
  typename Plan::Sums dk = {}, dv = {};
  float dscore[2] = {};
  for (int u0 = 0; u0 < run.tokens; u0 += Plan::kOther) {
    load_queries<T>(shared, p, run, u0);
    __syncthreads();
    typename Plan::Scores weights = {};
    multiply<false, false, Plan::kDim>(weights, shared.k, Plan::own_row(), shared.q, 0);
#pragma unroll
    for (int n = 0; n < Plan::kOther / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pair = row[i / 2], u = fragment_column(n, i);
        const float score = fmaf(weights[n][i], kLog2e, shared.places.score[pair]);
        weights[n][i] = shared.places.seen(pair, u0 + u) ? exp2f(score - shared.lse[u]) : 0.0f;
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
          dscores[n][i] = weights[n][i] * (dscores[n][i] - shared.inner[fragment_column(n, i)]);
          dscore[i / 2] += dscores[n][i];
        }
      }
      multiply<Plan::kSplit, true, Plan::kOther>(dk, dscores, shared.q, 0);
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = group_sum<4>(dscore[i]);
    if (first + row[i] >= run.count) continue;
    const int candidate = run.pairs[first + row[i]].candidate();
    const int64_t to = (blockIdx.y * extent.runs() + r) * extent.candidates() + candidate;
#pragma unroll
    for (int n = 0; n < Plan::kDim / 8; ++n) {
      if constexpr (kKeys) {
        Plan::store_columns(gradients.k + to * extent.dim, n, extent.dim, dk[n][2 * i], dk[n][2 * i + 1]);
      }
      if constexpr (kValues) {
        Plan::store_columns(gradients.v + to * extent.dim, n, extent.dim, dv[n][2 * i], dv[n][2 * i + 1]);
      }
    }
    if (kKeys && threadIdx.x % 4 == 0) gradients.score[to] = sum;
  }
}

template <typename T, int Dim>
struct PairGradient {
  using Plan = AttentionPlan<T, Dim>;

  template <Side kSide>
  static cudaError_t run_side(const RetainedBackward& p, const RetainedExtent& extent, const VisiblePairs& visible,
                              const PairGradients& gradients, void* stream) {
    const dim3 grid(static_cast<unsigned>(extent.runs()), static_cast<unsigned>(gradients.lines),
                    static_cast<unsigned>(ceil_div(extent.candidates(), Plan::kOwn)));
    return launch(pair_kernel<T, Plan, kSide>, grid, dim3(Plan::kThreads), sizeof(Shared<Plan>), stream, p, extent, visible,
                  gradients);
  }
  static cudaError_t run(const RetainedBackward& p, const RetainedExtent& extent, const VisiblePairs& visible,
                         const PairGradients& gradients, void* stream) {
    if constexpr (Dim <= 128) {
      return run_side<Side::kBoth>(p, extent, visible, gradients, stream);
    } else {
      const cudaError_t error = run_side<Side::kKeys>(p, extent, visible, gradients, stream);
      return error != cudaSuccess ? error : run_side<Side::kValues>(p, extent, visible, gradients, stream);
    }
  }
};

}  // namespace

cudaError_t retained_backward_pairs(const RetainedBackward& p, int64_t dtype, const RetainedExtent& extent,
                                    const VisiblePairs& visible, const PairGradients& gradients, void* stream) {
  return by_head_size<PairGradient>(dtype, extent.dim, p, extent, visible, gradients, stream);
}

}  // namespace mm_rec
