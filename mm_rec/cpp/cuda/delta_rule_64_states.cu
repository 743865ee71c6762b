// delta_rule, backward, for the sizes of most models: the gradients of the states, of what is written and of v. A block walks
// through the chunks of a head of a sequence from the last to the first.
#include "delta_rule_64.cuh"
#include "delta_rule_backward.cuh"

namespace mm_rec {
namespace {

struct Shared {
  Stage64 stage[2];                     // one is fetched while the other is worked on
  Handed words;                         // of what is written, the gradient through the chunk's queries; then derror
  float4 dstate[kBlock / 8][kGroup64];  // of the state before the chunk, the gradient through the chunk's queries
};

// The gradient of the state and how it changes.
struct Holder {
  Shared& shared;
  int warp_row;
  Fragments<8> dstate;

  // Stores the gradient of the state after the chunk at `dstates`.
  __device__ __forceinline__ void walk(const Stage64& stage, bf16* dstates) {
    const ChunkDecay& decay = stage.decay;
    Left<false> left[4];
    to_lefts(dstate, left);
    Fragments<8> dwritten = {}, derror = {};
    multiply_64<false>(dwritten, left, stage.key);
    store_transposed_64(dstates + warp_row, kBlock, kBlock, left);
    scale_columns(dwritten, decay.after);
    named_barrier(kFirstBarrier, kBoth64);
    take(shared.words, left);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Fragments<2> read;
      to_fragments(left[j], read);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dwritten[2 * j + n][i] += read[n][i];
      }
    }
    to_lefts(dwritten, left);
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_step<true>(derror, left[j], stage.inverse, 0, 16 * j, 0, 2 * j + 2);
    to_lefts(derror, left);
    hand_over(shared.words, left);
    arrive_at_barrier(kSecondBarrier, kBoth64);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 beta = *reinterpret_cast<const float2*>(&decay.beta[fragment_column(n, 0)]);
      const float2 before = *reinterpret_cast<const float2*>(&decay.before[fragment_column(n, 0)]);
      const float4 read = shared.dstate[n][threadIdx.x];
      const float reads[4] = {read.x, read.y, read.z, read.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        derror[n][i] *= i % 2 == 0 ? -beta.x * before.x : -beta.y * before.y;
        dstate[n][i] = fmaf(decay.whole, dstate[n][i], reads[i]);
      }
    }
    to_lefts(derror, left);
    multiply_64<true>(dstate, left, stage.key);
  }
};

// What does not need the state's gradient, by the helpers. The scores take the queries' place.
__device__ __forceinline__ void help(Shared& shared, Stage64& stage, int warp_row, bf16* derrors, bf16* dv, int64_t stride,
                                     int tokens) {
  const ChunkDecay& decay = stage.decay;
  const int thread = static_cast<int>(threadIdx.x) % kGroup64;
  Fragments<8> scores;
  score_64(stage, warp_row, scores);
  Left<false> left[4];
  {
    Fragments<8> sum = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      left[j] = load_left<true>(stage.rows, warp_row, 16 * j);
      Fragments<2> dread;
      to_fragments(left[j], dread);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 before = *reinterpret_cast<const float2*>(&decay.before[16 * j + fragment_column(n, 0)]);
#pragma unroll
        for (int i = 0; i < 4; ++i) dread[n][i] *= i % 2 == 0 ? before.x : before.y;
      }
      multiply_step<true>(sum, to_left<false>(dread, 0), stage.q, 0, 16 * j);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) shared.dstate[n][thread] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
  }
  named_barrier(kHelperBarrier, kGroup64);
  put_64(stage.q, warp_row, scores);
  named_barrier(kHelperBarrier, kGroup64);
  {
    Fragments<8> sum = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_step<true>(sum, left[j], stage.q, 0, 16 * j, 0, 2 * j + 2);
    to_lefts(sum, left);
    hand_over(shared.words, left);
  }
  arrive_at_barrier(kFirstBarrier, kBoth64);
  named_barrier(kSecondBarrier, kBoth64);
  take(shared.words, left);
  store_transposed_64(derrors + warp_row, stride, tokens, left);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    Fragments<2> x;
    to_fragments(left[j], x);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 beta = *reinterpret_cast<const float2*>(&decay.beta[16 * j + fragment_column(n, 0)]);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i] *= i % 2 == 0 ? beta.x : beta.y;
    }
    left[j] = to_left<false>(x, 0);
  }
  store_transposed_64(dv + warp_row, stride, tokens, left);
}

__global__ void __launch_bounds__(kThreads64, 1) states_kernel(const DeltaBackward<bf16> p, const DeltaExtent extent) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const int64_t b = blockIdx.y, head = blockIdx.x, chunks = extent.chunks(), width = extent.heads * kBlock;
  const int warp_row = static_cast<int>(threadIdx.x) % kGroup64 / 32 * 16;
  if (threadIdx.x < kGroup64) {
    const int64_t home = extent.state_at(b, 0, 1, head) + own_element_64(warp_row);
    Holder holder{shared, warp_row, {}};
    if (p.dlast != nullptr) load_state_64(p.dlast + home, holder.dstate);
    each_chunk<-1>(shared.stage, chunks, [&](const Stage64& stage, int64_t chunk) {
      holder.walk(stage, p.dstates + extent.state_at(b, chunk, chunks, head));
    });
    store_state_64(p.dstate + home, holder.dstate);
  } else if (threadIdx.x < kBoth64) {
    each_chunk<-1>(shared.stage, chunks, [&](Stage64& stage, int64_t chunk) {
      const int64_t t0 = chunk * kChunk, at = extent.token_at(b, t0, head);
      const int tokens = static_cast<int>(min(extent.time - t0, int64_t{kChunk}));
      help(shared, stage, warp_row, p.derrors + at, p.dv + at, width, tokens);
    });
  } else {
    fetch_chunks<-1>(shared.stage, p.in, {p.dout, extent.time * width, width}, p.inverses, extent, b, head);
  }
}

}  // namespace

cudaError_t delta_64_backward_states(const DeltaBackward<bf16>& p, const DeltaExtent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.heads), static_cast<unsigned>(extent.batch));
  return launch(states_kernel, grid, dim3(kThreads64), sizeof(Shared), stream, p, extent);
}

}  // namespace mm_rec
