// delta_rule, backward, for heads of 64 in bfloat16: from the states and their gradients all other gradients, all chunks in
// parallel. A warp has 16 tokens of the chunk. All operands are fetched at once. Of some tiles each warp needs its own 16 rows
// alone: later results take their place.
#include "delta_rule_backward.cuh"
#include "head_rows.cuh"

namespace mm_rec {
namespace {

constexpr int kResident = 3;  // blocks on a multiprocessor

using Square = Tile<kChunk, kBlock, false>;

struct Shared {
  Square q, key, state, dstate;
  Square v;  // then beta (v - E key S), then the gradients of the scores
  Square inverse;  // then what is written, R
  Square dout;
  Square derror;  // then the gradients of the keys' products
  ChunkDecay decay;
  TokenSums sums;
};

// Call body(n, r, row, column, pair) for each pair of elements of a tile that a thread's accumulators stand for.
template <typename Body>
__device__ __forceinline__ void each_pair(const Square& tile, int warp_row, const Body& body) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp_row + fragment_row(2 * r);
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
      const int column = fragment_column(n, 0);
      const uint32_t words = *reinterpret_cast<const uint32_t*>(tile.hi + row * Square::kStride + column);
      body(n, r, row, column, make_float2(__uint_as_float(words << 16), __uint_as_float(words & 0xffff0000u)));
    }
  }
}

__global__ void __launch_bounds__(kDeltaThreads, kResident)
    gradients_kernel(const DeltaBackward<bf16> p, const DeltaExtent extent) {
  auto& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  const ChunkDecay& decay = shared.decay;
  const int64_t b = blockIdx.z, head = blockIdx.y, chunk = blockIdx.x, t0 = chunk * kChunk;
  const int tokens = static_cast<int>(min(extent.time - t0, int64_t{kChunk}));
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const int64_t at = extent.token_at(b, t0, head), width = extent.heads * kBlock;
  {
    load_tile(shared.key, p.in.key.at<bf16>(extent, b, t0, head), p.in.key.stride, tokens, kBlock, true);
    load_tile(shared.v, p.in.v.at<bf16>(extent, b, t0, head), p.in.v.stride, tokens, kBlock, true);
    load_tile(shared.derror, p.derrors + at, width, tokens, kBlock, true);
    load_tile(shared.inverse, p.inverses + extent.inverse_at(b, chunk, head), kChunk, kChunk, kChunk, true);
    load_tile(shared.q, p.in.q.at<bf16>(extent, b, t0, head), p.in.q.stride, tokens, kBlock, true);
    load_tile(shared.dout, p.dout == nullptr ? p.dout : p.dout + at, width, p.dout == nullptr ? 0 : tokens, kBlock, true);
    load_tile(shared.dstate, p.dstates + extent.state_at(b, chunk, extent.chunks(), head), kBlock, kBlock, kBlock, true);
    DecayLoads loads;
    loads.fetch(p.in, extent, b, head, t0);
    load_tile(shared.state, p.states + extent.state_at(b, chunk, extent.chunks() + 1, head), kBlock, kBlock, kBlock, true);
    loads.put(shared.decay);
    cp_async_wait<0>();
    __syncthreads();
  }

  ThreadSums sums;
  Fragments<8> x = {};
  multiply<false, true, kBlock>(x, shared.key, warp_row, shared.state, 0);
  each_pair(shared.v, warp_row, [&](int n, int r, int row, int column, float2 v) {
    const float before = decay.before[row], beta = decay.beta[row];
    const float first = v.x - before * x[n][2 * r], second = v.y - before * x[n][2 * r + 1];
    const float2 slope = load_pair(shared.derror, row, column);
    sums.dbeta[r] = fmaf(slope.x, first, fmaf(slope.y, second, sums.dbeta[r]));
    shared.v.set(row, column, beta * first, beta * second);
  });
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float state[8], dstate[8];
    const int row = static_cast<int>(threadIdx.x) / 8 + i * 16, to = row * Square::kStride + threadIdx.x % 8 * 8;
    load<8>(shared.state.hi + to, state);
    load<8>(shared.dstate.hi + to, dstate);
#pragma unroll
    for (int j = 0; j < 8; ++j) sums.whole = fmaf(state[j], dstate[j], sums.whole);
  }
  __syncthreads();
  zero(x);
