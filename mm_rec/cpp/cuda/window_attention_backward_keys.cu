// window_attention, backward: the gradients of k and v. A block owns 64 keys and values and goes through tiles of the queries that
// may see them.
#include "launch.cuh"
#include "window_attention_backward.cuh"

namespace mm_rec {
namespace {

// Which gradients a kernel adds up. Both at once don't fit in registers for the largest heads.
enum class Side { kBoth, kKeys, kValues };

template <typename Plan>
struct KeysShared {
  typename Plan::Own k, v;
  typename Plan::Other q, dout;
  float lse[Plan::kOther], inner[Plan::kOther];  // base 2
  Visible<Plan::kOther> visible;
};

// If `Ahead`, a tile of queries is fetched while the one before is worked on.
template <typename T, typename Plan, Side kSide, bool Ahead>
struct KeyGradients {
  static constexpr bool kKeys = kSide != Side::kValues, kValues = kSide != Side::kKeys;
  typename Plan::Sums dk = {}, dv = {};
  typename Plan::OtherLoads q, dout;  // on their way, as lse (base 2) and inner of query `threadIdx.x`
  float lse = 0.0f, inner = 0.0f;

  // Ask for the tile of queries from token t0 on.
  __device__ __forceinline__ void fetch(const AttentionBackward& p, const WindowExtent& extent, int64_t b, int64_t head,
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
  // `seen(row, column)` says whether key `row` is seen by query `column`; distances count from context `origin`.
  template <typename Seen>
  __device__ __forceinline__ void add(KeysShared<Plan>& shared, const AttentionBackward& p, const WindowExtent& extent,
                                      int64_t b, int64_t head, int64_t t0, int64_t next, int64_t origin,
                                      const Seen& seen) {
    const int dim = extent.dim, tokens = static_cast<int>(min(extent.time - t0, int64_t{Plan::kOther}));
    if (!Ahead) fetch(p, extent, b, head, t0);
    q.put_rotated(shared.q, tokens, dim, p.in.rotary, static_cast<int>(extent.window + t0 - origin));
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
        const float score = weights[n][i] * kLog2e;
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
          dscores[n][i] = weights[n][i] * (dscores[n][i] - shared.inner[fragment_column(n, i)]);
        }
      }
      multiply<Plan::kSplit, true, Plan::kOther>(dk, dscores, shared.q, 0);
    }
    __syncthreads();
  }
};

template <typename T, typename Plan, Side kSide>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks)
    key_kernel(const AttentionBackward p, const WindowExtent extent) {
  auto& shared = *reinterpret_cast<KeysShared<Plan>*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y, c0 = static_cast<int64_t>(blockIdx.x) * Plan::kOwn;
  const int dim = extent.dim, window = extent.window;
  const int count = static_cast<int>(min(extent.context() - c0, int64_t{Plan::kOwn}));
  const int64_t at = extent.context_at(b, c0, head);
  {
    typename Plan::OwnLoads k, v;
    k.fetch(static_cast<const T*>(p.in.k) + at, extent.width(), count, dim);
    v.fetch(static_cast<const T*>(p.in.v) + at, extent.width(), count, dim);
    k.put_rotated(shared.k, count, dim, p.in.rotary, 0);
    v.put(shared.v);
  }

  KeyGradients<T, Plan, kSide, Plan::kAhead> sums;
  // Context c is seen by the tokens c - W (itself) to c - 1.
  const int64_t begin = max(c0 - window, int64_t{0}), end = min(c0 + count - 1, extent.time);
  if (Plan::kAhead && begin < end) sums.fetch(p, extent, b, head, begin);
  for (int64_t t0 = begin; t0 < end; t0 += Plan::kOther) {
    shared.visible.fill(p.in, extent, b, t0);
    const int64_t next = t0 + Plan::kOther < end ? t0 + Plan::kOther : -1;
    sums.add(shared, p, extent, b, head, t0, next, c0, [&](int row, int column) {
      const int64_t c = c0 + row;
      return c >= shared.visible.low[column] && c <= window + t0 + column;
    });
  }

  if constexpr (sums.kKeys) Plan::rotate_back(sums.dk, count, dim, p.in.rotary, 0);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = Plan::own_row() + fragment_row(2 * r);
    if (row >= count) continue;
    const int64_t to = at + row * extent.width();
#pragma unroll
    for (int n = 0; n < Plan::kDim / 8; ++n) {
      if constexpr (sums.kKeys) {
        Plan::store_columns(static_cast<T*>(p.dk) + to, n, dim, sums.dk[n][2 * r], sums.dk[n][2 * r + 1]);
      }
      if constexpr (sums.kValues) {
        Plan::store_columns(static_cast<T*>(p.dv) + to, n, dim, sums.dv[n][2 * r], sums.dv[n][2 * r + 1]);
      }
    }
  }
}

template <typename T, int Dim>
struct KeyAndValueGradients {
  using Plan = AttentionPlan<T, Dim>;

  template <Side kSide>
  static cudaError_t run_side(const AttentionBackward& p, const WindowExtent& extent, void* stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(extent.context(), Plan::kOwn)), static_cast<unsigned>(extent.heads),
                    static_cast<unsigned>(extent.batch));
    return launch(key_kernel<T, Plan, kSide>, grid, dim3(Plan::kThreads), sizeof(KeysShared<Plan>), stream, p, extent);
  }
  static cudaError_t run(const AttentionBackward& p, const WindowExtent& extent, void* stream) {
    if constexpr (Dim <= 128) {
      return run_side<Side::kBoth>(p, extent, stream);
    } else {
      const cudaError_t error = run_side<Side::kKeys>(p, extent, stream);
      return error != cudaSuccess ? error : run_side<Side::kValues>(p, extent, stream);
    }
  }
};

}  // namespace

cudaError_t attention_backward_keys(const AttentionBackward& p, int64_t dtype, const WindowExtent& extent, void* stream) {
  return by_head_size<KeyAndValueGradients>(dtype, extent.dim, p, extent, stream);
}

}  // namespace mm_rec
