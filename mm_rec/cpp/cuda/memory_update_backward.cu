// memory_update, backward: a block of threads owns one head of one sequence and goes through its writes from the last
// to the first. With G the gradient at a version of (key, value) and g at its mass, a write has
//
//   da[s]   = G[s] . M_before[s] + g[s] mass_before[s]         (0 if the document starts here: a counts as 0)
//   dw[p,s] = k_p . G_key[s] + v_p . G_value[s] + g[s] - da[s] a[s] / (1 - w[p,s])
//   dk_p    = sum_s w[p,s] G_key[s] + dl[p,s] A[s];  dv_p = sum_s w[p,s] G_value[s];  dA[s] = sum_p dl[p,s] k_p
//   dl[p,s] = w[p,s] (dw[p,s] - sum_s' w[p,s'] dw[p,s'] / rate)
//
// and G of the version before is its own gradient plus a G. G lives in the outputs for the first version; it, and dA,
// are touched by this block alone.
#include "launch.cuh"
#include "memory_update.cuh"
#include "reduce.cuh"

namespace mm_rec {
namespace {

struct Gradients {
  const float* dkey;  // of all versions
  const float* dvalue;
  const float* dmass;
  const float* key;
  const float* value;
  const float* mass;
  void* dk;
  void* dv;
  float* dkey0;
  float* dvalue0;
  float* dmass0;
  float* daddress;  // (B, H, S, d) and (B, H): sums over B are left to the caller
  float* drate;
};

template <typename Plan>
struct Shared {
  typename Plan::Tokens k, v;
  typename Plan::Slots address, dkey, dvalue;
  typename Plan::Weights weights, dlogits;
  float softmax[4 * Plan::kQ];
  float2 columns[Plan::kQ / 16 * Plan::kQ];
  float product[2][Plan::kQ];  // sum over a half of the slots of w dw, of each token
};

template <typename T, typename Plan>
__global__ void __launch_bounds__(Plan::kThreads, Plan::kDim <= 64 ? 2 : 1)
    backward_kernel(const UpdateInputs in, const Gradients out, const MemoryExtent extent) {
  constexpr int Q = Plan::kQ, kDim = Plan::kDim, kThreads = Plan::kThreads;
  using Logits = typename Plan::Logits;
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const int64_t b = blockIdx.y, head = blockIdx.x;
  const int dim = extent.dim, slots = extent.slots, tiles = static_cast<int>(ceil_div(slots, Q));
  // Of each slot the factor a and its gradient, after the fixed part of the shared memory.
  float* factor = reinterpret_cast<float*>(&shared + 1);
  float* dfactor = factor + tiles * Q;
  const float rate = in.rate[head];
  const float* address = in.address + head * slots * dim;
  const int64_t first = (b * extent.heads + head) * slots;  // row of the first slot in (B, H, S, d)
  float* dkey = out.dkey0 + first * dim;
  float* dvalue = out.dvalue0 + first * dim;
  float* dmass = out.dmass0 + first;
  float* daddress = out.daddress + first * dim;
  const int64_t last = extent.slots_at(b, extent.writes(), head);
  for (int i = threadIdx.x; i < slots * dim; i += kThreads) {
    dkey[i] = out.dkey[last * dim + i];
    dvalue[i] = out.dvalue[last * dim + i];
    daddress[i] = 0.0f;
  }
  for (int i = threadIdx.x; i < slots; i += kThreads) dmass[i] = out.dmass[last + i];
  __syncthreads();

  int loaded = -1;  // which tile of slots is in shared memory; its addresses never change, its gradients do
  const auto load_slots = [&](int s, bool fresh) {
    if (loaded == s && !fresh) return;
    __syncthreads();
    const int64_t at = static_cast<int64_t>(s) * Q * dim;
    if (loaded != s) Plan::fill(shared.address, address + at, dim, slots - s * Q, dim);
    Plan::fill(shared.dkey, dkey + at, dim, slots - s * Q, dim);
    Plan::fill(shared.dvalue, dvalue + at, dim, slots - s * Q, dim);
    loaded = s;
    __syncthreads();
  };
  // w and dw of this warp's tokens and slots of the loaded tile s.
  const auto weight_gradient = [&](const typename Plan::Softmax& softmax, int s, int tokens, Logits& w, Logits& dw) {
    Plan::logits(shared.k, shared.address, slots - s * Q, w);
    Plan::weights(softmax, rate, tokens, w);
#pragma unroll
    for (int n = 0; n < Plan::kHalf / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dw[n][i] = 0.0f;
    }
    multiply<false, false, kDim>(dw, shared.k, Plan::token(), shared.dkey, Plan::slot());
    multiply<false, false, kDim>(dw, shared.v, Plan::token(), shared.dvalue, Plan::slot());
#pragma unroll
    for (int n = 0; n < Plan::kHalf / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = s * Q + Plan::slot() + fragment_column(n, i);
        if (slot >= slots) continue;
        // A weight of exactly 1 makes the product 0 whatever the others are; their gradient is lost there.
        const float others = w[n][i] < 1.0f ? factor[slot] / (1.0f - w[n][i]) : 0.0f;
        dw[n][i] += dmass[slot] - dfactor[slot] * others;
      }
    }
  };