#pragma unroll
  for (int j = 0; j < kChunk; j += 16) {
    if (j <= warp_row) multiply_step<true>(x, load_left<false>(shared.inverse, warp_row, j), shared.v, 0, j);
  }
  __syncwarp();
  put(shared.inverse, warp_row, x);
  Square &written = shared.inverse, &dscores = shared.v, &dproducts = shared.derror;
  __syncthreads();

  // The gradients of the scores and of the keys' products, and what both say of g and of beta.
  Fragments<8> gradient = {};
  {
    Fragments<8> between;
    each_decay(decay, warp_row, [&](int n, int i, int, float d) { between[n][i] = d; });
    multiply<false, false, kBlock>(gradient, shared.dout, warp_row, written, 0);
    zero(x);
    multiply<false, false, kBlock>(x, shared.q, warp_row, shared.key, 0);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        gradient[n][i] *= between[n][i];
        sums.add(n, i, gradient[n][i] * x[n][i]);
      }
    }
    put(dscores, warp_row, gradient);
    zero(gradient);
    multiply<false, false, kBlock>(gradient, shared.derror, warp_row, written, 0);
    zero(x);
    multiply<false, false, kBlock>(x, shared.key, warp_row, shared.key, 0);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = warp_row + fragment_row(i);
        const float beta = decay.beta[row];
        float& slope = gradient[n][i];
        slope *= fragment_column(n, i) < row ? -between[n][i] : 0.0f;
        sums.dbeta[i / 2] = fmaf(slope, x[n][i], sums.dbeta[i / 2]);
        slope *= beta;
        sums.add(n, i, slope * x[n][i]);
      }
    }
  }
  sums.put_columns(shared.sums, warp_row);

  // Through the states before and after the chunk.
  Fragments<8> dkey = {};
  multiply<false, false, kBlock>(dkey, shared.derror, warp_row, shared.state, 0);
  scale_rows(dkey, decay.before, warp_row, -1.0f);
  scale_rows(dkey, decay.beta, warp_row, 1.0f);
  __syncwarp();
  put(dproducts, warp_row, gradient);
  zero(x);
  multiply<false, false, kBlock>(x, written, warp_row, shared.dstate, 0);
  scale_rows(x, decay.after, warp_row, 1.0f);
  each_pair(shared.key, warp_row, [&](int n, int r, int, int, float2 key) {
    sums.row[r] = fmaf(key.x, dkey[n][2 * r], fmaf(key.y, dkey[n][2 * r + 1], sums.row[r]));
    sums.last[r] = fmaf(key.x, x[n][2 * r], fmaf(key.y, x[n][2 * r + 1], sums.last[r]));
    dkey[n][2 * r] += x[n][2 * r];
    dkey[n][2 * r + 1] += x[n][2 * r + 1];
  });
  zero(x);  // now dq
  multiply<false, false, kBlock>(x, shared.dout, warp_row, shared.state, 0);
  scale_rows(x, decay.before, warp_row, 1.0f);
  each_pair(shared.q, warp_row, [&](int n, int r, int, int, float2 q) {
    sums.row[r] = fmaf(q.x, x[n][2 * r], fmaf(q.y, x[n][2 * r + 1], sums.row[r]));
  });
  __syncthreads();

  // Through the scores and the keys' products.
#pragma unroll
  for (int j = 0; j < kChunk; j += 16) {
    if (j <= warp_row) {
      multiply_step<true>(x, load_left<false>(dscores, warp_row, j), shared.key, 0, j);
      multiply_step<true>(dkey, load_left<false>(dproducts, warp_row, j), shared.key, 0, j);
    }
    if (j >= warp_row) {
      multiply_step<true>(dkey, load_left<true>(dscores, warp_row, j), shared.q, 0, j);
      multiply_step<true>(dkey, load_left<true>(dproducts, warp_row, j), shared.key, 0, j);
    }
  }
  store_heads(p.dq + at + warp_row * width, width, tokens - warp_row, x);
  store_heads(p.dkey + at + warp_row * width, width, tokens - warp_row, dkey);
  sums.finish(shared.sums, decay, p, extent, b, t0, head, warp_row);
}

}  // namespace

cudaError_t delta_64_gradients(const DeltaBackward<bf16>& p, const DeltaExtent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.chunks()), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(gradients_kernel, grid, dim3(kDeltaThreads), sizeof(Shared), stream, p, extent);
}

}  // namespace mm_rec
