// memory_update, backward: a block of threads owns one head of one sequence and goes through its writes from the last
// to the first. With G the gradient at a version of (key, value) and g at its mass, a write has
//
//   da[s]   = G[s] . M_before[s] + g[s] mass_before[s]         (0 if the document starts here: a counts as 0)
//   dw[p,s] = k_p . G_key[s] + v_p . G_value[s] + g[s] - da[s] a[s] / (1 - w[p,s])
//   dk_p    = sum_s w[p,s] G_key[s] + dl[p,s] A[s];  dv_p = sum_s w[p,s] G_value[s];  dA[s] = sum_p dl[p,s] k_p
//   dl[p,s] = w[p,s] (dw[p,s] - sum_s' w[p,s'] dw[p,s'] / rate)
//
// and G of the version before is its own gradient plus a G. Where it fits, G stays in registers, as do the sums of dA;
// else both live in the outputs, where this block alone touches them.
#include "launch.cuh"
#include "memory_write.cuh"
#include "reduce.cuh"

namespace mm_rec {
namespace {

template <typename Plan>
struct Shared {
  typename Plan::Tokens k, v;
  typename Plan::Slots address, dkey, dvalue;
  typename Plan::Weights weights, dlogits;
  float2 softmax[Plan::kSides * Plan::kQ];
  float2 columns[Plan::kQ / 16 * Plan::kQ];
  float product[Plan::kSides][Plan::kQ];  // of each token, the sum over a side's slots of w dw
  float inner[Plan::kSides][Plan::kQ];    // of each slot, the sum over a side's columns of G M
  float drate[Plan::kWarps];
};

// `Resident`: one tile of slots and one of tokens, so that G and dA stay in registers and weights are computed once.
template <typename T, typename Plan, bool Resident>
__global__ void __launch_bounds__(Plan::kThreads, 1)
    backward_kernel(const UpdateInputs in, const UpdateGradients out, const MemoryExtent extent) {
  constexpr int Q = Plan::kQ, kDim = Plan::kDim, kThreads = Plan::kThreads;
  using Logits = typename Plan::Logits;
  using Rows = typename Plan::Rows;
  auto& shared = *reinterpret_cast<Shared<Plan>*>(dynamic_shared());
  const int64_t b = blockIdx.y, head = blockIdx.x;
  const int dim = extent.dim, slots = extent.slots, block = extent.block();
  const int tiles = Resident ? 1 : static_cast<int>(ceil_div(slots, Q));
  const int token_end = Resident ? 1 : block;  // loops over tokens step by Q
  // Of each slot the factor a, its gradient, and g; after the fixed part of the shared memory.
  float* factor = reinterpret_cast<float*>(&shared + 1);
  float* dfactor = factor + tiles * Q;
  float* dmass = dfactor + tiles * Q;
  const float rate = in.rate[head];
  const float* address = in.address + head * slots * dim;

  // A warp holds 16 slots of G of the key or of the value, and 16 slots of dA, each with some of the columns.
  const bool of_value = Plan::of_value();
  const int first = Plan::token(), column = Plan::column(), address_column = Plan::side() * (kDim / Plan::kSides);
  const int64_t home = (b * extent.heads + head) * slots;  // row of the first slot in (B, H, S, d)
  float* running = (of_value ? out.dvalue0 : out.dkey0) + home * dim + column;
  const float* upstream = (of_value ? out.dvalue : out.dkey) + column;
  const float* memory = (of_value ? out.value : out.key) + column;
  float* daddress = out.daddress + home * dim + address_column;
  const int64_t last = extent.slots_at(b, extent.writes(), head);
  Rows gradient;
  Fragments<kDim / Plan::kSides / 8> address_sum = {};
  for (int i = threadIdx.x; i < slots; i += kThreads) dmass[i] = out.dmass[last + i];
  for (int s = 0; s < tiles; ++s) {
    const int64_t at = static_cast<int64_t>(s) * Q * dim;
    load_rows(upstream + last * dim + at, first, slots - s * Q, dim, dim - column, gradient);
    if constexpr (!Resident) {
      store_rows(running + at, first, slots - s * Q, dim, dim - column, gradient);
      store_rows(daddress + at, first, slots - s * Q, dim, dim - address_column, address_sum);
    }
  }
  __syncthreads();

  int loaded = -1;  // which tile of slots is in shared memory
  const auto load_slots = [&](int s, bool fresh) {
    if (loaded == s && (Resident || !fresh)) return;
    const int64_t at = static_cast<int64_t>(s) * Q * dim;
    typename Plan::template Loads<float> rows;
    rows.fetch(address + at, dim, slots - s * Q, dim);
    __syncthreads();
    rows.put(shared.address);
    if constexpr (!Resident) {
      rows.fetch(out.dkey0 + home * dim + at, dim, slots - s * Q, dim);
      rows.put(shared.dkey);
      rows.fetch(out.dvalue0 + home * dim + at, dim, slots - s * Q, dim);
      rows.put(shared.dvalue);
    }
    loaded = s;
    __syncthreads();
  };
  const auto load_tokens = [&](int64_t at, int tokens) {
    typename Plan::template Loads<T> k, v;
    k.fetch(static_cast<const T*>(in.k) + at, extent.width(), tokens, dim);
    v.fetch(static_cast<const T*>(in.v) + at, extent.width(), tokens, dim);
    __syncthreads();
    k.put(shared.k);
    v.put(shared.v);
    __syncthreads();
  };
  // Denominators of the loaded tokens' weights; `w` is left with the logits of the last tile of slots.
  const auto denominators = [&](typename Plan::Softmax& softmax, Logits& w, bool fresh) {
    softmax = {};
    for (int s = 0; s < tiles; ++s) {
      load_slots(s, fresh && s == 0);
      Plan::logits(shared.k, shared.address, slots - s * Q, w);
      softmax.add(w);
    }
    softmax.finish(shared.softmax);
  };
  // Weights of this warp's tokens and slots of tile s.
  const auto weigh = [&](const typename Plan::Softmax& softmax, int s, int tokens, Logits& w) {
    load_slots(s, false);
    if constexpr (!Resident) Plan::logits(shared.k, shared.address, slots - s * Q, w);
    Plan::weights(softmax, rate, tokens, w);
  };
  // Their gradients.
  const auto weight_gradient = [&](int s, const Logits& w, Logits& dw) {
    zero(dw);
    multiply<false, false, kDim>(dw, shared.k, Plan::token(), shared.dkey, Plan::slot());
    multiply<false, false, kDim>(dw, shared.v, Plan::token(), shared.dvalue, Plan::slot());
#pragma unroll
    for (int n = 0; n < Plan::kSpan / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int slot = s * Q + Plan::slot() + fragment_column(n, i);
        if (slot >= slots) continue;
        // A weight of exactly 1 makes the product 0 whatever the others are; their gradient is lost there.
        const float others = w[n][i] < 1.0f ? __fdividef(factor[slot], 1.0f - w[n][i]) : 0.0f;
        dw[n][i] += dmass[slot] - dfactor[slot] * others;
      }
    }
  };