  float drate = 0.0f;
  for (int64_t e = extent.writes() - 1; e >= 0; --e) {
    const int64_t before = extent.slots_at(b, e, head);
    const int t = in.index.event[b * extent.writes() + e];
    const bool starts = t >= 0 && in.position[b * extent.time + t] == extent.window;
    if (t >= 0) {
      for (int i = threadIdx.x; i < tiles * Q; i += kThreads) factor[i] = 1.0f;
      for (int p0 = 0; p0 < extent.block(); p0 += Q) {
        const int64_t at = extent.context_at(b, t + p0, head);
        const int tokens = extent.block() - p0;
        Plan::fill(shared.k, static_cast<const T*>(in.k) + at, extent.width(), tokens, dim);
        __syncthreads();
        Logits w;
        typename Plan::Softmax softmax;
        for (int s = 0; s < tiles; ++s) {
          load_slots(s, false);
          Plan::logits(shared.k, shared.address, slots - s * Q, w);
          softmax.add(w);
        }
        softmax.finish(shared.softmax);
        for (int s = 0; s < tiles; ++s) {
          load_slots(s, false);
          Plan::logits(shared.k, shared.address, slots - s * Q, w);
          Plan::weights(softmax, rate, tokens, w);
          Plan::accumulate_columns(w, shared.columns, factor + s * Q, nullptr);
        }
      }
      for (int slot = Plan::warp(); slot < slots; slot += Plan::kWarps) {
        float sum = 0.0f;
        for (int i = threadIdx.x % 32; i < dim; i += 32) {
          const int64_t at = (before + slot) * dim + i;
          sum = fmaf(dkey[slot * dim + i], out.key[at], sum);
          sum = fmaf(dvalue[slot * dim + i], out.value[at], sum);
        }
        sum = group_sum(sum) + dmass[slot] * out.mass[before + slot];
        if (threadIdx.x % 32 == 0) dfactor[slot] = starts ? 0.0f : sum;
      }
      for (int p0 = 0; p0 < extent.block(); p0 += Q) {
        const int64_t at = extent.context_at(b, t + p0, head);
        const int tokens = extent.block() - p0;
        __syncthreads();
        Plan::fill(shared.k, static_cast<const T*>(in.k) + at, extent.width(), tokens, dim);
        Plan::fill(shared.v, static_cast<const T*>(in.v) + at, extent.width(), tokens, dim);
        __syncthreads();
        Logits w, dw;
        typename Plan::Softmax softmax;
        for (int s = 0; s < tiles; ++s) {
          load_slots(s, s == 0);
          Plan::logits(shared.k, shared.address, slots - s * Q, w);
          softmax.add(w);
        }
        softmax.finish(shared.softmax);

        float product[2] = {0.0f, 0.0f};
        for (int s = 0; s < tiles; ++s) {
          load_slots(s, false);
          weight_gradient(softmax, s, tokens, w, dw);
#pragma unroll
          for (int n = 0; n < Plan::kHalf / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) product[i / 2] = fmaf(w[n][i], dw[n][i], product[i / 2]);
          }
        }
        drate += product[0] + product[1];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          product[r] = group_sum<4>(product[r]);
          if (threadIdx.x % 4 == 0) {
            shared.product[Plan::slot() / Plan::kHalf][Plan::token() + fragment_row(2 * r)] = product[r];
          }
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int token = Plan::token() + fragment_row(2 * r);
          product[r] = (shared.product[0][token] + shared.product[1][token]) / rate;
        }

        // Half of the warps add up dk, the others dv, of 16 tokens each.
        const bool of_value = Plan::warp() >= Plan::kWarps / 2;
        Fragments<kDim / 8> dtoken = {};
        for (int s = 0; s < tiles; ++s) {
          if (tiles > 1) {
            load_slots(s, false);
            weight_gradient(softmax, s, tokens, w, dw);
          }
#pragma unroll
          for (int n = 0; n < Plan::kHalf / 8; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int token = Plan::token() + fragment_row(2 * r), slot = Plan::slot() + fragment_column(n, 0);
              const float* x = w[n] + 2 * r;
              const float* dx = dw[n] + 2 * r;
              shared.weights.set(token, slot, x[0], x[1]);
              shared.dlogits.set(token, slot, x[0] * (dx[0] - product[r]), x[1] * (dx[1] - product[r]));
            }
          }
          __syncthreads();
          multiply<false, true, Q>(dtoken, shared.weights, Plan::token(), of_value ? shared.dvalue : shared.dkey, 0);
          if (!of_value) multiply<false, true, Q>(dtoken, shared.dlogits, Plan::token(), shared.address, 0);

          // dA: 16 slots and half of the columns a warp.
          Fragments<kDim / 16> sum = {};
          const int column0 = Plan::slot() / Plan::kHalf * (kDim / 2);
          multiply<true, true, Q>(sum, shared.dlogits, Plan::token(), shared.k, column0);
#pragma unroll
          for (int n = 0; n < kDim / 16; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const int slot = s * Q + Plan::token() + fragment_row(2 * r), column = column0 + fragment_column(n, 0);
              if (slot >= slots) continue;
              float* row = daddress + static_cast<int64_t>(slot) * dim;
              const float2 old = load_pair(row, column, dim);
              store_pair(row, column, dim, old.x + sum[n][2 * r], old.y + sum[n][2 * r + 1]);
            }
          }
          __syncthreads();
        }
        T* target = static_cast<T*>(of_value ? out.dv : out.dk) + at;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int token = Plan::token() + fragment_row(2 * r);
          if (token >= tokens) continue;
#pragma unroll
          for (int n = 0; n < kDim / 8; ++n) {
            store_pair(target + token * extent.width(), fragment_column(n, 0), dim, dtoken[n][2 * r],
                       dtoken[n][2 * r + 1]);
          }
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < slots * dim; i += kThreads) {
      const float a = t < 0 ? 1.0f : starts ? 0.0f : factor[i / dim];
      dkey[i] = fmaf(a, dkey[i], out.dkey[before * dim + i]);
      dvalue[i] = fmaf(a, dvalue[i], out.dvalue[before * dim + i]);
    }
    for (int i = threadIdx.x; i < slots; i += kThreads) {
      dmass[i] = fmaf(t < 0 ? 1.0f : starts ? 0.0f : factor[i], dmass[i], out.dmass[before + i]);
    }
    __syncthreads();
  }

  drate = group_sum(drate);
  if (threadIdx.x % 32 == 0) shared.softmax[Plan::warp()] = drate;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < Plan::kWarps; ++w) total += shared.softmax[w];
    out.drate[b * extent.heads + head] = total / rate;
  }
}

