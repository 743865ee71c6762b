// delta_rule, backward: the gradients of the states, of what is written and of v. As in the forward pass a warp holds 16
// columns of the state's gradient, transposed.
#include "delta_rule_backward.cuh"

namespace mm_rec {
namespace {

template <typename T, int Blocks>
struct Shared {
  using Square = typename DeltaTypes<T>::Square;
  static constexpr int kStages = sizeof(T) == 2 && Blocks == 1 ? 2 : 1;  // with two, a chunk is fetched during the one before
  struct Stage {
    Square q, key, dout, inverse;
    ChunkDecay decay;
  };
  Stage stage[kStages];
  Square scores;
};

template <typename T, int Blocks>
__global__ void __launch_bounds__(kDeltaThreads) states_kernel(const DeltaBackward<T> p, const DeltaExtent extent) {
  using Layout = Shared<T, Blocks>;
  constexpr bool kSplit = DeltaTypes<T>::kSplit;
  auto& shared = *reinterpret_cast<Layout*>(dynamic_shared());
  const DeltaInputs& in = p.in;
  const int64_t b = blockIdx.z, head = blockIdx.y, chunks = extent.chunks();
  const int value = static_cast<int>(blockIdx.x) * kBlock, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int dim = extent.dim, own = value + warp_row;  // the warp's first column of the state
  const bool aligned = dim % 8 == 0;
  const int64_t width = extent.heads * dim;

  DecayLoads loads;
  const auto fetch_slices = [&](typename Layout::Stage& stage, int64_t t0, int k) {
    const int64_t tokens = extent.time - t0;
    load_tile(stage.key, in.key.at<T>(extent, b, t0, head) + k, in.key.stride, tokens, dim - k, aligned);
    load_tile(stage.q, in.q.at<T>(extent, b, t0, head) + k, in.q.stride, tokens, dim - k, aligned);
  };
  const auto fetch = [&](int64_t chunk) {
    auto& stage = shared.stage[chunk % Layout::kStages];
    const int64_t t0 = chunk * kChunk, tokens = p.dout == nullptr ? 0 : extent.time - t0;
    loads.fetch(in, extent, b, head, t0);
    fetch_slices(stage, t0, 0);
    load_tile(stage.dout, p.dout + (tokens > 0 ? extent.token_at(b, t0, head) + value : 0), width, tokens, dim - value,
              aligned);
    load_tile(stage.inverse, p.inverses + extent.inverse_at(b, chunk, head), kChunk, kChunk, kChunk, true);
  };

  fetch(chunks - 1);
  Fragments<8> dstate[Blocks];
#pragma unroll
  for (int k = 0; k < Blocks; ++k) {
    const int rows = p.dlast == nullptr ? 0 : dim - k * kBlock;
    load_transposed(dstate[k], p.dlast + extent.state_at(b, 0, 1, head) + int64_t{k} * kBlock * dim + own, dim, rows,
                    dim - own);
  }
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    auto& stage = shared.stage[chunk % Layout::kStages];
    const ChunkDecay& decay = stage.decay;
    const int64_t t0 = chunk * kChunk;
    loads.put(stage.decay);
    cp_async_wait<0>();
    __syncthreads();
    if (Layout::kStages == 2 && chunk > 0) fetch(chunk - 1);

#pragma unroll
    for (int k = 0; k < Blocks; ++k) {
      store_transposed(p.dstates + extent.state_at(b, chunk, chunks, head) + int64_t{k} * kBlock * dim + own, dim,
                       dim - k * kBlock, dim - own, dstate[k]);
    }
    // The gradients of what is written, through the state after the chunk, and the scores of the warp's 16 queries.
    Fragments<8> dwritten = {}, scores = {};
#pragma unroll
    for (int k = 0; k < Blocks; ++k) {
      if (k > 0) {
        __syncthreads();
        fetch_slices(stage, t0, k * kBlock);
        cp_async_wait<0>();
        __syncthreads();
      }
      multiply<kSplit, false, kBlock>(dwritten, dstate[k], stage.key, 0);
      multiply<false, false, kBlock>(scores, stage.q, warp_row, stage.key, 0);
    }
    each_decay(decay, warp_row, [&](int n, int i, int, float between) { scores[n][i] *= between; });
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        shared.scores.set(warp_row + fragment_row(2 * r), fragment_column(n, 0), scores[n][2 * r], scores[n][2 * r + 1]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) dwritten[n][i] *= decay.after[fragment_column(n, i)];
    }
    __syncthreads();
    // Through what the chunk's queries read of it, and through the inverse.
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      multiply_step<true>(dwritten, load_left<true>(stage.dout, warp_row, j), shared.scores, 0, j, 0, j / 8 + 2);
    }
    Fragments<8> derror = {};
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      multiply_step<true>(derror, to_left<kSplit>(dwritten, j / 16), stage.inverse, 0, j, 0, j / 8 + 2);
    }
    const int64_t at = extent.token_at(b, t0, head) + own;
    store_transposed(p.derrors + at, width, extent.time - t0, dim - own, derror);
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) derror[n][i] *= decay.beta[fragment_column(n, i)];
    }
    store_transposed(p.dv + at, width, extent.time - t0, dim - own, derror);

    // Through what the chunk finds in the state before.
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) derror[n][i] *= -decay.before[fragment_column(n, i)];
    }
    const float whole = decay.whole;