  // Contexts that no write reads have no gradient.
  const auto clear = [&](int64_t from, int64_t to) {
    const int pairs = dim / 2;
    for (int64_t i = threadIdx.x; i < (to - from) * pairs; i += kThreads) {
      const int64_t at = extent.context_at(b, from + i / pairs, head) + i % pairs * 2;
      const float zeros[2] = {};
      store<2>(static_cast<T*>(out.dk) + at, zeros);
      store<2>(static_cast<T*>(out.dv) + at, zeros);
    }
  };

  float drate = 0.0f;
  int64_t cleared = extent.context();  // from here on dk and dv are there
  for (int64_t e = extent.writes() - 1; e >= 0; --e) {
    const int64_t before = extent.slots_at(b, e, head);
    const int t = in.index.event[b * extent.writes() + e];
    const bool starts = t >= 0 && in.position[b * extent.time + t] == extent.window;
    if (t >= 0) {
      clear(t + block, cleared);
      cleared = t;
      // Factors.
      Logits w, dw;
      typename Plan::Softmax softmax;
      for (int i = threadIdx.x; i < tiles * Q; i += kThreads) factor[i] = 1.0f;
      for (int p0 = 0; p0 < token_end; p0 += Q) {
        load_tokens(extent.context_at(b, t + p0, head), block - p0);
        denominators(softmax, w, false);
        for (int s = 0; s < tiles; ++s) {
          weigh(softmax, s, block - p0, w);
          Plan::accumulate_columns(w, shared.columns, factor + s * Q, nullptr);
        }
      }
      // Their gradients: G . M.
      for (int s = 0; s < tiles; ++s) {
        const int64_t at = static_cast<int64_t>(s) * Q * dim;
        Rows old;
        load_rows(memory + before * dim + at, first, slots - s * Q, dim, dim - column, old);
        if constexpr (Resident) {
          auto& tile = of_value ? shared.dvalue : shared.dkey;
#pragma unroll
          for (int n = 0; n < Plan::kPart / 8; ++n) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              tile.set(first + fragment_row(2 * r), column + fragment_column(n, 0), gradient[n][2 * r],
                       gradient[n][2 * r + 1]);
            }
          }
        } else {
          load_rows(running + at, first, slots - s * Q, dim, dim - column, gradient);
        }
        float inner[2] = {0.0f, 0.0f};
#pragma unroll
        for (int n = 0; n < Plan::kPart / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) inner[i / 2] = fmaf(gradient[n][i], old[n][i], inner[i / 2]);
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          inner[r] = group_sum<4>(inner[r]);
          if (threadIdx.x % 4 == 0) shared.inner[Plan::side()][first + fragment_row(2 * r)] = inner[r];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < Q && s * Q + i < slots; i += kThreads) {
          const int slot = s * Q + i;
          float whole = dmass[slot] * out.mass[before + slot];
          for (int side = 0; side < Plan::kSides; ++side) whole += shared.inner[side][i];
          dfactor[slot] = starts ? 0.0f : whole;
        }
        __syncthreads();
      }
      // Tokens, addresses and rate.
      for (int p0 = 0; p0 < token_end; p0 += Q) {
        const int64_t at = extent.context_at(b, t + p0, head);
        const int tokens = block - p0;
        if constexpr (!Resident) {
          load_tokens(at, tokens);
          denominators(softmax, w, true);
        }
        float product[2] = {0.0f, 0.0f};
        for (int s = 0; s < tiles; ++s) {
          if constexpr (!Resident) weigh(softmax, s, tokens, w);
          weight_gradient(s, w, dw);
#pragma unroll
          for (int n = 0; n < Plan::kSpan / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) product[i / 2] = fmaf(w[n][i], dw[n][i], product[i / 2]);
          }
        }
        drate += product[0] + product[1];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          product[r] = group_sum<4>(product[r]);
          if (threadIdx.x % 4 == 0) shared.product[Plan::side()][Plan::token() + fragment_row(2 * r)] = product[r];
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float whole = 0.0f;
          for (int side = 0; side < Plan::kSides; ++side) {
            whole += shared.product[side][Plan::token() + fragment_row(2 * r)];
          }
          product[r] = whole / rate;
        }

        Rows dtoken = {};  // of dk or dv, 16 tokens
        for (int s = 0; s < tiles; ++s) {
          if (tiles > 1) {
            weigh(softmax, s, tokens, w);
            weight_gradient(s, w, dw);
          }
          Plan::put(shared.weights, w);
#pragma unroll
          for (int n = 0; n < Plan::kSpan / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) dw[n][i] = w[n][i] * (dw[n][i] - product[i / 2]);
          }
          Plan::put(shared.dlogits, dw);
          __syncthreads();
          multiply<false, true, Q>(dtoken, shared.weights, first, of_value ? shared.dvalue : shared.dkey, column);
          if (!of_value) multiply<false, true, Q>(dtoken, shared.dlogits, first, shared.address, column);
          if constexpr (!Resident) {
            load_rows(daddress + static_cast<int64_t>(s) * Q * dim, first, slots - s * Q, dim, dim - address_column,
                      address_sum);
          }
          multiply<true, true, Q>(address_sum, shared.dlogits, first, shared.k, address_column);
          if constexpr (!Resident) {
            store_rows(daddress + static_cast<int64_t>(s) * Q * dim, first, slots - s * Q, dim, dim - address_column,
                       address_sum);
          }
          __syncthreads();
        }
        T* target = static_cast<T*>(of_value ? out.dv : out.dk) + at + column;
        store_rows(target, first, tokens, extent.width(), dim - column, dtoken);
      }
    }
    // On to the version before.
    for (int s = 0; s < tiles; ++s) {
      const int64_t at = static_cast<int64_t>(s) * Q * dim;
      Rows own;
      load_rows(upstream + before * dim + at, first, slots - s * Q, dim, dim - column, own);
      if constexpr (!Resident) load_rows(running + at, first, slots - s * Q, dim, dim - column, gradient);
#pragma unroll
      for (int n = 0; n < Plan::kPart / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float a = t < 0 ? 1.0f : starts ? 0.0f : factor[s * Q + first + fragment_row(i)];
          gradient[n][i] = fmaf(a, gradient[n][i], own[n][i]);
        }
      }
      if constexpr (!Resident) store_rows(running + at, first, slots - s * Q, dim, dim - column, gradient);
    }
    for (int i = threadIdx.x; i < slots; i += kThreads) {
      dmass[i] = fmaf(t < 0 ? 1.0f : starts ? 0.0f : factor[i], dmass[i], out.dmass[before + i]);
    }
    __syncthreads();
  }

  clear(0, cleared);
  if constexpr (Resident) {
    store_rows(running, first, slots, dim, dim - column, gradient);
    store_rows(daddress, first, slots, dim, dim - address_column, address_sum);
  }
  for (int i = threadIdx.x; i < slots; i += kThreads) out.dmass0[home + i] = dmass[i];
  drate = group_sum(drate);
  if (threadIdx.x % 32 == 0) shared.drate[Plan::warp()] = drate;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < Plan::kWarps; ++w) total += shared.drate[w];
    out.drate[b * extent.heads + head] = total / rate;
  }
}

