// delta_rule, forward. A block of threads walks through the chunks of a head of a sequence with 64 columns of the state, 16 a
// warp, which it holds transposed in registers: so each product's result is the next one's left operand.
#include "delta_rule_64.cuh"

namespace mm_rec {
namespace {

template <typename T, int Blocks>
struct Shared {
  using Square = typename DeltaTypes<T>::Square;
  static constexpr int kStages = sizeof(T) == 2 && Blocks == 1 ? 2 : 1;  // with two, a chunk is fetched during the one before
  struct Stage {
    Square q, key, v, inverse;
    ChunkDecay decay;
  };
  Stage stage[kStages];
  Square scores;
};

template <typename T, int Blocks>
__global__ void __launch_bounds__(kDeltaThreads)
    forward_kernel(const DeltaInputs in, const float* __restrict__ state0, const T* __restrict__ inverses,
                   T* __restrict__ out, float* __restrict__ states, const DeltaExtent extent) {
  using Layout = Shared<T, Blocks>;
  constexpr bool kSplit = DeltaTypes<T>::kSplit;
  auto& shared = *reinterpret_cast<Layout*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y, chunks = extent.chunks();
  const int value = static_cast<int>(blockIdx.x) * kBlock, warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int dim = extent.dim, own = value + warp_row;  // the warp's first column of the state
  const bool aligned = dim % 8 == 0;

  DecayLoads loads;
  const auto fetch_slices = [&](typename Layout::Stage& stage, int64_t t0, int k) {
    const int64_t tokens = extent.time - t0;
    load_tile(stage.key, in.key.at<T>(extent, b, t0, head) + k, in.key.stride, tokens, dim - k, aligned);
    load_tile(stage.q, in.q.at<T>(extent, b, t0, head) + k, in.q.stride, tokens, dim - k, aligned);
  };
  const auto fetch = [&](int64_t chunk) {
    auto& stage = shared.stage[chunk % Layout::kStages];
    const int64_t t0 = chunk * kChunk;
    loads.fetch(in, extent, b, head, t0);
    fetch_slices(stage, t0, 0);
    load_tile(stage.v, in.v.at<T>(extent, b, t0, head) + value, in.v.stride, extent.time - t0, dim - value, aligned);
    load_tile(stage.inverse, inverses + extent.inverse_at(b, chunk, head), kChunk, kChunk, kChunk, true);
  };
  Fragments<8> state[Blocks];
  const auto store_state = [&](int64_t number) {
    float* target = states + extent.state_at(b, number, chunks + 1, head) + own;
#pragma unroll
    for (int k = 0; k < Blocks; ++k) {
      store_transposed(target + int64_t{k} * kBlock * dim, dim, dim - k * kBlock, dim - own, state[k]);
    }
  };

  fetch(0);
#pragma unroll
  for (int k = 0; k < Blocks; ++k) {
    load_transposed(state[k], state0 + extent.state_at(b, 0, 1, head) + int64_t{k} * kBlock * dim + own, dim,
                    dim - k * kBlock, dim - own);
  }
  store_state(0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    auto& stage = shared.stage[chunk % Layout::kStages];
    const ChunkDecay& decay = stage.decay;
    const int64_t t0 = chunk * kChunk;
    loads.put(stage.decay);
    cp_async_wait<0>();
    __syncthreads();
    if (Layout::kStages == 2 && chunk + 1 < chunks) fetch(chunk + 1);

    // What keys and queries find in the state before the chunk, and the scores of the warp's 16 queries.
    Fragments<8> found = {}, read = {}, scores = {};
#pragma unroll
    for (int k = 0; k < Blocks; ++k) {
      if (k > 0) {
        __syncthreads();
        fetch_slices(stage, t0, k * kBlock);
        cp_async_wait<0>();
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kBlock; i += 16) {
        const Left<kSplit> left = to_left<kSplit>(state[k], i / 16);
        multiply_step<false>(found, left, stage.key, 0, i);
        multiply_step<false>(read, left, stage.q, 0, i);
      }
      multiply<false, false, kBlock>(scores, stage.q, warp_row, stage.key, 0);
    }
    each_decay(decay, warp_row, [&](int n, int i, int, float between) { scores[n][i] *= between; });
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        shared.scores.set(warp_row + fragment_row(2 * r), fragment_column(n, 0), scores[n][2 * r], scores[n][2 * r + 1]);
      }
    }

