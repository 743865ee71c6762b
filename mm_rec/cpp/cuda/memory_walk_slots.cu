// memory_read, backward, for the sizes of most models: the gradients of the slots, a block a version and head. Up to P tokens
// see a version, from the one that wrote it on, so they fit in one tile. Their queries' gradients are added to those of the
// window.
#include "launch.cuh"
#include "memory_read_backward.cuh"
#include "memory_walk_rows.cuh"

namespace mm_rec {
namespace {

constexpr int kThreads = 128, kResident = 3;  // with four, registers would be spilled

struct Shared {
  WalkTile key, value, q, dout, dscores;  // (slot, query)
  float bias[kWalkTile];                  // of slots: logarithm of the mass in base 2, -inf without mass, ...
  float norm[kWalkTile];                  // ... factor that norms the key, ...
  float inverse[kWalkTile];               // ... factor of the value, 0 for what is not there
  float2 stat[kWalkTile];                 // of queries: denominator in base 2, inner
};

// Of the rows of slots from `row` on, `count` of them.
__device__ __forceinline__ void clear(const ReadBackward& p, int64_t row, int count) {
  const float zeros[4] = {};
  for (int i = threadIdx.x * 4; i < count * kWalkDim; i += kThreads * 4) {
    store<4>(p.dkey + row * kWalkDim + i, zeros);
    store<4>(p.dvalue + row * kWalkDim + i, zeros);
  }
  for (int i = threadIdx.x; i < count; i += kThreads) p.dmass[row + i] = 0.0f;
}

// Slots from row `first` on: keys normed, values divided by their mass.
__device__ __forceinline__ void fill_slots(Shared& shared, const ReadInputs& in, int64_t first, int count) {
  typename WalkPlan::RowLoads<kWalkTile, float> key, value;
  key.fetch(in.key + first * kWalkDim, kWalkDim, count, kWalkDim);
  value.fetch(in.value + first * kWalkDim, kWalkDim, count, kWalkDim);
  float mass[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = static_cast<int>(threadIdx.x + i * kThreads) / 8;
    mass[i] = row < count ? in.mass[first + row] : 0.0f;
  }
  key.each([&](int i, int row, int column, float(&a)[4], float(&b)[4]) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) squares = fmaf(a[j], a[j], fmaf(b[j], b[j], squares));
    const float norm = rsqrtf(group_sum<8>(squares) / kWalkDim + kNormEps);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a[j] *= norm;
      b[j] *= norm;
    }
    shared.key.set(row, column, a);
    shared.key.set(row, kWalkDim / 2 + column, b);
    if (threadIdx.x % 8 != 0) return;
    shared.norm[row] = norm;
    shared.bias[row] = mass[i] > 0.0f ? __log2f(mass[i]) : -INFINITY;
    shared.inverse[row] = mass[i] > 0.0f ? 1.0f / mass[i] : 0.0f;
  });
  value.each([&](int i, int row, int column, float(&a)[4], float(&b)[4]) {
    const float scale = mass[i] > 0.0f ? 1.0f / mass[i] : 1.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      a[j] *= scale;
      b[j] *= scale;
    }
    shared.value.set(row, column, a);
    shared.value.set(row, kWalkDim / 2 + column, b);
  });
}

__global__ void __launch_bounds__(kThreads, kResident) slot_kernel(const ReadBackward p, const MemoryExtent extent) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y, width = extent.width();
  const int version = static_cast<int>(blockIdx.x), count = extent.slots, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int64_t slot0 = extent.slots_at(b, version, head);
  const int written = version == 0 ? 0 : p.in.index.event[b * extent.writes() + version - 1];

  // The tokens that see this version come one after the other.
  const int64_t t = static_cast<int64_t>(written) + threadIdx.x;
  bool sees = written >= 0 && threadIdx.x < kWalkTile && t < extent.time;
  if (sees) {
    const int64_t at = b * extent.time + t;
    sees = p.in.index.version[at] == version && p.in.position[at] >= extent.window;
  }
  const int tokens = __syncthreads_count(sees);
  if (tokens == 0) {
    clear(p, slot0, count);
    return;
  }
  const int64_t at = extent.token_at(b, written, head), line = (b * extent.heads + head) * extent.time + written;
  walk_copy(shared.q.hi, static_cast<const bf16*>(p.in.q) + at, width, tokens);
  walk_copy(shared.dout.hi, static_cast<const bf16*>(p.dout) + at, width, tokens);
  cp_async_commit();
  if (threadIdx.x < kWalkTile) {  // queries that are not there have no weights
    const bool real = static_cast<int>(threadIdx.x) < tokens;
    shared.stat[threadIdx.x] = real ? make_float2(p.lse[line + threadIdx.x] * kLog2e, p.inner[line + threadIdx.x])
                                    : make_float2(INFINITY, 0.0f);
  }
  fill_slots(shared, p.in, slot0, count);
  cp_async_wait<0>();
  __syncthreads();

  // A warp has 16 slots and goes through the queries, 16 at a time.
  Left<false> key[kWalkDim / 16], value[kWalkDim / 16];
