// recurrence, backward in time. With g_t the gradient at h_t, i_t the gate and h' = h_{t-1} after resets:
//
//   dz_t = g_t i_t;  dgamma_t = g_t h';  du_t = g_t z_t i_t (1 - i_t);  g_{t-1} = dh_{t-1} + gamma_t g_t + W_g^T du_t
//
// and dW_g = sum_t du_t h'^T (recurrence_weight.cu). Only the last product is on the path from step to step, so it is the
// only one done with float32 arithmetic one step at a time. Gates are recomputed from h on the tensor cores: for heads of
// 64 a chunk of 16 rows (steps times sequences) at a time inside the loop, else before it (recurrence_weight.cu).
#include "device.cuh"
#include "gate_product.cuh"
#include "launch.cuh"
#include "matvec.cuh"
#include "recurrence.cuh"
#include "recurrence_backward.cuh"

namespace mm_rec {
namespace {

// A chunk of the inputs of a block, (Steps, Batch, Dim) each. `h` holds h_{t-1}, `u` the gate if it is known.
template <typename U, typename Tile, int Steps>
struct Chunk {
  static constexpr int kElements = Steps * Tile::kBatch * Tile::kDim;
  static constexpr int kPitch = Tile::kDim + 8;  // of rows of h: rows of a matrix fragment then fall in different banks
  float dh[kElements];
  float h[Steps * Tile::kBatch * kPitch];
  float z[kElements];
  float gamma[kElements];
  U u[kElements];
};

template <typename U, typename Tile, int Steps, int Stages, bool Recompute>
struct Shared {
  Chunk<U, Tile, Steps> stage[Stages];
  float gate[Recompute ? kGateRows * (Tile::kDim + 8) : 4];
  float du[2][Tile::kBatch * Tile::kDim];
  float matrix[Tile::kSharedFloats > 0 ? Tile::kSharedFloats : 4];
};

// `U` is the type of the staged u, or float for a known gate; `DU` the type of du.
template <typename U, typename DU, typename Tile, int Steps, int Stages, int MinBlocks, bool Recompute>
__global__ void __launch_bounds__(Tile::kThreads, MinBlocks)
    backward_kernel(const RecurrenceBackward p, const Extent extent) {
  constexpr int kDim = Tile::kDim, kBatch = Tile::kBatch, kOwned = Tile::kOwned;
  constexpr int kPitch = Chunk<U, Tile, Steps>::kPitch;
  static_assert(!Recompute || Steps * kBatch == kGateRows, "a chunk is one matrix fragment");
  auto& shared = *reinterpret_cast<Shared<U, Tile, Steps, Stages, Recompute>*>(dynamic_shared());
  const int64_t head = blockIdx.x, first_sequence = static_cast<int64_t>(blockIdx.y) * kBatch;
  const int64_t width = extent.heads * kDim, chunks = ceil_div(extent.time, Steps);

  // Chunk c holds the steps T - 1 - c * Steps, ..., backward.
  const auto prefetch = [&](int64_t chunk) {
    if (chunk < chunks) {
      auto& to = shared.stage[chunk % Stages];
      const int64_t t0 = extent.time - 1 - chunk * Steps;
      const auto copy = [&](auto* target, const auto* source, int64_t stride) {
        copy_rows<Tile::kThreads, Steps, kBatch, kDim, kDim>(target, source + head * kDim, stride, first_sequence, t0, -1,
                                                             extent);
      };
      copy_rows<Tile::kThreads, Steps, kBatch, kDim, kPitch>(to.h, p.h + head * kDim, width, first_sequence, t0 - 1, -1,
                                                             extent);
      copy(to.dh, p.dh, width);
      copy(to.z, p.z, width);
      copy(to.gamma, p.gamma, width);
      if constexpr (Recompute) {
        copy(to.u, static_cast<const U*>(p.u), p.u_stride);
      } else {
        copy(to.u, p.gate, width);
      }
    }
    cp_async_commit();
  };
#pragma unroll
  for (int chunk = 0; chunk < Stages - 1; ++chunk) prefetch(chunk);

  const float* w_g = p.w_g + head * kDim * kDim;
  GateProduct<Tile> product;  // the compiler drops it if gates are known
  if constexpr (Recompute) product.load_matrix(w_g);
  Tile transposed;
  transposed.template load_matrix<true>(w_g, shared.matrix);

  const int vector = Tile::owned_vector(), row = Tile::owned_row(), own = vector * kDim + row;
  const int64_t sequence = first_sequence + vector, column = head * kDim + row;
  const bool real = sequence < extent.batch;
  float h0[kOwned] = {}, carried[kOwned] = {};  // carried: the part of g_t that comes from step t + 1
  if (real && p.h0 != nullptr) load<kOwned>(p.h0 + sequence * width + column, h0);
  if (real && p.dh_last != nullptr) load<kOwned>(p.dh_last + sequence * width + column, carried);

  ResetFlags<kBatch> flags;
  flags.load(p.reset, first_sequence, extent.time - 1, -1, extent);
  unsigned resets[kBatch];
  flags.bits(resets);
  int current = 0;
  int64_t at = (sequence * extent.time + extent.time - 1) * width + column;

  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<Stages - 2>();
    __syncthreads();
    prefetch(chunk + Stages - 1);
    flags.load(p.reset, first_sequence, extent.time - 1 - (chunk + 1) * Steps, -1, extent);
    auto& in = shared.stage[chunk % Stages];
    const int steps = static_cast<int>(min(extent.time - chunk * Steps, static_cast<int64_t>(Steps)));
    if (chunk + 1 == chunks) {  // the step before the first is h0
      store<kOwned>(in.h + ((steps - 1) * kBatch + vector) * kPitch + row, h0);
      if constexpr (Recompute) __syncthreads();
    }
    if constexpr (Recompute) {
      product.gates(in.h, in.u, resets, shared.gate);
      __syncthreads();
    }
    const unsigned own_resets = pick(resets, vector);
    for (int s = 0; s < steps; ++s) {
      const int line = s * kBatch + vector, from = line * kDim + row;
      float g[kOwned], h[kOwned], z[kOwned], gamma[kOwned], gate[kOwned], du[kOwned], fed_back[kOwned];
      load<kOwned>(in.dh + from, g);
      load<kOwned>(in.h + line * kPitch + row, h);
      load<kOwned>(in.z + from, z);
      load<kOwned>(in.gamma + from, gamma);
      if constexpr (Recompute) {
        load<kOwned>(shared.gate + line * (kDim + 8) + row, gate);
      } else {
        load<kOwned>(in.u + from, gate);
      }
      const float keep = (own_resets >> s) & 1 ? 0.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        g[i] += carried[i];
        du[i] = g[i] * z[i] * gate[i] * (1.0f - gate[i]);
        z[i] = g[i] * gate[i];
        h[i] = keep * g[i] * h[i];
      }
      store<kOwned>(shared.du[current] + own, du);
      __syncthreads();
      if (real) {
        store<kOwned>(p.dz + at, z);
        store<kOwned>(p.dgamma + at, h);
        store<kOwned>(static_cast<DU*>(p.du) + at, du);
      }
      at -= width;
      transposed.multiply(shared.du[current], shared.matrix, fed_back);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) carried[i] = keep * fmaf(gamma[i], g[i], fed_back[i]);
      current ^= 1;
    }
    flags.bits(resets);
  }
  if (real) store<kOwned>(p.dh0 + sequence * width + column, carried);
}

