// delta_rule, forward, for the sizes of most models: a block walks through the chunks of a head of a sequence.
#include "delta_rule_64.cuh"

namespace mm_rec {
namespace {

struct Shared {
  Stage64 stage[2];  // one is fetched while the other is worked on
  Handed state, written;
};

// The state and how it changes.
struct Holder {
  Shared& shared;
  int warp_row;
  Fragments<8> state;

  __device__ __forceinline__ void walk(const Stage64& stage) {
    const ChunkDecay& decay = stage.decay;
    Left<false> left[4];
    to_lefts(state, left);
    hand_over(shared.state, left);
    arrive_at_barrier(kFirstBarrier, kBoth64);
    Fragments<8> found = {}, written = {};
    multiply_64<false>(found, left, stage.key);
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      Fragments<2> v;
      to_fragments(load_left<true>(stage.rows, warp_row, j), v);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int token = j + fragment_column(n, 0);
        const float2 beta = *reinterpret_cast<const float2*>(&decay.beta[token]);
        const float2 before = *reinterpret_cast<const float2*>(&decay.before[token]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[n][i] = (i % 2 == 0 ? beta.x : beta.y) *
                    (v[n][i] - (i % 2 == 0 ? before.x : before.y) * found[j / 8 + n][i]);
        }
      }
      multiply_step<false>(written, to_left<false>(v, 0), stage.inverse, 0, j, j / 8);
    }
    to_lefts(written, left);
    hand_over(shared.written, left);
    arrive_at_barrier(kSecondBarrier, kBoth64);
    scale_columns(written, decay.after);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) state[n][i] *= decay.whole;
    }
    to_lefts(written, left);
    multiply_64<true>(state, left, stage.key);
  }
};

// What a chunk's queries read, by the helpers; the scores take the queries' place.
__device__ __forceinline__ void read(Shared& shared, Stage64& stage, int warp_row, bf16* out, int64_t stride, int tokens) {
  Fragments<8> scores, sum = {};
  score_64(stage, warp_row, scores);
  Left<false> left[4];
  named_barrier(kFirstBarrier, kBoth64);
  take(shared.state, left);
  multiply_64<false>(sum, left, stage.q);
  scale_columns(sum, stage.decay.before);
  named_barrier(kHelperBarrier, kGroup64);
  put_64(stage.q, warp_row, scores);
  named_barrier(kSecondBarrier, kBoth64);  // of the helpers, too
  take(shared.written, left);
#pragma unroll
  for (int k = 0; k < 4; ++k) multiply_step<false>(sum, left[k], stage.q, 0, 16 * k, 2 * k);
  to_lefts(sum, left);
  store_transposed_64(out + warp_row, stride, tokens, left);
}

__global__ void __launch_bounds__(kThreads64, 2)
    forward_kernel(const DeltaInputs in, const float* __restrict__ state0, const bf16* __restrict__ inverses,
                   bf16* __restrict__ out, float* __restrict__ states, const DeltaExtent extent) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t b = blockIdx.y, head = blockIdx.x, chunks = extent.chunks();
  const int warp_row = static_cast<int>(threadIdx.x) % kGroup64 / 32 * 16;
  if (threadIdx.x < kGroup64) {
    const int own = own_element_64(warp_row);
    float* to = states + extent.state_at(b, 0, chunks + 1, head) + own;
    Holder holder{shared, warp_row, {}};
    load_state_64(state0 + extent.state_at(b, 0, 1, head) + own, holder.state);
    store_state_64(to, holder.state);
    each_chunk<1>(shared.stage, chunks, [&](const Stage64& stage, int64_t) {
      holder.walk(stage);
      to += extent.heads * (kBlock * kBlock);
      store_state_64(to, holder.state);
    });
  } else if (threadIdx.x < kBoth64) {
    each_chunk<1>(shared.stage, chunks, [&](Stage64& stage, int64_t chunk) {
      const int64_t t0 = chunk * kChunk;
      const int tokens = static_cast<int>(min(extent.time - t0, int64_t{kChunk}));
      read(shared, stage, warp_row, out + extent.token_at(b, t0, head), extent.heads * kBlock, tokens);
    });
  } else {
    fetch_chunks<1>(shared.stage, in, in.v, inverses, extent, b, head);
  }
}

}  // namespace

cudaError_t delta_64_forward(const DeltaInputs& in, const float* state, const bf16* inverses, bf16* out, float* states,
                             const DeltaExtent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
  return launch(forward_kernel, grid, dim3(kThreads64), sizeof(Shared), stream, in, state, inverses, out, states, extent);
}

}  // namespace mm_rec
