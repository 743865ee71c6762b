// memory_update, forward: a block of threads owns a tile of slots of one head of one sequence and makes all its writes,
// one after the other: w = rate softmax(k A^T) on the tensor cores, then M <- a M + w^T (k, v).
#include "launch.cuh"
#include "memory_update.cuh"

namespace mm_rec {
namespace {

struct Outputs {
  const float* key0;
  const float* value0;
  const float* mass0;
  float* key;
  float* value;
  float* mass;
};

template <typename Plan>
struct Shared {
  typename Plan::Tokens k, v;
  typename Plan::Slots address;
  typename Plan::Weights weights;
  float softmax[4 * Plan::kQ];
  float2 columns[Plan::kQ / 16 * Plan::kQ];
  float factor[Plan::kQ], mass[Plan::kQ];
};

template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kDim <= 64 ? 2 : 1)
    forward_kernel(const UpdateInputs in, const Outputs out, const MemoryExtent extent) {
  constexpr int Q = Plan::kQ, kDim = Plan::kDim;
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y;
  const int dim = extent.dim, tile = blockIdx.x, tiles = static_cast<int>(ceil_div(extent.slots, Q));
  const float* address = in.address + head * extent.slots * dim;
  const float rate = in.rate[head];
  const auto load_address = [&](int s) {
    Plan::fill(shared.address, address + static_cast<int64_t>(s) * Q * dim, dim, extent.slots - s * Q, dim);
    __syncthreads();
  };
  if (tiles == 1) load_address(0);

  const int first = tile * Q, count = min(Q, extent.slots - first);
  const auto copy = [&](const float* key, const float* value, const float* mass, int64_t from, int64_t to) {
    for (int i = threadIdx.x; i < count * dim; i += Plan::kThreads) {
      out.key[(to + first) * dim + i] = key[(from + first) * dim + i];
      out.value[(to + first) * dim + i] = value[(from + first) * dim + i];
    }
    for (int i = threadIdx.x; i < count; i += Plan::kThreads) out.mass[to + first + i] = mass[from + first + i];
    __syncthreads();
  };
  int64_t row = extent.slots_at(b, 0, head);  // of the first slot, in the version written last
  copy(out.key0, out.value0, out.mass0, (b * extent.heads + head) * extent.slots, row);

  // A warp computes 16 slots of the key (first half of the warps) or of the value.
  const bool of_value = Plan::warp() >= Plan::kWarps / 2;
  float* memory = of_value ? out.value : out.key;

  for (int64_t e = 0; e < extent.writes(); ++e) {
    const int64_t old_row = row;
    row += extent.heads * extent.slots;
    const int t = in.index.event[b * extent.writes() + e];
    if (t < 0) {  // no more writes in this row
      copy(out.key, out.value, out.mass, old_row, row);
      continue;
    }
    for (int s = threadIdx.x; s < Q; s += Plan::kThreads) {
      shared.factor[s] = 1.0f;
      shared.mass[s] = 0.0f;
    }
    Fragments<kDim / 8> sum = {};
    // W tokens before token t is token t of the context: the tokens written are t .. t + P - 1 there.
    for (int p0 = 0; p0 < extent.block(); p0 += Q) {
      const int64_t at = extent.context_at(b, t + p0, head);
      const int tokens = extent.block() - p0;
      Plan::fill(shared.k, static_cast<const T*>(in.k) + at, extent.width(), tokens, dim);
      Plan::fill(shared.v, static_cast<const T*>(in.v) + at, extent.width(), tokens, dim);
      __syncthreads();
      typename Plan::Logits w;
      typename Plan::Softmax softmax;
      for (int s = 0; s < tiles; ++s) {
        if (tiles > 1) load_address(s);
        Plan::logits(shared.k, shared.address, extent.slots - s * Q, w);
        softmax.add(w);
        if (tiles > 1) __syncthreads();
      }
      softmax.finish(shared.softmax);
      if (tiles > 1) {
        load_address(tile);
        Plan::logits(shared.k, shared.address, extent.slots - tile * Q, w);
      }
      Plan::weights(softmax, rate, tokens, w);
#pragma unroll
      for (int n = 0; n < Plan::kHalf / 8; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          shared.weights.set(Plan::token() + fragment_row(2 * r), Plan::slot() + fragment_column(n, 0), w[n][2 * r],
                             w[n][2 * r + 1]);
        }
      }
      Plan::accumulate_columns(w, shared.columns, shared.factor, shared.mass);
      multiply<true, true, Q>(sum, shared.weights, Plan::token(), of_value ? shared.v : shared.k, 0);
      __syncthreads();
    }
    // The first write of a document starts from an empty memory.
    const float keep = in.position[b * extent.time + t] == extent.window ? 0.0f : 1.0f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int slot = Plan::token() + fragment_row(2 * r);
      if (slot >= count) continue;
      const float a = keep * shared.factor[slot];
      const float* old = memory + (old_row + first + slot) * dim;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int column = fragment_column(n, 0);
        const float2 x = load_pair(old, column, dim);
        store_pair(memory + (row + first + slot) * dim, column, dim, fmaf(a, x.x, sum[n][2 * r]),
                   fmaf(a, x.y, sum[n][2 * r + 1]));
      }
    }
    for (int i = threadIdx.x; i < count; i += Plan::kThreads) {
      out.mass[row + first + i] = fmaf(keep * shared.factor[i], out.mass[old_row + first + i], shared.mass[i]);
    }
    __syncthreads();
  }
}

template <typename T, int Dim, int Q>
cudaError_t run(const UpdateInputs& in, const Outputs& out, const MemoryExtent& extent, void* stream) {
  using Plan = UpdatePlan<T, Dim, Q>;
  const dim3 grid(static_cast<unsigned>(ceil_div(extent.slots, Q)), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(forward_kernel<T, Plan>, grid, dim3(Plan::kThreads), sizeof(Shared<Plan>), stream, in, out, extent);
}

template <typename T>
cudaError_t dispatch(const UpdateInputs& in, const Outputs& out, const MemoryExtent& extent, void* stream) {
  if (extent.dim <= 32) return run<T, 32, 64>(in, out, extent, stream);
  if (extent.dim <= 64) return run<T, 64, 64>(in, out, extent, stream);
  if (extent.dim <= 128) return run<T, 128, 32>(in, out, extent, stream);
  if (extent.dim <= 256) return run<T, 256, 32>(in, out, extent, stream);
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace mm_rec

extern "C" int64_t mm_rec_cuda_memory_update_workspace(int64_t batch, int64_t time, int64_t window) {
  return mm_rec::write_index_bytes({batch, time, 1, 1, 1, static_cast<int>(window)});
}

extern "C" int mm_rec_cuda_memory_update_forward(const void* k, const void* v, int64_t dtype, const float* address,
                                                 const float* rate, const int64_t* position, const float* key0,
                                                 const float* value0, const float* mass0, float* key, float* value,
                                                 float* mass, void* workspace, int64_t batch, int64_t time,
                                                 int64_t heads, int64_t dim, int64_t slots, int64_t window,
                                                 void* stream) {
  using namespace mm_rec;
  const MemoryExtent extent{batch, time, heads, static_cast<int>(dim), static_cast<int>(slots), static_cast<int>(window)};
  UpdateInputs in{k, v, address, rate, position, {}};
  const Outputs out{key0, value0, mass0, key, value, mass};
  const cudaError_t error = make_write_index(position, extent, workspace, &in.index, stream);
  if (error != cudaSuccess) return error;
  return dtype == kBFloat16 ? dispatch<bf16>(in, out, extent, stream) : dispatch<float>(in, out, extent, stream);
}
