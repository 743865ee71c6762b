// recurrence, forward: a block of threads owns one head of a few sequences and runs all T steps. W_g stays in
// registers, in float32 (at every batch size the product costs less than the memory traffic of z, u, gamma and h);
// h goes round through shared memory, and the inputs of later steps are copied to shared memory meanwhile.
#include "device.cuh"
#include "launch.cuh"
#include "matvec.cuh"
#include "recurrence.cuh"

namespace mm_rec {
namespace {

struct Arguments {
  const float* z;
  const void* u;
  int64_t u_stride;
  const float* u_bias;  // may be null, as h0 and reset
  const float* gamma;
  const float* w_g;
  const float* h0;
  const bool* reset;
  float* h;
  float* h_last;
};

// A chunk of the inputs of a block, (Steps, Batch, Dim) each.
template <typename U, int Elements>
struct Chunk {
  float z[Elements];
  float gamma[Elements];
  U u[Elements];
};

template <typename U, typename Tile, int Steps, int Stages>
struct Shared {
  Chunk<U, Steps * Tile::kBatch * Tile::kDim> stage[Stages];
  float h[2][Tile::kBatch * Tile::kDim];
  float matrix[Tile::kSharedFloats > 0 ? Tile::kSharedFloats : 4];
};

template <typename U, typename Tile, int Steps, int Stages, int MinBlocks>
__global__ void __launch_bounds__(Tile::kThreads, MinBlocks) forward_kernel(const Arguments p, const Extent extent) {
  constexpr int kDim = Tile::kDim, kBatch = Tile::kBatch, kOwned = Tile::kOwned;
  auto& shared = *reinterpret_cast<Shared<U, Tile, Steps, Stages>*>(dynamic_shared());
  const int64_t head = blockIdx.x, first_sequence = static_cast<int64_t>(blockIdx.y) * kBatch;
  const int64_t width = extent.heads * kDim, chunks = ceil_div(extent.time, Steps);

  const auto prefetch = [&](int64_t chunk) {
    if (chunk < chunks) {
      auto& to = shared.stage[chunk % Stages];
      const auto copy = [&](auto* target, const auto* source, int64_t stride) {
        copy_rows<Tile::kThreads, Steps, kBatch, kDim, kDim>(target, source + head * kDim, stride, first_sequence,
                                                       chunk * Steps, 1, extent);
      };
      copy(to.z, p.z, width);
      copy(to.gamma, p.gamma, width);
      copy(to.u, static_cast<const U*>(p.u), p.u_stride);
    }
    cp_async_commit();
  };
#pragma unroll
  for (int chunk = 0; chunk < Stages - 1; ++chunk) prefetch(chunk);

  Tile tile;
  tile.template load_matrix<false>(p.w_g + head * kDim * kDim, shared.matrix);

  const int vector = Tile::owned_vector(), row = Tile::owned_row();
  const int own = vector * kDim + row;  // this thread's elements in a (Batch, Dim) buffer
  const int64_t sequence = first_sequence + vector, column = head * kDim + row;
  const bool real = sequence < extent.batch;

  // Bit s of `resets` belongs to step t0 + s + 1, which sees the h that step t0 + s hands over.
  ResetFlags<kBatch> flags;
  flags.load(p.reset, first_sequence, 1, 1, extent);
  unsigned resets[kBatch];
  flags.bits(resets);

  float h[kOwned] = {}, last[kOwned] = {}, bias[kOwned] = {};
  if (p.u_bias != nullptr) load<kOwned>(p.u_bias + column, bias);
  if (p.h0 != nullptr && real && !(p.reset != nullptr && p.reset[sequence * extent.time])) {
    load<kOwned>(p.h0 + sequence * width + column, h);
  }
  store<kOwned>(shared.h[0] + own, h);
  int current = 0;
  float* out = p.h + sequence * extent.time * width + column;

  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<Stages - 2>();
    __syncthreads();
    prefetch(chunk + Stages - 1);
    flags.load(p.reset, first_sequence, (chunk + 1) * Steps + 1, 1, extent);
    const auto& in = shared.stage[chunk % Stages];
    const int steps = static_cast<int>(min(extent.time - chunk * Steps, static_cast<int64_t>(Steps)));
    const unsigned own_resets = pick(resets, vector);
    for (int s = 0; s < steps; ++s) {
      const int at = s * kBatch * kDim + own;
      float z[kOwned], gamma[kOwned], u[kOwned], fed_back[kOwned];
      load<kOwned>(in.z + at, z);
      load<kOwned>(in.gamma + at, gamma);
      load<kOwned>(in.u + at, u);
      tile.multiply(shared.h[current], shared.matrix, fed_back);
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        last[i] = fmaf(sigmoid(u[i] + bias[i] + fed_back[i]), z[i], gamma[i] * h[i]);
        h[i] = (own_resets >> s) & 1 ? 0.0f : last[i];
      }
      current ^= 1;
      store<kOwned>(shared.h[current] + own, h);
      if (real) store<kOwned>(out, last);
      out += width;
      __syncthreads();
    }
    flags.bits(resets);
  }
  if (real) store<kOwned>(p.h_last + sequence * width + column, last);
}

