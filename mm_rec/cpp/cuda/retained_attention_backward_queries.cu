// Attention over the retained pairs, backward: the gradient of the queries, and the entry points of the whole backward pass.
#include "launch.cuh"
#include "retained_attention_backward.cuh"

namespace mm_rec {
namespace {

// The gradients of pairs from all runs of a group of heads of sequences take no more than that, so that most stay in the
// second-level cache until they are summed up; one head may take more.
constexpr int64_t kGradientBytes = int64_t{64} << 20;

template <typename Plan>
struct Shared {
  typename Plan::Own q, dout;
  typename Plan::Other k, v;
  PairPlaces<Plan::kOther> places;
};

template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks)
    query_kernel(const RetainedBackward p, const RetainedExtent extent, const VisiblePairs visible) {
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const RetainedRun run(p.in, extent, visible, blockIdx.y, blockIdx.x);
  if (run.count == 0) return;
  const int dim = extent.dim;
  typename Plan::OwnLoads queries, douts;
  queries.fetch(static_cast<const T*>(p.in.q) + run.query_at(0), extent.width(), run.tokens, dim);
  douts.fetch(static_cast<const T*>(p.dout) + run.query_at(0), extent.width(), run.tokens, dim);
  queries.put(shared.q);
  douts.put(shared.dout);
  const int row[2] = {Plan::own_row() + fragment_row(0), Plan::own_row() + fragment_row(2)};
  float lse[2] = {}, inner[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row[r] >= run.tokens) continue;
    lse[r] = p.lse[run.number_at(row[r])] * kLog2e;
    inner[r] = p.inner[run.number_at(row[r])];
  }

  typename Plan::Sums dq = {};
  PairLoads<T, Plan, Plan::kOther> pairs;
  pairs.fetch(run, 0);
  for (int first = 0; first < run.count; first += Plan::kOther) {
    if (!Plan::kAhead && first > 0) pairs.fetch(run, first);
    pairs.put(shared.k, shared.v, shared.places);
    __syncthreads();
    if (Plan::kAhead && first + Plan::kOther < run.count) pairs.fetch(run, first + Plan::kOther);
    typename Plan::Scores scores = {}, dscores = {};
    multiply<false, false, Plan::kDim>(scores, shared.q, Plan::own_row(), shared.k, 0);
    add_scores<Plan>(scores, shared.places);
    multiply<false, false, Plan::kDim>(dscores, shared.dout, Plan::own_row(), shared.v, 0);
#pragma unroll
    for (int n = 0; n < Plan::kOther / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dscores[n][i] = exp2f(scores[n][i] - lse[i / 2]) * (dscores[n][i] - inner[i / 2]);
      }
    }
    multiply<Plan::kSplit, true, Plan::kOther>(dq, dscores, shared.k, 0);
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row[r] >= run.tokens) continue;
    T* target = static_cast<T*>(p.dq) + run.query_at(row[r]);
#pragma unroll
    for (int n = 0; n < Plan::kDim / 8; ++n) {
      float pair[2];
      Plan::load_columns(target, n, dim, pair);
      Plan::store_columns(target, n, dim, pair[0] + dq[n][2 * r], pair[1] + dq[n][2 * r + 1]);
    }
  }
}

template <typename T, int Dim>
struct QueryGradient {
  static cudaError_t run(const RetainedBackward& p, const RetainedExtent& extent, const VisiblePairs& visible, void* stream) {
    using Plan = AttentionPlan<T, Dim>;
    const dim3 grid(static_cast<unsigned>(extent.runs()), static_cast<unsigned>(extent.lines()));
    return launch(query_kernel<T, Plan>, grid, dim3(Plan::kThreads), sizeof(Shared<Plan>), stream, p, extent, visible);
  }
};

// Heads of sequences whose pairs' gradients are in scratch memory at a time.
int64_t group_size(const RetainedExtent& extent) {
  const int64_t fit = kGradientBytes / PairGradients::bytes_a_line(extent);
  return fit < 1 ? 1 : fit < extent.lines() ? fit : extent.lines();
}

}  // namespace

cudaError_t retained_backward_queries(const RetainedBackward& p, int64_t dtype, const RetainedExtent& extent,
                                      const VisiblePairs& visible, void* stream) {
  return by_head_size<QueryGradient>(dtype, extent.dim, p, extent, visible, stream);
}

}  // namespace mm_rec

// Bytes.
extern "C" int64_t mm_rec_cuda_retained_attention_backward_workspace(int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                                                     int64_t window, int64_t slots) {
  using namespace mm_rec;
  const RetainedExtent extent{{batch, time, heads, static_cast<int>(dim), static_cast<int>(window)}, static_cast<int>(slots)};
  return VisiblePairs::bytes(extent) + group_size(extent) * PairGradients::bytes_a_line(extent);
}

// `lse` and `inner` (B, H, T) are the log of the denominator of the whole softmax, and the product of its result and `dout`. dq, dk and
// dv hold the gradients from the window, and then all; the other gradients are written.
extern "C" int mm_rec_cuda_retained_attention_backward(
    const void* dout, const float* lse, const float* inner, const void* q, const void* k, const void* v, const void* kept_k,
    const void* kept_v, int64_t dtype, const float* score, const float* kept_score, const int* slot, const int* held,
    const int64_t* position, void* dq, void* dk, void* dv, float* dscore, void* dkept_k, void* dkept_v, float* dkept_score,
    void* workspace, int64_t batch, int64_t time, int64_t heads, int64_t dim, int64_t window, int64_t slots, void* stream) {
  using namespace mm_rec;
  const RetainedExtent extent{{batch, time, heads, static_cast<int>(dim), static_cast<int>(window)}, static_cast<int>(slots)};
  const RetainedInputs in{q, k, v, kept_k, kept_v, score, kept_score, slot, held, position};
  const RetainedBackward p{in, dout, lse, inner, dq, dk, dv, dscore, dkept_k, dkept_v, dkept_score};
  const VisiblePairs visible(workspace, extent);
  void* rest = static_cast<char*>(workspace) + VisiblePairs::bytes(extent);
  cudaError_t error = find_visible_pairs(in, extent, visible, stream);
  if (error == cudaSuccess) error = retained_backward_queries(p, dtype, extent, visible, stream);
  const int64_t group = group_size(extent);
  for (int64_t first = 0; first < extent.lines() && error == cudaSuccess; first += group) {
    const int64_t left = extent.lines() - first;
    const PairGradients gradients(rest, extent, first, left < group ? left : group);
    error = retained_backward_pairs(p, dtype, extent, visible, gradients, stream);
    if (error == cudaSuccess) error = retained_backward_sums(p, dtype, extent, gradients, stream);
  }
  return error;
}
