// memory_update, backward, for the sizes of most models; the mathematics is in memory_update_backward.cu. From a write to the
// one before only G has to be known, which takes the write's factors a and nothing else of it. So eight warps walk through
// the writes, last to first, with G in registers: they compute weights and factors, put G down and go on to the version
// before. Eight others, one write behind, turn G into the gradients of tokens, addresses and rate.
#include "device.cuh"
#include "launch.cuh"
#include "memory_write.cuh"
#include "reduce.cuh"

namespace mm_rec {
namespace {

constexpr int kGroup = 256, kThreads = 2 * kGroup, kRing = 3;

struct Shared {
  SplitTile address, dlogits;
  SplitTile weights[2], dkey[2], dvalue[2];  // weights (token, slot); G
  WalkTile k[kRing], v[kRing];
  float2 columns[kWriteWarps][kWriteSlots];  // product of 1 - w and sum of w over a warp's tokens
  float inner[2][kWriteSlots];               // G . M, of keys and of values
  float factor[2][kWriteSlots], dfactor[2][kWriteSlots], dmass[2][kWriteSlots];
  float product[2][kWalkTile];  // of tokens: the sum over half of the slots of w dw
  float drate[kGroup / 32];
};

template <bool Cut>
struct Place {
  const UpdateInputs& in;
  const UpdateGradients& out;
  const MemoryExtent& extent;
  int64_t b, head;
  WritePart<Cut> part;

  __device__ __forceinline__ int token(int e) const { return e < part.begin ? -1 : Writes{in, extent, b}.token(e); }
  __device__ __forceinline__ int count() const { return part.end - part.begin; }
  __device__ __forceinline__ int write(int i) const { return part.end - 1 - i; }  // the i-th to be undone
  // Of the part's sums of gradients of address and rate, (part, b, head).
  __device__ __forceinline__ int64_t sums_at() const {
    return ((Cut ? int64_t{blockIdx.x} * extent.batch : 0) + b) * extent.heads + head;
  }
  __device__ __forceinline__ int64_t context_at(int token) const { return extent.context_at(b, token, head); }
};

// Zero the gradients of contexts that no write reads, by 128 threads.
template <bool Cut>
__device__ __forceinline__ void clear(const Place<Cut>& place, int64_t from, int64_t to) {
  constexpr int kPieces = kWalkDim / 8;
  for (int64_t i = threadIdx.x % 128; i < (to - from) * kPieces; i += 128) {
    const int64_t at = place.extent.context_at(place.b, from + i / kPieces, place.head) + i % kPieces * 8;
    *reinterpret_cast<uint4*>(static_cast<bf16*>(place.out.dk) + at) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(static_cast<bf16*>(place.out.dv) + at) = make_uint4(0, 0, 0, 0);
  }
}

// Ask for what write e needs: its tokens, and in the second-level cache the memory before it and its gradient. 128 threads.
template <bool Cut>
__device__ __forceinline__ void fetch(Shared& shared, const Place<Cut>& place, int e, int token) {
  const auto& extent = place.extent;
  if (e < place.part.begin) return;
  const int ring = (place.part.end - 1 - e) % kRing;
  walk_copy(shared.k[ring].hi, static_cast<const bf16*>(place.in.k) + place.context_at(token), extent.width(), kWalkTile);
  walk_copy(shared.v[ring].hi, static_cast<const bf16*>(place.in.v) + place.context_at(token), extent.width(), kWalkTile);
  const int line = static_cast<int>(threadIdx.x) % 128 * 32;
  if (line >= extent.slots * kWalkDim) return;
  const int64_t at = extent.slots_at(place.b, e, place.head) * kWalkDim + line;
  prefetch_l2(place.out.key + at);
  prefetch_l2(place.out.value + at);
  prefetch_l2(place.out.dkey + at);
  prefetch_l2(place.out.dvalue + at);
}

// The warps with G: 16 slots of the keys or of the values each.
template <bool Cut>
__device__ __forceinline__ void walk_writes(Shared& shared, const Place<Cut>& place) {
  const auto& extent = place.extent;
  const auto& out = place.out;
  const int thread = threadIdx.x, warp = thread / 32, first = warp % kWriteWarps * 16, slots = extent.slots;
  const bool of_value = warp >= kWriteWarps;
  const float rate = place.in.rate[place.head];
  const auto load = [&](const float* source, int64_t version, Fragments<kWalkDim / 8>& x) {
    load_rows(source + extent.slots_at(place.b, version, place.head) * kWalkDim, first, slots, kWalkDim, kWalkDim, x);
  };
  const float *upstream = of_value ? out.dvalue : out.dkey, *memory = of_value ? out.value : out.key;
  const auto mass_at = [&](const float* source, int64_t version) {
    return thread < slots ? source[extent.slots_at(place.b, version, place.head) + thread] : 0.0f;
  };

  // Versions past the last write repeat it.
  const int64_t newest = place.part.last ? extent.writes() : place.part.end;
  Fragments<kWalkDim / 8> gradient;
  load(upstream, newest, gradient);
  float dmass = mass_at(out.dmass, newest);
#pragma unroll 1
  for (int64_t e = newest - 1; e >= place.part.end; --e) {
    Fragments<kWalkDim / 8> own;
    load(upstream, e, own);
    dmass += mass_at(out.dmass, e);
#pragma unroll
    for (int n = 0; n < kWalkDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) gradient[n][i] += own[n][i];
    }
  }