template <typename U, typename Tile, int Steps, int Stages, int MinBlocks>
cudaError_t run(const Arguments& p, const Extent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(ceil_div(extent.batch, Tile::kBatch)));
  return launch(forward_kernel<U, Tile, Steps, Stages, MinBlocks>, grid, dim3(Tile::kThreads),
                sizeof(Shared<U, Tile, Steps, Stages>), stream, p, extent);
}

// Any head size: one block a head and sequence, W_g transposed in shared memory if it fits, else read from memory.
template <typename U>
__global__ void forward_any_size_kernel(const Arguments p, const Extent extent, int dim, bool keep_matrix) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // h_{t-1} of even and of odd steps, then the matrix
  const int64_t head = blockIdx.x, sequence = blockIdx.y, width = extent.heads * dim;
  const HeadMatrix w_g(p.w_g + head * dim * dim, shared + 2 * dim, dim, keep_matrix);
  const U* u = static_cast<const U*>(p.u) + head * dim;
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    const bool empty = p.h0 == nullptr || (p.reset != nullptr && p.reset[sequence * extent.time]);
    shared[i] = empty ? 0.0f : p.h0[sequence * width + head * dim + i];
  }
  __syncthreads();
  for (int64_t t = 0; t < extent.time; ++t) {
    const float* h = shared + t % 2 * dim;
    float* next = shared + (t + 1) % 2 * dim;
    const int64_t step = sequence * extent.time + t;
    const bool cut = t + 1 < extent.time && p.reset != nullptr && p.reset[step + 1];
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
      float pre = to_float(u[step * p.u_stride + i]) + (p.u_bias == nullptr ? 0.0f : p.u_bias[head * dim + i]);
      for (int j = 0; j < dim; ++j) pre = fmaf(w_g(i, j), h[j], pre);
      const int64_t at = step * width + head * dim + i;
      const float after = fmaf(sigmoid(pre), p.z[at], p.gamma[at] * h[i]);
      p.h[at] = after;
      if (t + 1 == extent.time) p.h_last[sequence * width + head * dim + i] = after;
      next[i] = cut ? 0.0f : after;
    }
    __syncthreads();
  }
}

template <typename U>
cudaError_t dispatch(const Arguments& p, const Extent& extent, int dim, void* stream) {
  if (dim == 64) return run<U, MatrixTile<64, 4, 4, 1, 0>, 8, 3, 8>(p, extent, stream);
  if (dim == 128) return run<U, MatrixTile<128, 4, 4, 2, 0>, 8, 2, 2>(p, extent, stream);
  using Tile256 = MatrixTile<256, 8, 4, 2, 16>;
  if (dim == 256 && sizeof(Shared<U, Tile256, 4, 2>) <= shared_memory_limit()) {
    return run<U, Tile256, 4, 2, 1>(p, extent, stream);
  }
  const AnySize plan(dim, 2);
  return launch(forward_any_size_kernel<U>, plan.grid(extent), plan.block(), plan.shared_bytes, stream, p, extent, dim,
                plan.keep_matrix);
}

}  // namespace
}  // namespace mm_rec

extern "C" int mm_rec_cuda_recurrence_forward(const float* z, const void* u, int64_t u_dtype, int64_t u_stride,
                                              const float* u_bias, const float* gamma, const float* w_g,
                                              const float* h0, const bool* reset, float* h, float* h_last,
                                              int64_t batch, int64_t time, int64_t heads, int64_t dim, void* stream) {
  using namespace mm_rec;
  const Arguments p{z, u, u_stride, u_bias, gamma, w_g, h0, reset, h, h_last};
  const Extent extent{batch, time, heads};
  return u_dtype == kBFloat16 ? dispatch<bf16>(p, extent, static_cast<int>(dim), stream)
                              : dispatch<float>(p, extent, static_cast<int>(dim), stream);
}