    // What is written: beta (v - E found) through the inverse.
    Fragments<8> written = {};
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      Fragments<2> v;
      to_fragments(load_left<true>(stage.v, warp_row, j), v);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = j + fragment_column(n, i);
          v[n][i] = decay.beta[token] * (v[n][i] - decay.before[token] * found[j / 8 + n][i]);
        }
      }
      multiply_step<false>(written, to_left<kSplit>(v, 0), stage.inverse, 0, j, j / 8);
    }
#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) read[n][i] *= decay.before[fragment_column(n, i)];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      multiply_step<false>(read, to_left<kSplit>(written, j / 16), shared.scores, 0, j, j / 8);
    }
    store_transposed(out + extent.token_at(b, t0, head) + own, extent.heads * dim, extent.time - t0, dim - own, read);

#pragma unroll
    for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) written[n][i] *= decay.after[fragment_column(n, i)];
    }
    const float whole = decay.whole;
#pragma unroll
    for (int k = Blocks - 1; k >= 0; --k) {  // the last slice of keys is still there
      if (k < Blocks - 1) {
        __syncthreads();
        load_tile(stage.key, in.key.at<T>(extent, b, t0, head) + k * kBlock, in.key.stride, extent.time - t0,
                  dim - k * kBlock, aligned);
        cp_async_wait<0>();
        __syncthreads();
      }
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) state[k][n][i] *= whole;
      }
      multiply<kSplit, true, kChunk>(state[k], written, stage.key, 0);
    }
    store_state(chunk + 1);
    if (Layout::kStages == 1 && chunk + 1 < chunks) {
      __syncthreads();
      fetch(chunk + 1);
    }
  }
}

template <typename T, int Blocks>
struct Forward {
  static cudaError_t run(const DeltaInputs& in, const float* state0, const T* inverses, T* out, float* states,
                         const DeltaExtent& extent, void* stream) {
    const dim3 grid(static_cast<unsigned>(extent.blocks()), static_cast<unsigned>(extent.heads),
                    static_cast<unsigned>(extent.batch));
    return launch(forward_kernel<T, Blocks>, grid, dim3(kDeltaThreads), sizeof(Shared<T, Blocks>), stream, in, state0,
                  inverses, out, states, extent);
  }
};

template <typename T>
cudaError_t forward(const DeltaInputs& in, const float* state0, void* inverses, void* out, float* states,
                    const DeltaExtent& extent, void* stream) {
  if (extent.time == 1) return delta_token(in, state0, static_cast<T*>(out), states, extent, stream);
  const cudaError_t error = chunk_inverses(in, static_cast<T*>(inverses), extent, stream);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(T) == 2) {
    if (extent.dim == kBlock) {
      return delta_64_forward(in, state0, static_cast<const T*>(inverses), static_cast<T*>(out), states, extent, stream);
    }
  }
  return by_blocks<Forward, T>(extent, in, state0, static_cast<const T*>(inverses), static_cast<T*>(out), states, extent,
                               stream);
}

}  // namespace
}  // namespace mm_rec

// Elements of the type of q.
extern "C" int64_t mm_rec_cuda_delta_rule_workspace(int64_t batch, int64_t time, int64_t heads) {
  return mm_rec::DeltaExtent{batch, time, heads, 0}.inverse_at(batch, 0, 0);
}

// Rows of q, key and v as TokenRows; the rest is contiguous.
extern "C" int mm_rec_cuda_delta_rule_forward(const void* q, int64_t q_batch, int64_t q_stride, const void* key,
                                              int64_t key_batch, int64_t key_stride, const void* v, int64_t v_batch,
                                              int64_t v_stride, int64_t dtype, const float* beta, const float* log_decay,
                                              const int64_t* position, const float* state, void* out, float* states,
                                              void* workspace, int64_t batch, int64_t time, int64_t heads, int64_t dim,
                                              void* stream) {
  using namespace mm_rec;
  const DeltaExtent extent{batch, time, heads, static_cast<int>(dim)};
  const DeltaInputs in{{q, q_batch, q_stride}, {key, key_batch, key_stride}, {v, v_batch, v_stride}, beta, log_decay,
                       position};
  return dtype == kBFloat16 ? forward<bf16>(in, state, workspace, out, states, extent, stream)
                            : forward<float>(in, state, workspace, out, states, extent, stream);
}
