// window_attention, backward: the gradient of the queries, and the entry point of the whole backward pass.
#include "launch.cuh"
#include "window_attention_backward.cuh"
#include "window_walk.cuh"

namespace mm_rec {
namespace {

// inner = out . dout of each token and head, eight lanes each.
template <typename T>
__global__ void __launch_bounds__(256) inner_product_kernel(const AttentionBackward p, const WindowExtent extent) {
  const int64_t rows = extent.batch * extent.time * extent.heads;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) / 8;  // (b, t, head)
  float sum = 0.0f;
  for (int i = threadIdx.x % 8 * 8; i < extent.dim && row < rows; i += 64) {
    float x[8], y[8];
    load_eight(static_cast<const T*>(p.out) + row * extent.dim, i, extent.dim, x);
    load_eight(static_cast<const T*>(p.dout) + row * extent.dim, i, extent.dim, y);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(x[j], y[j], sum);
  }
  sum = group_sum<8>(sum);
  if (threadIdx.x % 8 != 0 || row >= rows) return;
  const int64_t head = row % extent.heads, t = row / extent.heads % extent.time, b = row / extent.heads / extent.time;
  p.inner[(b * extent.heads + head) * extent.time + t] = sum;
}

template <typename Plan>
struct Shared {
  typename Plan::Own q, dout;
  typename Plan::Other k, v;
  Visible<Plan::kOwn> visible;
};

template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks)
    query_kernel(const AttentionBackward p, const WindowExtent extent) {
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const AttentionInputs& in = p.in;
  const int64_t b = blockIdx.z, head = blockIdx.y, t0 = static_cast<int64_t>(blockIdx.x) * Plan::kOwn;
  const int dim = extent.dim, window = extent.window, tokens = static_cast<int>(min(extent.time - t0, int64_t{Plan::kOwn}));
  const int64_t at = extent.token_at(b, t0, head);

  typename Plan::OwnLoads queries, douts;
  queries.fetch(static_cast<const T*>(in.q) + at, extent.width(), tokens, dim);
  douts.fetch(static_cast<const T*>(p.dout) + at, extent.width(), tokens, dim);
  queries.put_rotated(shared.q, tokens, dim, in.rotary, window - 1);
  douts.put(shared.dout);
  shared.visible.fill(in, extent, b, t0);
  const int row[2] = {Plan::own_row() + fragment_row(0), Plan::own_row() + fragment_row(2)};
  float lse[2] = {}, inner[2] = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row[r] >= tokens) continue;
    const int64_t token = (b * extent.heads + head) * extent.time + t0 + row[r];
    lse[r] = p.lse[token] * kLog2e;
    inner[r] = p.inner[token];
  }
  __syncthreads();
  const int first = shared.visible.first();

  // dq += dscores keys, with scores in base 2, -inf for what is not seen.
  typename Plan::Sums dq = {};
  const auto add = [&](typename Plan::Scores& scores) {
    typename Plan::Scores dscores = {};
    multiply<false, false, Plan::kDim>(dscores, shared.dout, Plan::own_row(), shared.v, 0);
#pragma unroll
    for (int n = 0; n < Plan::kOther / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        dscores[n][i] = exp2f(scores[n][i] - lse[i / 2]) * (dscores[n][i] - inner[i / 2]);
      }
    }
    multiply<Plan::kSplit, true, Plan::kOther>(dq, dscores, shared.k, 0);
  };

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
    add(scores);
    __syncthreads();
  }
  Plan::rotate_back(dq, tokens, dim, in.rotary, window - 1);

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (row[r] >= tokens) continue;
    T* target = static_cast<T*>(p.dq) + at + row[r] * extent.width();
#pragma unroll
    for (int n = 0; n < Plan::kDim / 8; ++n) Plan::store_columns(target, n, dim, dq[n][2 * r], dq[n][2 * r + 1]);
  }
}

template <typename T, int Dim>
struct QueryGradient {
  static cudaError_t run(const AttentionBackward& p, const WindowExtent& extent, void* stream) {
    using Plan = AttentionPlan<T, Dim>;
    const int64_t rows = extent.batch * extent.time * extent.heads;
    const cudaError_t error = launch(inner_product_kernel<T>, dim3(static_cast<unsigned>(ceil_div(rows, 32))), dim3(256),
                                     0, stream, p, extent);
    if (error != cudaSuccess) return error;
    const dim3 grid(static_cast<unsigned>(ceil_div(extent.time, Plan::kOwn)), static_cast<unsigned>(extent.heads),
                    static_cast<unsigned>(extent.batch));
    return launch(query_kernel<T, Plan>, grid, dim3(Plan::kThreads), sizeof(Shared<Plan>), stream, p, extent);
  }
};

}  // namespace

cudaError_t attention_backward_queries(const AttentionBackward& p, int64_t dtype, const WindowExtent& extent, void* stream) {
  return by_head_size<QueryGradient>(dtype, extent.dim, p, extent, stream);
}

}  // namespace mm_rec

// `inner` (B, H, T) receives the product out . dout of each token and head.
extern "C" int mm_rec_cuda_window_attention_backward(const void* dout, const void* out, const float* lse,
                                                     const void* q, const void* k, const void* v, int64_t dtype,
                                                     const int64_t* position, const float* rotary, void* dq, void* dk,
                                                     void* dv, float* inner, int64_t batch, int64_t time,
                                                     int64_t heads, int64_t dim, int64_t window, void* stream) {
  using namespace mm_rec;
  const WindowExtent extent{batch, time, heads, static_cast<int>(dim), static_cast<int>(window)};
  const AttentionBackward p{{q, k, v, position, rotary}, out, dout, lse, inner, dq, dk, dv};
  if (walks_backward(dtype, extent)) return walk_backward(p, extent, stream);
  const cudaError_t error = attention_backward_queries(p, dtype, extent, stream);
  return error == cudaSuccess ? attention_backward_keys(p, dtype, extent, stream) : error;
}
