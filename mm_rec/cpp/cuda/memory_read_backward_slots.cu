// memory_read, backward: the gradients of the long-term memory, a block a version, head and tile of slots.
#include "launch.cuh"
#include "memory_read_backward_keys.cuh"

namespace mm_rec {
namespace {

template <typename T, typename Plan, Side kSide>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kBlocks)
    slot_kernel(const ReadBackward p, const MemoryExtent extent) {
  auto& shared = *reinterpret_cast<KeysShared<Plan>*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y, versions = extent.versions();
  const int version = static_cast<int>(blockIdx.x % versions), s0 = static_cast<int>(blockIdx.x / versions) * Plan::kOwn;
  const int dim = extent.dim, count = min(extent.slots - s0, Plan::kOwn);
  const int64_t first = extent.slots_at(b, version, head) + s0;  // row of slots
  Plan::fill_slots(shared.k, shared.v, shared.bias, p.in, first, count, dim);

  // The tokens of a version run from the one that wrote it to the one that writes the next.
  const int* event = p.in.index.event + b * extent.writes();
  const int64_t begin = version == 0 ? 0 : event[version - 1] >= 0 ? event[version - 1] : extent.time;
  const int64_t end = version < extent.writes() && event[version] >= 0 ? event[version] : extent.time;
  KeyGradients<T, Plan, kSide, false> sums;
  for (int64_t t0 = begin; t0 < end; t0 += Plan::kOther) {
    shared.visible.fill(p.in, extent, b, t0);
    const bool mine = threadIdx.x < Plan::kOther && shared.visible.version[threadIdx.x] == version;
    if (!__syncthreads_or(mine)) continue;  // as where a document has begun since
    sums.template add<false>(shared, p, extent, b, head, t0, -1, 0,
                             [&](int, int column) { return shared.visible.version[column] == version; });
  }

  // Through M_value / mass and the norm of M_key. A mass scales a weight and divides a value, so that of its gradient
  // only - sum weight * inner / mass is left.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = Plan::own_row() + fragment_row(2 * r);
    const bool real = row < count;
    const float mass = real ? p.in.mass[first + row] : 0.0f, inverse = mass > 0.0f ? 1.0f / mass : 1.0f;
    const auto at = [&](int n, int j) { return Plan::element(fragment_column(n, j), dim); };
    if constexpr (sums.kKeys) {
      float key[Plan::kDim / 8][2], squares = 0.0f, product = 0.0f;
#pragma unroll
      for (int n = 0; n < Plan::kDim / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          key[n][j] = real && at(n, j) < dim ? p.in.key[(first + row) * dim + at(n, j)] : 0.0f;
          squares = fmaf(key[n][j], key[n][j], squares);
          product = fmaf(key[n][j], sums.dk[n][2 * r + j], product);
        }
      }
      const float norm = rsqrtf(group_sum<4>(squares) / dim + kNormEps);
      const float slope = norm * norm * norm * group_sum<4>(product) / dim, inner = group_sum<4>(sums.weighted_inner[r]);
      if (real) {
        float* dkey = p.dkey + (first + row) * dim;
#pragma unroll
        for (int n = 0; n < Plan::kDim / 8; ++n) {
          Plan::store_columns(dkey, n, dim, norm * sums.dk[n][2 * r] - slope * key[n][0],
                              norm * sums.dk[n][2 * r + 1] - slope * key[n][1]);
        }
        if (threadIdx.x % 4 == 0) p.dmass[first + row] = mass > 0.0f ? -inner * inverse : 0.0f;
      }
    }
    if constexpr (sums.kValues) {
      float* dvalue = p.dvalue + (first + row) * dim;
#pragma unroll
      for (int n = 0; n < Plan::kDim / 8 && real; ++n) {
        Plan::store_columns(dvalue, n, dim, inverse * sums.dv[n][2 * r], inverse * sums.dv[n][2 * r + 1]);
      }
    }
  }
}

template <typename T, int Dim>
struct SlotGradient {
  using Plan = ReadPlan<T, Dim>;

  template <Side kSide>
  static cudaError_t run_side(const ReadBackward& p, const MemoryExtent& extent, void* stream) {
    const dim3 grid(static_cast<unsigned>(extent.versions() * ceil_div(extent.slots, Plan::kOwn)),
                    static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
    return launch(slot_kernel<T, Plan, kSide>, grid, dim3(Plan::kThreads), sizeof(KeysShared<Plan>), stream, p, extent);
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

cudaError_t read_backward_slots(const ReadBackward& p, int64_t dtype, const MemoryExtent& extent, void* stream) {
  return by_head_size<SlotGradient>(dtype, extent.dim, p, extent, stream);
}

}  // namespace mm_rec