  // From here on dk and dv are there.
  int64_t cleared = place.part.last ? extent.context() : Writes{place.in, extent, place.b}.token(place.part.end);
  int token = place.token(place.write(0)), before = place.token(place.write(1));
  for (int i = 0; i < place.count(); ++i) {
    const int e = place.write(i);
    const bool starts = Writes{place.in, extent, place.b}.keep(token) == 0.0f;
    const int coming = place.token(e - 2);
    if (of_value) {
      fetch(shared, place, e - 1, before);
      cp_async_commit();
      clear(place, token + kWalkTile, cleared);
      cleared = token;
    } else {
      Fragments<kWriteSlots / 8> w;
      write_weights(shared.k[i % kRing], 16 * warp, shared.address, slots, rate, w);
      put_rows(shared.weights[i % 2], 16 * warp, w);
      const ColumnParts parts = reduce_columns(w);
      *reinterpret_cast<float4*>(&shared.columns[warp][parts.slot]) =
          make_float4(parts.product[0], parts.sum[0], parts.product[1], parts.sum[1]);
    }
    Fragments<kWalkDim / 8> old;
    load(memory, e, old);
    put_rows(of_value ? shared.dvalue[i % 2] : shared.dkey[i % 2], first, gradient);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float inner = 0.0f;
#pragma unroll
      for (int n = 0; n < kWalkDim / 8; ++n) {
        inner = fmaf(gradient[n][2 * r], old[n][2 * r], fmaf(gradient[n][2 * r + 1], old[n][2 * r + 1], inner));
      }
      inner = group_sum<4>(inner);
      if (thread % 4 == 0) shared.inner[of_value][first + fragment_row(2 * r)] = inner;
    }
    load(upstream, e, old);
    const float mass = mass_at(out.mass, e), own_dmass = mass_at(out.dmass, e);
    named_barrier(2, kGroup);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float factor = starts ? 0.0f : 1.0f;
#pragma unroll
      for (int w = 0; w < kWriteWarps; ++w) factor *= shared.columns[w][first + fragment_row(2 * r)].x;
#pragma unroll
      for (int n = 0; n < kWalkDim / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) gradient[n][2 * r + j] = fmaf(factor, gradient[n][2 * r + j], old[n][2 * r + j]);
      }
    }
    if (thread < kWriteSlots) {
      float factor = 1.0f;
#pragma unroll
      for (int w = 0; w < kWriteWarps; ++w) factor *= shared.columns[w][thread].x;
      shared.factor[i % 2][thread] = factor;
      shared.dfactor[i % 2][thread] =
          starts || thread >= slots ? 0.0f : fmaf(dmass, mass, shared.inner[0][thread] + shared.inner[1][thread]);
      shared.dmass[i % 2][thread] = dmass;
      dmass = fmaf(starts ? 0.0f : factor, dmass, own_dmass);
    }
    token = before;
    before = coming;
    cp_async_wait<0>();
    named_barrier(1, kThreads);
  }
  if (place.part.first) {
    if (of_value) clear(place, 0, cleared);
    const int64_t home = (place.b * extent.heads + place.head) * slots;
    store_rows((of_value ? out.dvalue0 : out.dkey0) + home * kWalkDim, first, slots, kWalkDim, kWalkDim, gradient);
    if (thread < slots) out.dmass0[home + thread] = dmass;
  }
  named_barrier(1, kThreads);
}