template <typename U, typename DU, typename Tile, int Steps, int Stages, int MinBlocks, bool Recompute>
cudaError_t run(const RecurrenceBackward& p, const Extent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(ceil_div(extent.batch, Tile::kBatch)));
  return launch(backward_kernel<U, DU, Tile, Steps, Stages, MinBlocks, Recompute>, grid, dim3(Tile::kThreads),
                sizeof(Shared<U, Tile, Steps, Stages, Recompute>), stream, p, extent);
}

// Any head size, gates known: one block a head and sequence.
template <typename DU>
__global__ void backward_any_size_kernel(const RecurrenceBackward p, const Extent extent, int dim, bool keep_matrix) {
  float* du_t = reinterpret_cast<float*>(dynamic_shared());
  float* carried = du_t + dim;
  const int64_t head = blockIdx.x, sequence = blockIdx.y, width = extent.heads * dim;
  const HeadMatrix w_g(p.w_g + head * dim * dim, carried + dim, dim, keep_matrix);
  const int64_t state = sequence * width + head * dim;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) carried[i] = p.dh_last == nullptr ? 0.0f : p.dh_last[state + i];
  for (int64_t t = extent.time - 1; t >= 0; --t) {
    const int64_t step = sequence * extent.time + t, at = step * width + head * dim;
    const float keep = p.reset != nullptr && p.reset[step] ? 0.0f : 1.0f;
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {  // element i of `carried` stays with one thread
      const float g = p.dh[at + i] + carried[i], gate = p.gate[at + i];
      const float h = t > 0 ? p.h[at - width + i] : p.h0 == nullptr ? 0.0f : p.h0[state + i];
      du_t[i] = g * p.z[at + i] * gate * (1.0f - gate);
      carried[i] = p.gamma[at + i] * g;
      p.dz[at + i] = g * gate;
      p.dgamma[at + i] = keep * g * h;
      static_cast<DU*>(p.du)[at + i] = from_float<DU>(du_t[i]);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < dim; j += blockDim.x) {
      float sum = carried[j];
      for (int i = 0; i < dim; ++i) sum = fmaf(w_g(i, j), du_t[i], sum);
      carried[j] = keep * sum;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < dim; i += blockDim.x) p.dh0[state + i] = carried[i];
}