template <typename T, int Dim, int Q>
cudaError_t run(const UpdateInputs& in, const Gradients& out, const MemoryExtent& extent, void* stream) {
  using Plan = UpdatePlan<T, Dim, Q>;
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
  const size_t bytes = sizeof(Shared<Plan>) + 2 * sizeof(float) * ceil_div(extent.slots, Q) * Q;
  return launch(backward_kernel<T, Plan>, grid, dim3(Plan::kThreads), bytes, stream, in, out, extent);
}

template <typename T>
cudaError_t dispatch(const UpdateInputs& in, const Gradients& out, const MemoryExtent& extent, void* stream) {
  if (extent.dim <= 32) return run<T, 32, 64>(in, out, extent, stream);
  if (extent.dim <= 64) return run<T, 64, 64>(in, out, extent, stream);
  if (extent.dim <= 128) return run<T, 128, 32>(in, out, extent, stream);
  if (extent.dim <= 256) return run<T, 256, 32>(in, out, extent, stream);
  return cudaErrorInvalidValue;
}

// Scratch after the index: the gradients of address and rate of each sequence.
int64_t partial_floats(const MemoryExtent& extent) {
  return extent.batch * extent.heads * (static_cast<int64_t>(extent.slots) * extent.dim + 1);
}

}  // namespace
}  // namespace mm_rec