template <typename T, int Dim, int Q, int Sides>
size_t shared_bytes(const MemoryExtent& extent) {
  return sizeof(Shared<UpdatePlan<T, Dim, Q, Sides>>) + 3 * sizeof(float) * ceil_div(extent.slots, Q) * Q;
}

template <typename T, int Dim, int Q, int Sides, bool Resident>
cudaError_t run(const UpdateInputs& in, const UpdateGradients& out, const MemoryExtent& extent, void* stream) {
  using Plan = UpdatePlan<T, Dim, Q, Sides>;
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
  return launch(backward_kernel<T, Plan, Resident>, grid, dim3(Plan::kThreads), shared_bytes<T, Dim, Q, Sides>(extent), stream,
                in, out, extent);
}

template <typename T>
cudaError_t dispatch(const UpdateInputs& in, const UpdateGradients& out, const MemoryExtent& extent, void* stream) {
  if (extent.dim <= 64 && shared_bytes<T, 64, 64, 4>(extent) <= shared_memory_limit()) {
    const bool resident = extent.slots <= 64 && extent.block() <= 64;
    return resident ? run<T, 64, 64, 4, true>(in, out, extent, stream) : run<T, 64, 64, 4, false>(in, out, extent, stream);
  }
  if (extent.dim <= 128) return run<T, 128, 32, 2, false>(in, out, extent, stream);
  if (extent.dim <= 256) return run<T, 256, 32, 2, false>(in, out, extent, stream);
  return cudaErrorInvalidValue;
}