template <typename U>
cudaError_t dispatch(const RecurrenceBackward& p, const Extent& extent, int dim, void* stream) {
  if (dim == 64) {
    // A block takes one sequence as long as all blocks run at once, four to a multiprocessor, else two.
    if (extent.batch * extent.heads > 4 * multiprocessors()) {
      return run<U, U, MatrixTile<64, 4, 2, 2, 0>, 8, 2, 4, true>(p, extent, stream);
    }
    return run<U, U, MatrixTile<64, 4, 4, 1, 0>, 16, 2, 2, true>(p, extent, stream);
  }
  if (dim == 128) return run<float, U, MatrixTile<128, 4, 4, 2, 0>, 4, 2, 2, false>(p, extent, stream);
  using Tile256 = MatrixTile<256, 8, 4, 2, 16>;
  if (dim == 256 && sizeof(Shared<float, Tile256, 2, 2, false>) <= static_cast<size_t>(shared_memory_limit())) {
    return run<float, U, Tile256, 2, 2, 1, false>(p, extent, stream);
  }
  const AnySize plan(dim, 2);
  return launch(backward_any_size_kernel<U>, plan.grid(extent), plan.block(), plan.shared_bytes, stream, p, extent, dim,
                plan.keep_matrix);
}

}  // namespace

bool recurrence_needs_gate(int64_t dim) { return dim != 64; }

}  // namespace mm_rec

extern "C" int64_t mm_rec_cuda_recurrence_backward_workspace(int64_t batch, int64_t time, int64_t heads, int64_t dim) {
  using namespace mm_rec;
  const Extent extent{batch, time, heads};
  const int64_t gate = recurrence_needs_gate(dim) ? batch * time * heads * dim : 0;
  return static_cast<int64_t>(sizeof(float)) * (gate + weight_gradient_workspace(extent, dim));
}

extern "C" int mm_rec_cuda_recurrence_backward(const float* dh, const float* dh_last, const float* h, const float* z,
                                               const void* u, int64_t u_dtype, int64_t u_stride, const float* gamma,
                                               const float* w_g, const float* h0, const bool* reset, float* dz,
                                               void* du, float* dgamma, float* dw_g, float* dh0, float* workspace,
                                               int64_t batch, int64_t time, int64_t heads, int64_t dim, void* stream) {
  using namespace mm_rec;
  const Extent extent{batch, time, heads};
  const int64_t gate_size = recurrence_needs_gate(dim) ? batch * time * heads * dim : 0;
  const RecurrenceBackward p{dh,    dh_last, h,  z,  u,      u_dtype, u_stride, gamma, workspace,
                             w_g,   h0,      reset, dz, du, dgamma,  dw_g,    dh0};
  if (gate_size > 0) {
    const cudaError_t error = recurrence_gate(p, workspace, extent, dim, stream);
    if (error != cudaSuccess) return error;
  }
  const int size = static_cast<int>(dim);
  const cudaError_t error =
      u_dtype == kBFloat16 ? dispatch<bf16>(p, extent, size, stream) : dispatch<float>(p, extent, size, stream);
  if (error != cudaSuccess) return error;
  return recurrence_weight_gradient(p, workspace + gate_size, extent, dim, stream);
}
