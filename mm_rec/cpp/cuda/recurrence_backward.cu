// recurrence, backward in time. With g_t the gradient at h_t, i_t the gate and h' = h_{t-1} after resets:
//
//   dz_t = g_t i_t;  dgamma_t = g_t h';  du_t = g_t z_t i_t (1 - i_t);  g_{t-1} = dh_{t-1} + gamma_t g_t + W_g^T du_t
//
// and dW_g = sum_t du_t h'^T (recurrence_weight.cu). Only the last product is on the path from step to step, so it is the
// only one done one step at a time; gates are computed before, for all steps at once. Many sequences with heads of 64 go
// another way (recurrence_backward_grouped.cu).
#include "device.cuh"
#include "launch.cuh"
#include "matvec.cuh"
#include "recurrence.cuh"
#include "recurrence_backward.cuh"
#include "reduce.cuh"

namespace mm_rec {
namespace {

// A chunk of the inputs of a block, (Steps, Batch, Dim) each. `h` holds h_{t-1}.
template <typename Tile, int Steps>
struct Chunk {
  static constexpr int kElements = Steps * Tile::kBatch * Tile::kDim;
  float dh[kElements];
  float h[kElements];
  float z[kElements];
  float gamma[kElements];
  float gate[kElements];
};

template <typename Tile, int Steps, int Stages>
struct Shared {
  Chunk<Tile, Steps> stage[Stages];
  float du[2][Tile::kBatch * Tile::kDim];
  float matrix[Tile::kSharedFloats > 0 ? Tile::kSharedFloats : 4];
};

// `DU` is the type of du.
template <typename DU, typename Tile, int Steps, int Stages, int MinBlocks>
__global__ void __launch_bounds__(Tile::kThreads, MinBlocks)
    backward_kernel(const RecurrenceBackward p, float* __restrict__ dbias_partial, const Extent extent) {
  constexpr int kDim = Tile::kDim, kBatch = Tile::kBatch, kOwned = Tile::kOwned;
  auto& shared = *reinterpret_cast<Shared<Tile, Steps, Stages>*>(dynamic_shared());
  const int64_t head = blockIdx.x, first_sequence = static_cast<int64_t>(blockIdx.y) * kBatch;
  const int64_t width = extent.heads * kDim, chunks = ceil_div(extent.time, Steps);

  // Chunk c holds the steps T - 1 - c * Steps, ..., backward.
  const auto prefetch = [&](int64_t chunk) {
    if (chunk < chunks) {
      auto& to = shared.stage[chunk % Stages];
      const int64_t t0 = extent.time - 1 - chunk * Steps;
      const auto copy = [&](float* target, const float* source, int64_t t) {
        copy_rows<Tile::kThreads, Steps, kBatch, kDim, kDim>(target, source + head * kDim, width, first_sequence, t, -1,
                                                             extent);
      };
      copy(to.dh, p.dh, t0);
      copy(to.h, p.h, t0 - 1);
      copy(to.z, p.z, t0);
      copy(to.gamma, p.gamma, t0);
      copy(to.gate, p.gate, t0);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int chunk = 0; chunk < Stages - 1; ++chunk) prefetch(chunk);

  Tile transposed;
  transposed.template load_matrix<true>(p.w_g + head * kDim * kDim, shared.matrix);

  const int vector = Tile::owned_vector(), row = Tile::owned_row(), own = vector * kDim + row;
  const int64_t sequence = first_sequence + vector, column = head * kDim + row;
  const bool real = sequence < extent.batch;
  float h0[kOwned] = {}, du_sum[kOwned] = {}, carried[kOwned] = {};  // carried: the part of g_t that comes from step t + 1
  if (real && p.h0 != nullptr) load<kOwned>(p.h0 + sequence * width + column, h0);
  if (real && p.dh_last != nullptr) load<kOwned>(p.dh_last + sequence * width + column, carried);

  ResetFlags<kBatch> flags;
  flags.load(p.reset, first_sequence, extent.time - 1, -1, extent);
  unsigned resets[kBatch];
  flags.bits(resets);
  int current = 0;
  const int64_t line = sequence * extent.time + extent.time - 1;
  int64_t at = line * width + column, du_at = line * p.du_stride + column;

  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<Stages - 2>();
    __syncthreads();
    prefetch(chunk + Stages - 1);
    flags.load(p.reset, first_sequence, extent.time - 1 - (chunk + 1) * Steps, -1, extent);
    auto& in = shared.stage[chunk % Stages];
    const int steps = static_cast<int>(min(extent.time - chunk * Steps, static_cast<int64_t>(Steps)));
    if (chunk + 1 == chunks) store<kOwned>(in.h + (steps - 1) * kBatch * kDim + own, h0);  // the step before the first
    const unsigned own_resets = pick(resets, vector);
    for (int s = 0; s < steps; ++s) {
      const int from = s * kBatch * kDim + own;
      float g[kOwned], h[kOwned], z[kOwned], gamma[kOwned], gate[kOwned], du[kOwned], fed_back[kOwned];
      load<kOwned>(in.dh + from, g);
      load<kOwned>(in.h + from, h);
      load<kOwned>(in.z + from, z);
      load<kOwned>(in.gamma + from, gamma);
      load<kOwned>(in.gate + from, gate);
      const float keep = (own_resets >> s) & 1 ? 0.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        g[i] += carried[i];
        du[i] = g[i] * z[i] * gate[i] * (1.0f - gate[i]);
        du_sum[i] += du[i];
        z[i] = g[i] * gate[i];
        h[i] = keep * g[i] * h[i];
      }
      store<kOwned>(shared.du[current] + own, du);
      __syncthreads();
      if (real) {
        store<kOwned>(p.dz + at, z);
        store<kOwned>(p.dgamma + at, h);
        store<kOwned>(static_cast<DU*>(p.du) + du_at, du);
      }
      at -= width;
      du_at -= p.du_stride;
      transposed.multiply(shared.du[current], shared.matrix, fed_back);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) carried[i] = keep * fmaf(gamma[i], g[i], fed_back[i]);
      current ^= 1;
    }
    flags.bits(resets);
  }
  if (real) store<kOwned>(p.dh0 + sequence * width + column, carried);
  if (real && p.u_bias != nullptr) store<kOwned>(dbias_partial + sequence * width + column, du_sum);
}

