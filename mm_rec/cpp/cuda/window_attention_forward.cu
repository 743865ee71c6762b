// window_attention, forward: one online softmax over the window.
#include "launch.cuh"
#include "window_walk.cuh"

namespace mm_rec {
namespace {

template <typename Plan>
struct Shared {
  typename Plan::Own q;
  typename Plan::Other k, v;
  Visible<Plan::kOwn> visible;
};

template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks)
    forward_kernel(const AttentionInputs in, T* __restrict__ out, float* __restrict__ lse, const WindowExtent extent) {
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y, t0 = static_cast<int64_t>(blockIdx.x) * Plan::kOwn;
  const int dim = extent.dim, window = extent.window, tokens = static_cast<int>(min(extent.time - t0, int64_t{Plan::kOwn}));
  const T* q = static_cast<const T*>(in.q) + extent.token_at(b, t0, head);

  // Distances count from the oldest context that the first token could see, t0 + 1.
  typename Plan::OwnLoads queries;
  queries.fetch(q, extent.width(), tokens, dim);
  queries.put_rotated(shared.q, tokens, dim, in.rotary, window - 1);
  shared.visible.fill(in, extent, b, t0);
  __syncthreads();
  const int first = shared.visible.first();

  OnlineSoftmax<Plan> running;
  const int row[2] = {Plan::own_row() + fragment_row(0), Plan::own_row() + fragment_row(2)};
  const int end = static_cast<int>(window + t0 + tokens);
  typename Plan::OtherLoads k, v;
  const auto fetch = [&](int c0) {
    const int64_t from = extent.context_at(b, c0, head);
    k.fetch(static_cast<const T*>(in.k) + from, extent.width(), end - c0, dim);
    v.fetch(static_cast<const T*>(in.v) + from, extent.width(), end - c0, dim);
  };
  fetch(first);
  for (int c0 = first; c0 < end; c0 += Plan::kOther) {
    if (!Plan::kAhead && c0 > first) fetch(c0);
    k.put_rotated(shared.k, end - c0, dim, in.rotary, static_cast<int>(c0 - t0 - 1));
    v.put(shared.v);
    __syncthreads();
    if (Plan::kAhead && c0 + Plan::kOther < end) fetch(c0 + Plan::kOther);
    typename Plan::Scores scores = {};
    multiply<false, false, Plan::kDim>(scores, shared.q, Plan::own_row(), shared.k, 0);
#pragma unroll
    for (int n = 0; n < Plan::kOther / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = c0 + fragment_column(n, i), r = row[i / 2];
        const bool seen = c >= shared.visible.low[r] && c <= window + t0 + r;
        scores[n][i] = seen ? scores[n][i] * kLog2e : -INFINITY;
      }
    }
    running.add(scores, shared.v);
    __syncthreads();
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t t = t0 + row[r];
    if (t >= extent.time) continue;
    const float inverse = 1.0f / running.total[r];
    T* target = out + extent.token_at(b, t, head);
#pragma unroll
    for (int n = 0; n < Plan::kDim / 8; ++n) {
      Plan::store_columns(target, n, dim, running.sum[n][2 * r] * inverse, running.sum[n][2 * r + 1] * inverse);
    }
    if (threadIdx.x % 4 == 0) {
      lse[(b * extent.heads + head) * extent.time + t] = (running.top[r] + __log2f(running.total[r])) / kLog2e;
    }
  }
}

template <typename T, int Dim>
struct Forward {
  static cudaError_t run(const AttentionInputs& in, void* out, float* lse, const WindowExtent& extent, void* stream) {
    using Plan = AttentionPlan<T, Dim>;
    const dim3 grid(static_cast<unsigned>(ceil_div(extent.time, Plan::kOwn)), static_cast<unsigned>(extent.heads),
                    static_cast<unsigned>(extent.batch));
    return launch(forward_kernel<T, Plan>, grid, dim3(Plan::kThreads), sizeof(Shared<Plan>), stream, in,
                  static_cast<T*>(out), lse, extent);
  }
};

}  // namespace
}  // namespace mm_rec

extern "C" int mm_rec_cuda_window_attention_forward(const void* q, const void* k, const void* v, int64_t dtype,
                                                    const int64_t* position, const float* rotary, void* out, float* lse,
                                                    int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                                    int64_t window, void* stream) {
  using namespace mm_rec;
  const WindowExtent extent{batch, time, heads, static_cast<int>(dim), static_cast<int>(window)};
  const AttentionInputs in{q, k, v, position, rotary};
  if (walks(dtype, extent)) return walk_forward(in, out, lse, extent, stream);
  return by_head_size<Forward>(dtype, extent.dim, in, out, lse, extent, stream);
}