#pragma unroll
    for (int k = Blocks - 1; k >= 0; --k) {  // the last slices are still there
      if (k < Blocks - 1) {
        __syncthreads();
        fetch_slices(stage, t0, k * kBlock);
        cp_async_wait<0>();
        __syncthreads();
      }
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dstate[k][n][i] *= whole;
      }
#pragma unroll
      for (int j = 0; j < kChunk; j += 16) {
        Fragments<2> dread;
        to_fragments(load_left<true>(stage.dout, warp_row, j), dread);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) dread[n][i] *= decay.before[j + fragment_column(n, i)];
        }
        multiply_step<true>(dstate[k], to_left<kSplit>(dread, 0), stage.q, 0, j);
        multiply_step<true>(dstate[k], to_left<kSplit>(derror, j / 16), stage.key, 0, j);
      }
    }
    if (Layout::kStages == 1 && chunk > 0) {
      __syncthreads();
      fetch(chunk - 1);
    }
  }
#pragma unroll
  for (int k = 0; k < Blocks; ++k) {
    store_transposed(p.dstate + extent.state_at(b, 0, 1, head) + int64_t{k} * kBlock * dim + own, dim, dim - k * kBlock,
                     dim - own, dstate[k]);
  }
}

template <typename T, int Blocks>
struct States {
  static cudaError_t run(const DeltaBackward<T>& p, const DeltaExtent& extent, void* stream) {
    const dim3 grid(static_cast<unsigned>(extent.blocks()), static_cast<unsigned>(extent.heads),
                    static_cast<unsigned>(extent.batch));
    return launch(states_kernel<T, Blocks>, grid, dim3(kDeltaThreads), sizeof(Shared<T, Blocks>), stream, p, extent);
  }
};

}  // namespace

template <typename T>
cudaError_t delta_backward_states(const DeltaBackward<T>& p, const DeltaExtent& extent, void* stream) {
  if constexpr (sizeof(T) == 2) {
    if (extent.dim == kBlock) return delta_64_backward_states(p, extent, stream);
  }
  return by_blocks<States, T>(extent, p, extent, stream);
}
template cudaError_t delta_backward_states(const DeltaBackward<float>&, const DeltaExtent&, void*);
template cudaError_t delta_backward_states(const DeltaBackward<bf16>&, const DeltaExtent&, void*);

}  // namespace mm_rec