template <typename DU, typename Tile, int Steps, int Stages, int MinBlocks>
cudaError_t run(const RecurrenceBackward& p, float* dbias_partial, const Extent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(ceil_div(extent.batch, Tile::kBatch)));
  return launch(backward_kernel<DU, Tile, Steps, Stages, MinBlocks>, grid, dim3(Tile::kThreads),
                sizeof(Shared<Tile, Steps, Stages>), stream, p, dbias_partial, extent);
}

// Any head size, gates known: one block a head and sequence.
template <typename DU>
__global__ void backward_any_size_kernel(const RecurrenceBackward p, float* __restrict__ dbias_partial,
                                         const Extent extent, int dim, bool keep_matrix) {
  float* du_t = reinterpret_cast<float*>(dynamic_shared());
  float* carried = du_t + dim;
  float* du_sum = carried + dim;
  const int64_t head = blockIdx.x, sequence = blockIdx.y, width = extent.heads * dim;
  const HeadMatrix w_g(p.w_g + head * dim * dim, du_sum + dim, dim, keep_matrix);
  const int64_t state = sequence * width + head * dim;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    carried[i] = p.dh_last == nullptr ? 0.0f : p.dh_last[state + i];
    du_sum[i] = 0.0f;
  }
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
      static_cast<DU*>(p.du)[step * p.du_stride + head * dim + i] = from_float<DU>(du_t[i]);
      du_sum[i] += du_t[i];
    }
    __syncthreads();
    for (int j = threadIdx.x; j < dim; j += blockDim.x) {
      float sum = carried[j];
      for (int i = 0; i < dim; ++i) sum = fmaf(w_g(i, j), du_t[i], sum);
      carried[j] = keep * sum;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    p.dh0[state + i] = carried[i];
    if (p.u_bias != nullptr) dbias_partial[state + i] = du_sum[i];
  }
}

using Tile64 = MatrixTile<64, 4, 2, 2, 0>;