extern "C" int64_t mm_rec_cuda_memory_update_backward_workspace(int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                                                int64_t slots, int64_t window) {
  using namespace mm_rec;
  const MemoryExtent extent{batch, time, heads, static_cast<int>(dim), static_cast<int>(slots), static_cast<int>(window)};
  return static_cast<int64_t>(sizeof(float)) * partial_floats(extent) + write_index_bytes(extent);
}

extern "C" int mm_rec_cuda_memory_update_backward(
    const float* dkey, const float* dvalue, const float* dmass, const float* key, const float* value, const float* mass,
    const void* k, const void* v, int64_t dtype, const float* address, const float* rate, const int64_t* position,
    void* dk, void* dv, float* daddress, float* drate, float* dkey0, float* dvalue0, float* dmass0, float* workspace,
    int64_t batch, int64_t time, int64_t heads, int64_t dim, int64_t slots, int64_t window, void* stream) {
  using namespace mm_rec;
  const MemoryExtent extent{batch, time, heads, static_cast<int>(dim), static_cast<int>(slots), static_cast<int>(window)};
  const int64_t address_size = heads * slots * dim;
  float* drate_partial = workspace + batch * address_size;
  UpdateInputs in{k, v, address, rate, position, {}};
  const Gradients out{dkey, dvalue, dmass,   key,    value,     mass,         dk,
                      dv,   dkey0,  dvalue0, dmass0, workspace, drate_partial};
  // Tokens that no write reads keep a zero gradient.
  const size_t bytes = batch * extent.context() * extent.width() * (dtype == kBFloat16 ? sizeof(bf16) : sizeof(float));
  cudaError_t error = cudaMemsetAsync(dk, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) error = cudaMemsetAsync(dv, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) {
    error = make_write_index(position, extent, workspace + partial_floats(extent), &in.index, stream);
  }
  if (error == cudaSuccess) {
    error = dtype == kBFloat16 ? dispatch<bf16>(in, out, extent, stream) : dispatch<float>(in, out, extent, stream);
  }
  if (error == cudaSuccess) error = sum_partials(workspace, address_size, batch, daddress, address_size, stream);
  if (error == cudaSuccess) error = sum_partials(drate_partial, heads, batch, drate, heads, stream);
  return error;
}