// Sums of the gradients of address and rate: a sequence has one of each, or one for each of its parts.
int64_t partials(const MemoryExtent& extent) {
  return extent.batch * (writes_backward(kBFloat16, extent) ? write_backward_parts(extent) : 1);
}
int64_t partial_floats(const MemoryExtent& extent) {
  return partials(extent) * extent.heads * (static_cast<int64_t>(extent.slots) * extent.dim + 1);
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
  const int64_t address_size = heads * slots * dim, count = writes_backward(dtype, extent) ? partials(extent) : batch;
  float* drate_partial = workspace + count * address_size;
  UpdateInputs in{k, v, address, rate, position, {}};
  const UpdateGradients out{dkey, dvalue, dmass,   key,    value,     mass,         dk,
                            dv,   dkey0,  dvalue0, dmass0, workspace, drate_partial};
  cudaError_t error = make_write_index(position, extent, workspace + partial_floats(extent), &in.index, stream);
  if (error == cudaSuccess) {
    error = writes_backward(dtype, extent) ? write_backward(in, out, extent, stream)
            : dtype == kBFloat16 ? dispatch<bf16>(in, out, extent, stream)
                                 : dispatch<float>(in, out, extent, stream);
  }
  if (error == cudaSuccess) error = sum_partials(workspace, address_size, count, daddress, address_size, stream);
  if (error == cudaSuccess) error = sum_partials(drate_partial, heads, count, drate, heads, stream);
  return error;
}
