// Attention over the retained pairs, forward: the softmax over the window goes on over the pairs of a run.
#include "launch.cuh"
#include "retained_attention.cuh"

namespace mm_rec {
namespace {

template <typename Plan>
struct Shared {
  typename Plan::Own q;
  typename Plan::Other k, v;
  PairPlaces<Plan::kOther> places;
};

template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks)
    forward_kernel(const RetainedInputs in, const RetainedExtent extent, const VisiblePairs visible, T* out, float* lse) {
  static_assert(Plan::kOwn == kRun, "a block has a run");
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const RetainedRun run(in, extent, visible, blockIdx.y, blockIdx.x);
  if (run.count == 0) return;
  const int dim = extent.dim;
  typename Plan::OwnLoads queries;
  queries.fetch(static_cast<const T*>(in.q) + run.query_at(0), extent.width(), run.tokens, dim);
  queries.put(shared.q);

  const int row[2] = {Plan::own_row() + fragment_row(0), Plan::own_row() + fragment_row(2)};
  OnlineSoftmax<Plan> running;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row[r] >= run.tokens) continue;
    running.top[r] = lse[run.number_at(row[r])] * kLog2e;
    running.total[r] = 1.0f;
    const T* from = out + run.query_at(row[r]);
#pragma unroll
    for (int n = 0; n < Plan::kDim / 8; ++n) {
      float pair[2];
      Plan::load_columns(from, n, dim, pair);
      running.sum[n][2 * r] = pair[0];
      running.sum[n][2 * r + 1] = pair[1];
    }
  }

  PairLoads<T, Plan, Plan::kOther> pairs;
  pairs.fetch(run, 0);
  for (int first = 0; first < run.count; first += Plan::kOther) {
    if (!Plan::kAhead && first > 0) pairs.fetch(run, first);
    pairs.put(shared.k, shared.v, shared.places);
    __syncthreads();
    if (Plan::kAhead && first + Plan::kOther < run.count) pairs.fetch(run, first + Plan::kOther);
    typename Plan::Scores scores = {};
    multiply<false, false, Plan::kDim>(scores, shared.q, Plan::own_row(), shared.k, 0);
    add_scores<Plan>(scores, shared.places);
    running.add(scores, shared.v);
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row[r] >= run.tokens) continue;
    const float inverse = 1.0f / running.total[r];
    T* target = out + run.query_at(row[r]);
#pragma unroll
    for (int n = 0; n < Plan::kDim / 8; ++n) {
      Plan::store_columns(target, n, dim, running.sum[n][2 * r] * inverse, running.sum[n][2 * r + 1] * inverse);
    }
    if (threadIdx.x % 4 == 0) {
      lse[run.number_at(row[r])] = (running.top[r] + __log2f(running.total[r])) / kLog2e;
    }
  }
}

template <typename T, int Dim>
struct Forward {
  static cudaError_t run(const RetainedInputs& in, const RetainedExtent& extent, const VisiblePairs& visible, void* out,
                         float* lse, void* stream) {
    using Plan = AttentionPlan<T, Dim>;
    const dim3 grid(static_cast<unsigned>(extent.runs()), static_cast<unsigned>(extent.lines()));
    return launch(forward_kernel<T, Plan>, grid, dim3(Plan::kThreads), sizeof(Shared<Plan>), stream, in, extent, visible,
                  static_cast<T*>(out), lse);
  }
};

}  // namespace
}  // namespace mm_rec

// Bytes.
extern "C" int64_t mm_rec_cuda_retained_attention_forward_workspace(int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                                                    int64_t window, int64_t slots) {
  using namespace mm_rec;
  return VisiblePairs::bytes({{batch, time, heads, static_cast<int>(dim), static_cast<int>(window)}, static_cast<int>(slots)});
}

// `out` (B, T, H, d) and `lse` (B, H, T) hold the result and the log of the denominator of the softmax over the window, and then
// those of the softmax over the window and the pairs.
extern "C" int mm_rec_cuda_retained_attention_forward(const void* q, const void* k, const void* v, const void* kept_k,
                                                      const void* kept_v, int64_t dtype, const float* score,
                                                      const float* kept_score, const int* slot, const int* held,
                                                      const int64_t* position, void* out, float* lse, void* workspace,
                                                      int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                                      int64_t window, int64_t slots, void* stream) {
  using namespace mm_rec;
  const RetainedExtent extent{{batch, time, heads, static_cast<int>(dim), static_cast<int>(window)}, static_cast<int>(slots)};
  const RetainedInputs in{q, k, v, kept_k, kept_v, score, kept_score, slot, held, position};
  const VisiblePairs visible(workspace, extent);
  const cudaError_t error = find_visible_pairs(in, extent, visible, stream);
  return error != cudaSuccess ? error : by_head_size<Forward>(dtype, extent.dim, in, extent, visible, out, lse, stream);
}