// The warps behind: 16 tokens each; of the gradients of weights one half of the slots, then of keys, or of values and of 16
// addresses.
template <bool Cut>
__device__ __forceinline__ void spread(Shared& shared, const Place<Cut>& place) {
  const auto& extent = place.extent;
  const auto& out = place.out;
  const int warp = (static_cast<int>(threadIdx.x) - kGroup) / 32, side = warp / kWriteWarps, row = warp % kWriteWarps * 16;
  const float rate = place.in.rate[place.head];
  Fragments<kWalkDim / 8> address_sum = {};
  float drate = 0.0f;
  named_barrier(1, kThreads);
  for (int i = 0; i < place.count(); ++i) {
    const int token = place.token(place.write(i)), slot = 32 * side;
    const auto& weights = shared.weights[i % 2];
    const auto &k = shared.k[i % kRing], &v = shared.v[i % kRing];
    Fragments<4> dw = {}, w;
    multiply<false, false, kWalkDim>(dw, k, row, shared.dkey[i % 2], slot);
    multiply<false, false, kWalkDim>(dw, v, row, shared.dvalue[i % 2], slot);
    float product[2] = {0.0f, 0.0f};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = slot + fragment_column(n, 0);
      float factor[2], dfactor[2], dmass[2];
      load<2>(&shared.factor[i % 2][column], factor);
      load<2>(&shared.dfactor[i % 2][column], dfactor);
      load<2>(&shared.dmass[i % 2][column], dmass);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = (row + fragment_row(2 * r)) * weights.kStride + column;
        float hi[2], lo[2];
        load<2>(weights.hi + at, hi);
        load<2>(weights.lo + at, lo);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float x = hi[j] + lo[j];
          // A weight of exactly 1 makes the product 0 whatever the others are; their gradient is lost there.
          const float others = x < 1.0f ? __fdividef(factor[j], 1.0f - x) : 0.0f;
          dw[n][2 * r + j] += dmass[j] - dfactor[j] * others;
          w[n][2 * r + j] = x;
          product[r] = fmaf(x, dw[n][2 * r + j], product[r]);
        }
      }
    }
    drate += product[0] + product[1];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      product[r] = group_sum<4>(product[r]);
      if (threadIdx.x % 4 == 0) shared.product[side][row + fragment_row(2 * r)] = product[r];
    }
    named_barrier(3, kGroup);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = row + fragment_row(2 * r);
      const float mean = (shared.product[0][at] + shared.product[1][at]) / rate;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        shared.dlogits.set(at, slot + fragment_column(n, 0), w[n][2 * r] * (dw[n][2 * r] - mean),
                           w[n][2 * r + 1] * (dw[n][2 * r + 1] - mean));
      }
    }
    named_barrier(3, kGroup);
    Fragments<kWalkDim / 8> dtoken = {};
    if (side == 0) {
      multiply<false, true, kWriteSlots>(dtoken, weights, row, shared.dkey[i % 2], 0);
      multiply<false, true, kWriteSlots>(dtoken, shared.dlogits, row, shared.address, 0);
    } else {
      multiply<false, true, kWriteSlots>(dtoken, weights, row, shared.dvalue[i % 2], 0);
      multiply<true, true, kWalkTile>(address_sum, shared.dlogits, row, k, 0);
    }
    bf16* target = static_cast<bf16*>(side == 0 ? out.dk : out.dv) + place.context_at(token + row);
    walk_store(target, extent.width(), 16, 1.0f, dtoken);
    named_barrier(1, kThreads);
  }
  if (side == 1) {
    const int64_t home = place.sums_at() * extent.slots;
    store_rows(out.daddress + home * kWalkDim, row, extent.slots, kWalkDim, kWalkDim, address_sum);
  }
  drate = group_sum(drate);
  if (threadIdx.x % 32 == 0) shared.drate[warp] = drate;
  named_barrier(3, kGroup);
  if (threadIdx.x == kGroup) {
    float total = 0.0f;
    for (int w = 0; w < kGroup / 32; ++w) total += shared.drate[w];
    out.drate[place.sums_at()] = total / rate;
  }
}

template <bool Cut>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const UpdateInputs in, const UpdateGradients out, const MemoryExtent extent) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y;
  const Place<Cut> place{in, out, extent, b, head, WritePart<Cut>({in, extent, b}, blockIdx.x, gridDim.x)};
  if (place.part.idle()) {  // its sums are empty
    const int size = extent.slots * kWalkDim;
    for (int i = threadIdx.x; i < size; i += kThreads) out.daddress[place.sums_at() * size + i] = 0.0f;
    if (threadIdx.x == 0) out.drate[place.sums_at()] = 0.0f;
    return;
  }
  if (threadIdx.x < 128) {
    fetch(shared, place, place.write(0), place.token(place.write(0)));
    cp_async_commit();
  }
  load_split(shared.address, in.address + head * extent.slots * kWalkDim, extent.slots, threadIdx.x, kThreads);
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x < kGroup) {
    walk_writes(shared, place);
  } else {
    spread(shared, place);
  }
}

}  // namespace

int write_backward_parts(const MemoryExtent& extent) {
  return write_parts(extent, extent.heads * extent.batch, multiprocessors());
}

bool writes_backward(int64_t dtype, const MemoryExtent& extent) {
  return walks(dtype, extent) && sizeof(Shared) <= shared_memory_limit();
}

cudaError_t write_backward(const UpdateInputs& in, const UpdateGradients& out, const MemoryExtent& extent, void* stream) {
  const int parts = write_backward_parts(extent);
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
  const auto kernel = parts > 1 ? backward_kernel<true> : backward_kernel<false>;
  return launch(kernel, grid, dim3(kThreads), sizeof(Shared), stream, in, out, extent);
}

}  // namespace mm_rec
