// memory_read, backward: the gradients of k and v, as the window sees them.
#include "launch.cuh"
#include "memory_read_backward_keys.cuh"

namespace mm_rec {
namespace {

template <typename T, typename Plan, Side kSide>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks)
    window_kernel(const ReadBackward p, const MemoryExtent extent) {
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
  for (int i = threadIdx.x; i < Plan::kOwn; i += Plan::kThreads) shared.bias[i] = 0.0f;

  KeyGradients<T, Plan, kSide, Plan::kAhead> sums;
  // Context c is seen by the tokens c - W (itself) to c - 1.
  const int64_t begin = max(c0 - window, int64_t{0}), end = min(c0 + count - 1, extent.time);
  if (Plan::kAhead && begin < end) sums.fetch(p, extent, b, head, begin);
  for (int64_t t0 = begin; t0 < end; t0 += Plan::kOther) {
    shared.visible.fill(p.in, extent, b, t0);
    const int64_t next = t0 + Plan::kOther < end ? t0 + Plan::kOther : -1;
    sums.template add<true>(shared, p, extent, b, head, t0, next, c0, [&](int row, int column) {
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
struct WindowGradient {
  using Plan = ReadPlan<T, Dim>;

  template <Side kSide>
  static cudaError_t run_side(const ReadBackward& p, const MemoryExtent& extent, void* stream) {
    const dim3 grid(static_cast<unsigned>(ceil_div(extent.context(), Plan::kOwn)), static_cast<unsigned>(extent.heads),
                    static_cast<unsigned>(extent.batch));
    return launch(window_kernel<T, Plan, kSide>, grid, dim3(Plan::kThreads), sizeof(KeysShared<Plan>), stream, p, extent);
  }
  static cudaError_t run(const ReadBackward& p, const MemoryExtent& extent, void* stream) {
    if constexpr (Dim <= 128) {
      return run_side<Side::kBoth>(p, extent, stream);
    } else {
      const cudaError_t error = run_side<Side::kKeys>(p, extent, stream);
      return error != cudaSuccess ? error : run_side<Side::kValues>(p, extent, stream);
    }
  }
};

}  // namespace

cudaError_t read_backward_window(const ReadBackward& p, int64_t dtype, const MemoryExtent& extent, void* stream) {
  return by_head_size<WindowGradient>(dtype, extent.dim, p, extent, stream);
}

}  // namespace mm_rec
