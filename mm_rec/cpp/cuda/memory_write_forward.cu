// memory_update, forward, for the sizes of most models: a block of threads owns the keys or the values of one head of one
// sequence. Four warps hold them, 16 slots each, apply the writes and store the versions; four others fetch tokens two writes
// ahead and compute weights one write ahead.
#include "device.cuh"
#include "launch.cuh"
#include "memory_write.cuh"

namespace mm_rec {
namespace {

constexpr int kGroup = 32 * kWriteWarps, kThreads = 2 * kGroup, kRing = 3, kResident = 2;

struct Shared {
  SplitTile address;
  WalkTile k[kRing], v[kRing];
  SplitTile weights[2];                           // (token, slot)
  float2 columns[2][kWriteWarps][kWriteSlots];  // product of 1 - w and sum of w over a warp's tokens
};

template <bool Cut>
struct Place {
  const UpdateInputs& in;
  const MemoryExtent& extent;
  int64_t b, head;
  bool of_value;
  WritePart<Cut> part;
};

template <bool Cut>
__device__ __forceinline__ void compute_weights(Shared& shared, const Place<Cut>& place) {
  const auto& extent = place.extent;
  const Writes writes{place.in, extent, place.b};
  const float rate = place.in.rate[place.head];
  const int warp = static_cast<int>(threadIdx.x) / 32, begin = place.part.begin, end = place.part.end;
  const auto fetch = [&](int e, int token) {
    if (e < end) {
      const int64_t at = extent.context_at(place.b, token, place.head);
      walk_copy(shared.k[e % kRing].hi, static_cast<const bf16*>(place.in.k) + at, extent.width(), kWalkTile);
      if (place.of_value) {
        walk_copy(shared.v[e % kRing].hi, static_cast<const bf16*>(place.in.v) + at, extent.width(), kWalkTile);
      }
    }
    cp_async_commit();
  };
  const auto weigh = [&](int e) {
    Fragments<kWriteSlots / 8> w;
    write_weights(shared.k[e % kRing], 16 * warp, shared.address, extent.slots, rate, w);
    put_rows(shared.weights[e % 2], 16 * warp, w);
    const ColumnParts parts = reduce_columns(w);
    *reinterpret_cast<float4*>(&shared.columns[e % 2][warp][parts.slot]) =
        make_float4(parts.product[0], parts.sum[0], parts.product[1], parts.sum[1]);
  };
  fetch(begin, writes.token(begin));
  fetch(begin + 1, writes.token(begin + 1));
  int coming = writes.token(begin + 2), later = writes.token(begin + 3);
  cp_async_wait<1>();
  named_barrier(2, kGroup);
  if (begin < end) weigh(begin);
  cp_async_wait<0>();
  named_barrier(1, kThreads);
  for (int e = begin; e < end; ++e) {
    fetch(e + 2, coming);
    if (later >= 0) {  // its tokens will be asked for in the next turn
      const int64_t at = extent.context_at(place.b, later + threadIdx.x % kWalkTile, place.head);
      if (threadIdx.x < kWalkTile) {
        prefetch_l2(static_cast<const bf16*>(place.in.k) + at);
      } else if (place.of_value) {
        prefetch_l2(static_cast<const bf16*>(place.in.v) + at);
      }
    }
    coming = later;
    later = writes.token(e + 4);
    if (e + 1 < end) weigh(e + 1);
    cp_async_wait<0>();
    named_barrier(1, kThreads);
  }
}

template <bool Cut>
__device__ __forceinline__ void apply_writes(const Shared& shared, const Place<Cut>& place, const UpdateOutputs& out) {
  const auto& extent = place.extent;
  const Writes writes{place.in, extent, place.b};
  const int thread = static_cast<int>(threadIdx.x) - kGroup, first = thread / 32 * 16, slots = extent.slots;
  const int64_t home = (place.b * extent.heads + place.head) * slots, step = extent.heads * slots;
  const bool has_mass = !place.of_value && thread < slots;
  const int begin = place.part.begin, end = place.part.end;
  Fragments<kWalkDim / 8> state = {};
  float mass = 0.0f;
  int64_t row = extent.slots_at(place.b, begin, place.head);
  float* target = place.of_value ? out.value : out.key;
  const auto store = [&] {
    store_rows(target + row * kWalkDim, first, slots, kWalkDim, kWalkDim, state);
    if (has_mass) out.mass[row + thread] = mass;
    row += step;
  };
  if (place.part.first) {
    load_rows((place.of_value ? out.value0 : out.key0) + home * kWalkDim, first, slots, kWalkDim, kWalkDim, state);
    if (has_mass) mass = out.mass0[home + thread];
    store();
  } else {
    row += step;  // the part before stores what it leaves
  }
  float keep = begin < end ? writes.keep(writes.token(begin)) : 1.0f;
  int next = writes.token(begin + 1);
  named_barrier(1, kThreads);
  for (int e = begin; e < end; ++e) {
    const auto& columns = shared.columns[e % 2];
    float factor[2] = {keep, keep};
#pragma unroll
    for (int w = 0; w < kWriteWarps; ++w) {
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[r] *= columns[w][first + fragment_row(2 * r)].x;
    }
#pragma unroll
    for (int n = 0; n < kWalkDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state[n][i] *= factor[i / 2];
    }
    multiply<true, true, kWalkTile>(state, shared.weights[e % 2], first,
                                    place.of_value ? shared.v[e % kRing] : shared.k[e % kRing], 0);
    if (has_mass) {
      float sum = 0.0f;
      mass *= keep;
#pragma unroll
      for (int w = 0; w < kWriteWarps; ++w) {
        mass *= columns[w][thread].x;
        sum += columns[w][thread].y;
      }
      mass += sum;
    }
    keep = writes.keep(next);
    next = writes.token(e + 2);
    store();
    named_barrier(1, kThreads);
  }
  if (!place.part.last) return;
  for (int64_t e = end; e < extent.writes(); ++e) store();  // versions past the last write repeat it
}

template <bool Cut>
__global__ void __launch_bounds__(kThreads, kResident)
    forward_kernel(const UpdateInputs in, const UpdateOutputs out, const MemoryExtent extent) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y;
  const WritePart<Cut> part({in, extent, b}, blockIdx.x / 2, gridDim.x / 2);
  const Place<Cut> place{in, extent, b, head, blockIdx.x % 2 == 1, part};
  if (place.part.idle()) return;
  load_split(shared.address, in.address + head * extent.slots * kWalkDim, extent.slots, threadIdx.x, kThreads);
  __syncthreads();
  if (threadIdx.x < kGroup) {
    compute_weights(shared, place);
  } else {
    apply_writes(shared, place, out);
  }
}

}  // namespace

bool writes_forward(int64_t dtype, const MemoryExtent& extent) {
  return walks(dtype, extent) && sizeof(Shared) <= shared_memory_limit();
}

cudaError_t write_forward(const UpdateInputs& in, const UpdateOutputs& out, const MemoryExtent& extent, void* stream) {
  const int64_t resident = int64_t{resident_blocks(kResident, sizeof(Shared))} * multiprocessors();
  const int parts = write_parts(extent, 2 * extent.heads * extent.batch, resident);
  const dim3 grid(static_cast<unsigned>(2 * parts), static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
  const auto kernel = parts > 1 ? forward_kernel<true> : forward_kernel<false>;
  return launch(kernel, grid, dim3(kThreads), sizeof(Shared), stream, in, out, extent);
}

}  // namespace mm_rec