// A step of one group of sequences takes longer than one of the loop above, but that of all groups that the device holds
// takes no longer; so the loop has the advantage while each of its blocks has a multiprocessor to itself.
bool grouped(const Extent& extent, int64_t dim) {
  return recurrence_grouped(dim) && extent.heads * ceil_div(extent.batch, Tile64::kBatch) > multiprocessors();
}

template <typename U>
cudaError_t dispatch(const RecurrenceBackward& p, float* dbias_partial, const Extent& extent, int dim, void* stream) {
  if (dim == 64) return run<U, Tile64, 8, 2, 4>(p, dbias_partial, extent, stream);
  if (dim == 128) return run<U, MatrixTile<128, 4, 4, 2, 0>, 4, 2, 2>(p, dbias_partial, extent, stream);
  using Tile256 = MatrixTile<256, 8, 4, 2, 16>;
  if (dim == 256 && sizeof(Shared<Tile256, 2, 2>) <= shared_memory_limit()) {
    return run<U, Tile256, 2, 2, 1>(p, dbias_partial, extent, stream);
  }
  const AnySize plan(dim, 3);
  return launch(backward_any_size_kernel<U>, plan.grid(extent), plan.block(), plan.shared_bytes, stream, p,
                dbias_partial, extent, dim, plan.keep_matrix);
}

// Scratch of the three kernels, in floats: gates, partial sums for the bias, then for the matrix.
int64_t gate_size(const Extent& extent, int64_t dim) { return extent.batch * extent.time * extent.heads * dim; }
int64_t bias_size(const Extent& extent, int64_t dim) { return extent.batch * extent.heads * dim; }

cudaError_t in_three_kernels(RecurrenceBackward p, float* workspace, const Extent& extent, int dim, void* stream) {
  float* dbias = workspace + gate_size(extent, dim);
  p.gate = workspace;
  cudaError_t error = recurrence_gate(p, workspace, extent, dim, stream);
  if (error == cudaSuccess) {
    error = p.u_dtype == kBFloat16 ? dispatch<bf16>(p, dbias, extent, dim, stream)
                                   : dispatch<float>(p, dbias, extent, dim, stream);
  }
  if (error == cudaSuccess && p.u_bias != nullptr) {
    const int64_t width = extent.heads * dim;
    error = sum_partials(dbias, width, extent.batch, p.du_bias, width, stream);
  }
  if (error != cudaSuccess) return error;
  return recurrence_weight_gradient(p, dbias + bias_size(extent, dim), extent, dim, stream);
}

}  // namespace
}  // namespace mm_rec

extern "C" int64_t mm_rec_cuda_recurrence_backward_workspace(int64_t batch, int64_t time, int64_t heads, int64_t dim) {
  using namespace mm_rec;
  const Extent extent{batch, time, heads};
  const int64_t floats = grouped(extent, dim) ? recurrence_grouped_workspace(extent)
                                              : gate_size(extent, dim) + bias_size(extent, dim) +
                                                    weight_gradient_workspace(extent, dim);
  return static_cast<int64_t>(sizeof(float)) * floats;
}

// du has rows du_stride apart; du_bias, the sum of du over B and T, is written where u_bias is given.
extern "C" int mm_rec_cuda_recurrence_backward(const float* dh, const float* dh_last, const float* h, const float* z,
                                               const void* u, int64_t u_dtype, int64_t u_stride, const float* u_bias,
                                               const float* gamma, const float* w_g, const float* h0,
                                               const bool* reset, float* dz, void* du, int64_t du_stride,
                                               float* du_bias, float* dgamma, float* dw_g, float* dh0,
                                               float* workspace, int64_t batch, int64_t time, int64_t heads,
                                               int64_t dim, void* stream) {
  using namespace mm_rec;
  const Extent extent{batch, time, heads};
  const RecurrenceBackward p{dh, dh_last, h,  z,  u,         u_dtype, u_stride, u_bias, gamma, nullptr,
                             w_g, h0, reset, dz, du, du_stride, du_bias, dgamma, dw_g,  dh0};
  return grouped(extent, dim) ? recurrence_backward_grouped(p, workspace, extent, stream)
                              : in_three_kernels(p, workspace, extent, static_cast<int>(dim), stream);
}