#pragma unroll
  for (int k = 0; k < kWalkDim / 16; ++k) {
    key[k] = load_left<false>(shared.key, warp_row, 16 * k);
    value[k] = load_left<false>(shared.value, warp_row, 16 * k);
  }
  Fragments<kWalkDim / 8> dk = {}, dv = {};
  float weighted_inner[2] = {0.0f, 0.0f};
#pragma unroll 1
  for (int n = 0; n < kWalkTile && n < tokens; n += 16) {
    Fragments<2> weight = {}, dscore = {};
#pragma unroll
    for (int k = 0; k < kWalkDim; k += 16) {
      multiply_step<false>(weight, key[k / 16], shared.q, n, k);
      multiply_step<false>(dscore, value[k / 16], shared.dout, n, k);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float2 stat = shared.stat[n + fragment_column(e / 4, e % 4)];
      const float bias = shared.bias[warp_row + fragment_row(e % 4)];
      float& w = weight[e / 4][e % 4];
      w = exp2f(fmaf(w, kWalkScale * kLog2e, bias) - stat.x);
      weighted_inner[e % 4 / 2] = fmaf(w, stat.y, weighted_inner[e % 4 / 2]);
      dscore[e / 4][e % 4] = w * (dscore[e / 4][e % 4] - stat.y);
    }
    const Left<false> left = to_left<false>(dscore, 0);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int to = (warp_row + fragment_row(e % 2 * 2)) * WalkTile::kStride + n + fragment_column(e / 2, 0);
      *reinterpret_cast<uint32_t*>(shared.dscores.hi + to) = left.hi[e];
    }
    multiply_step<true>(dv, to_left<false>(weight, 0), shared.dout, 0, n);
    multiply_step<true>(dk, left, shared.q, 0, n);
  }
  __syncthreads();

  if (warp_row < tokens) {
    Fragments<kWalkDim / 8> dq = {};
    multiply<true, true, kWalkTile>(dq, shared.dscores, warp_row, shared.key, 0);
    add_heads(static_cast<bf16*>(p.dq) + at + warp_row * width, width, tokens - warp_row, kWalkScale, dq);
  }

  // Through M_value / mass and the norm of M_key. A mass scales a weight and divides a value, so that of its gradient
  // only - sum weight * inner / mass is left.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row + fragment_row(2 * r);
    const float inverse = shared.inverse[row], scale = kWalkScale * shared.norm[row];
    float key[kWalkDim / 8][2], product = 0.0f;
#pragma unroll
    for (int n = 0; n < kWalkDim / 8; ++n) {
      load<2>(shared.key.hi + row * WalkTile::kStride + fragment_column(n, 0), key[n]);
#pragma unroll
      for (int j = 0; j < 2; ++j) product = fmaf(key[n][j], dk[n][2 * r + j], product);
    }
    const float along = group_sum<4>(product) / kWalkDim, inner = group_sum<4>(weighted_inner[r]);
    if (row >= count) continue;
    const int64_t to = (slot0 + row) * kWalkDim + fragment_column(0, 0);
#pragma unroll
    for (int n = 0; n < kWalkDim / 8; ++n) {
      const float dkey[2] = {scale * (dk[n][2 * r] - along * key[n][0]), scale * (dk[n][2 * r + 1] - along * key[n][1])};
      const float dvalue[2] = {inverse * dv[n][2 * r], inverse * dv[n][2 * r + 1]};
      store<2>(p.dkey + to + 8 * n, dkey);
      store<2>(p.dvalue + to + 8 * n, dvalue);
    }
    if (threadIdx.x % 4 == 0) p.dmass[slot0 + row] = -inner * inverse;
  }
}

}  // namespace

cudaError_t walk_backward_slots(const ReadBackward& p, const MemoryExtent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.versions()), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(slot_kernel, grid, dim3(kThreads), sizeof(Shared), stream, p, extent);
}

}  // namespace mm_rec
