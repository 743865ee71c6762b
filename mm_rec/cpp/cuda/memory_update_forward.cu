// memory_update, forward: a block of threads owns a tile of slots of one head of one sequence, keeps it in registers and
// makes all its writes, one after the other: w = rate softmax(k A^T) on the tensor cores, then M <- a M + w^T (k, v).
#include "launch.cuh"
#include "memory_write.cuh"

namespace mm_rec {
namespace {

template <typename Plan>
struct Shared {
  typename Plan::Tokens k, v;
  typename Plan::Slots address;
  typename Plan::Weights weights;
  float2 softmax[Plan::kSides * Plan::kQ];
  float2 columns[Plan::kQ / 16 * Plan::kQ];
  float factor[Plan::kQ], mass[Plan::kQ];
};

template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kDim <= 64 ? 2 : 1)
    forward_kernel(const UpdateInputs in, const UpdateOutputs out, const MemoryExtent extent) {
  constexpr int Q = Plan::kQ;
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y;
  const int dim = extent.dim, block = extent.block(), tile = blockIdx.x;
  const int tiles = static_cast<int>(ceil_div(extent.slots, Q)), count = min(Q, extent.slots - tile * Q);
  const float* address = in.address + head * extent.slots * dim;
  const float rate = in.rate[head];
  const auto load_address = [&](int s) {
    typename Plan::template Loads<float> rows;
    rows.fetch(address + static_cast<int64_t>(s) * Q * dim, dim, extent.slots - s * Q, dim);
    __syncthreads();
    rows.put(shared.address);
    __syncthreads();
  };
  if (tiles == 1) load_address(0);

  // A warp holds 16 slots of the key or of the value; thread i the mass of slot i.
  const bool of_value = Plan::of_value();
  const int first = Plan::token(), column = Plan::column(), slot = threadIdx.x;
  int64_t row = (b * extent.heads + head) * extent.slots + tile * Q;  // of the first slot
  typename Plan::Rows state;
  load_rows((of_value ? out.value0 : out.key0) + row * dim + column, first, count, dim, dim - column, state);
  float mass = slot < count ? out.mass0[row + slot] : 0.0f;

  // The token that causes write e, -1 if there is none, and whether M fades then or starts from empty: known a write ahead,
  // so that its tokens can be on their way.
  const auto event = [&](int64_t e) { return e < extent.writes() ? in.index.event[b * extent.writes() + e] : -1; };
  const auto fade = [&](int t) { return t >= 0 && in.position[b * extent.time + t] == extent.window ? 0.0f : 1.0f; };
  typename Plan::template Loads<T> k, v;
  const auto fetch = [&](int t, int p0) {
    // W tokens before token t is token t of the context: the tokens written are t .. t + P - 1 there.
    const int64_t at = extent.context_at(b, t + p0, head);
    k.fetch(static_cast<const T*>(in.k) + at, extent.width(), block - p0, dim);
    v.fetch(static_cast<const T*>(in.v) + at, extent.width(), block - p0, dim);
  };
  int next = event(0), after = event(1);
  float next_keep = fade(next);
  if (next >= 0) fetch(next, 0);

  row = extent.slots_at(b, 0, head) + tile * Q;
  for (int64_t e = 0;; ++e, row += extent.heads * extent.slots) {
    store_rows((of_value ? out.value : out.key) + row * dim + column, first, count, dim, dim - column, state);
    if (slot < count) out.mass[row + slot] = mass;
    if (e == extent.writes()) return;
    const int t = next;
    const float keep = next_keep;
    next = after;
    after = event(e + 2);
    next_keep = fade(next);
    if (t < 0) continue;  // no more writes in this row: the next version repeats this one
    if (slot < Q) {
      shared.factor[slot] = 1.0f;
      shared.mass[slot] = 0.0f;
    }
    // The factors come first, since M fades by those of all tokens; tokens of a single tile are weighed only once.
    for (int pass = 0; pass < 2; ++pass) {
      if (pass == 1) {
#pragma unroll
        for (int n = 0; n < Plan::kPart / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) state[n][i] *= keep * shared.factor[first + fragment_row(i)];
        }
        if (slot < Q) mass = fmaf(keep * shared.factor[slot], mass, shared.mass[slot]);
      }
      for (int p0 = 0; p0 < block; p0 += Q) {
        if (pass == 0 || block > Q) {
          if (pass > 0 || p0 > 0) fetch(t, p0);
          __syncthreads();
          k.put(shared.k);
          v.put(shared.v);
          __syncthreads();
          if (next >= 0 && pass == (block > Q) && p0 + Q >= block) fetch(next, 0);
          typename Plan::Logits w;
          typename Plan::Softmax softmax;
          for (int s = 0; s < tiles; ++s) {
            if (tiles > 1) load_address(s);
            Plan::logits(shared.k, shared.address, extent.slots - s * Q, w);
            softmax.add(w);
          }
          softmax.finish(shared.softmax);
          if (tiles > 1) {
            load_address(tile);
            Plan::logits(shared.k, shared.address, extent.slots - tile * Q, w);
          }
          Plan::weights(softmax, rate, block - p0, w);
          Plan::put(shared.weights, w);
          if (pass == 0) Plan::accumulate_columns(w, shared.columns, shared.factor, shared.mass);
        }
        if (pass == 1) {
          __syncthreads();
          multiply<true, true, Q>(state, shared.weights, first, of_value ? shared.v : shared.k, column);
        }
      }
    }
    __syncthreads();
  }
}

template <typename T, int Dim, int Q, int Sides>
cudaError_t run(const UpdateInputs& in, const UpdateOutputs& out, const MemoryExtent& extent, void* stream) {
  using Plan = UpdatePlan<T, Dim, Q, Sides>;
  const dim3 grid(static_cast<unsigned>(ceil_div(extent.slots, Q)), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(forward_kernel<T, Plan>, grid, dim3(Plan::kThreads), sizeof(Shared<Plan>), stream, in, out, extent);
}

template <typename T>
cudaError_t dispatch(const UpdateInputs& in, const UpdateOutputs& out, const MemoryExtent& extent, void* stream) {
  if (extent.dim <= 64) return run<T, 64, 64, 2>(in, out, extent, stream);
  if (extent.dim <= 128) return run<T, 128, 32, 2>(in, out, extent, stream);
  if (extent.dim <= 256) return run<T, 256, 32, 2>(in, out, extent, stream);
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
  const UpdateOutputs out{key0, value0, mass0, key, value, mass};
  const cudaError_t error = make_write_index(position, extent, workspace, &in.index, stream);
  if (error != cudaSuccess) return error;
  if (writes_forward(dtype, extent)) return write_forward(in, out, extent, stream);
  return dtype == kBFloat16 ? dispatch<bf16>(in, out, extent, stream) : dispatch<float>(in, out, extent, stream);
}
