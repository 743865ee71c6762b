// delta_rule, backward: from the states and their gradients all other gradients, all chunks in parallel. A warp has 16 tokens
// of the chunk.
#include "delta_rule_backward.cuh"

namespace mm_rec {
namespace {

template <typename T>
struct Shared {
  typename DeltaTypes<T>::Square tile[5];
  ChunkDecay decay;
  TokenSums sums;
};

// What a warp knows of its place: rows of its accumulators, and where they are in memory.
template <typename T>
struct Place {
  const DeltaBackward<T>& p;
  const DeltaExtent& extent;
  int64_t b, head, chunk, t0, tokens, width;
  int dim, warp_row;
  bool aligned;

  __device__ __forceinline__ Place(const DeltaBackward<T>& p_, const DeltaExtent& extent_)
      : p(p_), extent(extent_), b(blockIdx.z), head(blockIdx.y), chunk(blockIdx.x), t0(chunk * kChunk),
        tokens(extent.time - t0), width(extent.heads * extent.dim), dim(extent.dim),
        warp_row(static_cast<int>(threadIdx.x) / 32 * 16), aligned(dim % 8 == 0) {}

  template <bool Split>
  __device__ __forceinline__ void fetch(Tile<kChunk, kBlock, Split>& tile, const TokenRows& rows, int column) const {
    load_tile(tile, rows.at<T>(extent, b, t0, head) + column, rows.stride, tokens, dim - column, aligned);
  }
  // Of a contiguous tensor, null for zeros.
  template <bool Split>
  __device__ __forceinline__ void fetch(Tile<kChunk, kBlock, Split>& tile, const T* tensor, int column) const {
    const T* source = tensor == nullptr ? tensor : tensor + extent.token_at(b, t0, head) + column;
    load_tile(tile, source, width, tensor == nullptr ? 0 : tokens, dim - column, aligned);
  }
  // A block of 64 x 64 of a state.
  template <typename Source, bool Split>
  __device__ __forceinline__ void fetch_state(Tile<kChunk, kBlock, Split>& tile, const Source* states, int64_t count,
                                              int row, int column) const {
    load_tile(tile, states + extent.state_at(b, chunk, count, head) + int64_t{row} * dim + column, dim, dim - row,
              dim - column, aligned);
  }
  // Call body(n, r, row, column, pair) for each pair of elements of rows of tokens that a thread's accumulators stand for.
  template <typename Body>
  __device__ __forceinline__ void each_pair(const TokenRows& rows, int first, const Body& body) const {
    const T* from = rows.at<T>(extent, b, t0, head) + first;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + fragment_row(2 * r);
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
        const int column = fragment_column(n, 0);
        const bool inside = row < tokens && column < dim - first;
        body(n, r, row, column, inside ? load_pair(from + row * rows.stride + column) : make_float2(0.0f, 0.0f));
      }
    }
  }
  __device__ __forceinline__ void store(T* tensor, int first, const Fragments<8>& x) const {
    T* to = tensor + extent.token_at(b, t0, head) + first;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + fragment_row(2 * r);
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
        const int column = fragment_column(n, 0);
        const float pair[2] = {x[n][2 * r], x[n][2 * r + 1]};
        if (row < tokens && column < dim - first) mm_rec::store<2>(to + row * width + column, pair);
      }
    }
  }
};

template <typename T, int Blocks>
__global__ void __launch_bounds__(kDeltaThreads, 2) gradients_kernel(const DeltaBackward<T> p, const DeltaExtent extent) {
  using Square = typename DeltaTypes<T>::Square;
  auto& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  Square &first = shared.tile[0], &second = shared.tile[1], &written = shared.tile[2];
  Square &dout = shared.tile[3], &derror = shared.tile[4];
  const Place<T> at(p, extent);
  const DeltaInputs& in = p.in;
  const ChunkDecay& decay = shared.decay;
  const int warp_row = at.warp_row;
  DecayLoads loads;
  loads.fetch(in, extent, at.b, at.head, at.t0);
  loads.put(shared.decay);

  // R, and the gradients of the scores, of the inverse and, for one part, of beta.
  Fragments<8> dscores = {}, dlower = {};
  ThreadSums sums;
#pragma unroll 1
  for (int value = 0; value < Blocks * kBlock; value += kBlock) {
    Fragments<8> x = {};
    at.fetch(dout, p.dout, value);
    at.fetch(derror, p.derrors, value);
#pragma unroll 1
    for (int k = 0; k < Blocks * kBlock; k += kBlock) {
      at.fetch(first, in.key, k);
      at.fetch_state(second, p.states, extent.chunks() + 1, k, value);
      tiles_ready();
      multiply<false, true, kBlock>(x, first, warp_row, second, 0);
      __syncthreads();
    }
    load_tile(first, p.inverses + extent.inverse_at(at.b, at.chunk, at.head), kChunk, kChunk, kChunk, true);
    at.each_pair(in.v, value, [&](int n, int r, int row, int column, float2 v) {
      const float before = decay.before[row], beta = decay.beta[row];
      const float2 slope = load_pair(derror, row, column);
      float* pair = x[n] + 2 * r;
      pair[0] = v.x - before * pair[0];
      pair[1] = v.y - before * pair[1];
      sums.dbeta[r] = fmaf(slope.x, pair[0], fmaf(slope.y, pair[1], sums.dbeta[r]));
      second.set(row, column, beta * pair[0], beta * pair[1]);
    });
    tiles_ready();
    zero(x);
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      if (j <= warp_row) multiply_step<true>(x, load_left<false>(first, warp_row, j), second, 0, j);
    }
    put(written, warp_row, x);
    if (Blocks > 1) at.store(p.written, value, x);
    __syncthreads();
    multiply<false, false, kBlock>(dscores, dout, warp_row, written, 0);
    multiply<false, false, kBlock>(dlower, derror, warp_row, written, 0);
    if (Blocks > 1) __syncthreads();
  }
  each_decay(decay, warp_row, [&](int n, int i, int row, float between) {
    dscores[n][i] *= between;
    dlower[n][i] *= fragment_column(n, i) < row ? -between : 0.0f;
  });

  // What both say of g and of beta; then with beta, dlower is that of the keys' products.
  {
    Fragments<8> products = {};
#pragma unroll 1
    for (int k = 0; k < Blocks * kBlock; k += kBlock) {
      if (k > 0) __syncthreads();
      at.fetch(first, in.key, k);
      at.fetch(second, in.q, k);
      tiles_ready();
      multiply<false, false, kBlock>(products, second, warp_row, first, 0);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.add(n, i, dscores[n][i] * products[n][i]);
    }
    zero(products);
#pragma unroll 1
    for (int k = 0; k < Blocks * kBlock; k += kBlock) {
      if (Blocks > 1) {
        __syncthreads();
        at.fetch(first, in.key, k);
        tiles_ready();
      }
      multiply<false, false, kBlock>(products, first, warp_row, first, 0);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float beta = decay.beta[warp_row + fragment_row(i)], term = dlower[n][i] * products[n][i];
        sums.dbeta[i / 2] += term;
        sums.add(n, i, beta * term);
        dlower[n][i] *= beta;
      }
    }
  }
  sums.put_columns(shared.sums, warp_row);

#pragma unroll 1
  for (int k = 0; k < Blocks * kBlock; k += kBlock) {
    // Through the states before and after the chunk.
    Fragments<8> dq = {}, dkey = {}, x = {};
#pragma unroll 1
    for (int value = 0; value < Blocks * kBlock; value += kBlock) {
      __syncthreads();
      at.fetch_state(first, p.states, extent.chunks() + 1, k, value);
      at.fetch_state(second, p.dstates, extent.chunks(), k, value);
      if (Blocks > 1 || k > 0) {
        at.fetch(dout, p.dout, value);
        at.fetch(derror, p.derrors, value);
        at.fetch(written, p.written, value);
      }
      tiles_ready();
      multiply<false, false, kBlock>(dq, dout, warp_row, first, 0);
      multiply<false, false, kBlock>(dkey, derror, warp_row, first, 0);
      multiply<false, false, kBlock>(x, written, warp_row, second, 0);
#pragma unroll
      for (int i = 0; i < kChunk * kBlock / 2 / kDeltaThreads; ++i) {
        const int row = static_cast<int>(threadIdx.x) / 32 + i * (kDeltaThreads / 32), column = threadIdx.x % 32 * 2;
        const float2 state = load_pair(first, row, column), dstate = load_pair(second, row, column);
        sums.whole = fmaf(state.x, dstate.x, fmaf(state.y, dstate.y, sums.whole));
      }
    }
    scale_rows(dq, decay.before, warp_row, 1.0f);
    scale_rows(dkey, decay.before, warp_row, -1.0f);
    scale_rows(dkey, decay.beta, warp_row, 1.0f);
    scale_rows(x, decay.after, warp_row, 1.0f);
    at.each_pair(in.q, k, [&](int n, int r, int, int, float2 q) {
      sums.row[r] = fmaf(q.x, dq[n][2 * r], fmaf(q.y, dq[n][2 * r + 1], sums.row[r]));
    });
    at.each_pair(in.key, k, [&](int n, int r, int, int, float2 key) {
      sums.row[r] = fmaf(key.x, dkey[n][2 * r], fmaf(key.y, dkey[n][2 * r + 1], sums.row[r]));
      sums.last[r] = fmaf(key.x, x[n][2 * r], fmaf(key.y, x[n][2 * r + 1], sums.last[r]));
      dkey[n][2 * r] += x[n][2 * r];
      dkey[n][2 * r + 1] += x[n][2 * r + 1];
    });
    // Through the scores and the keys' products.
    __syncthreads();
    at.fetch(first, in.key, k);
    at.fetch(second, in.q, k);
    put(dout, warp_row, dscores);
    put(derror, warp_row, dlower);
    tiles_ready();
#pragma unroll
    for (int j = 0; j < kChunk; j += 16) {
      if (j <= warp_row) {
        multiply_step<true>(dq, load_left<false>(dout, warp_row, j), first, 0, j);
        multiply_step<true>(dkey, load_left<false>(derror, warp_row, j), first, 0, j);
      }
      if (j >= warp_row) {
        multiply_step<true>(dkey, load_left<true>(dout, warp_row, j), second, 0, j);
        multiply_step<true>(dkey, load_left<true>(derror, warp_row, j), first, 0, j);
      }
    }
    at.store(p.dq, k, dq);
    at.store(p.dkey, k, dkey);
  }
  sums.finish(shared.sums, decay, p, extent, at.b, at.t0, at.head, warp_row);
}

template <typename T, int Blocks>
struct Gradients {
  static cudaError_t run(const DeltaBackward<T>& p, const DeltaExtent& extent, void* stream) {
    const dim3 grid(static_cast<unsigned>(extent.chunks()), static_cast<unsigned>(extent.heads),
                    static_cast<unsigned>(extent.batch));
    return launch(gradients_kernel<T, Blocks>, grid, dim3(kDeltaThreads), sizeof(Shared<T>), stream, p, extent);
  }
};

// Elements of the parts of the scratch memory.
struct Parts {
  int64_t inverses, dstates, derrors, written;

  explicit Parts(const DeltaExtent& extent)
      : inverses(extent.inverse_at(extent.batch, 0, 0)),
        dstates(ceil_div(extent.state_at(extent.batch, 0, extent.chunks(), 0), 8) * 8),
        derrors(ceil_div(extent.token_at(extent.batch, 0, 0), 8) * 8), written(extent.blocks() > 1 ? derrors : 0) {}
};

template <typename T>
cudaError_t backward(DeltaBackward<T> p, void* workspace, const DeltaExtent& extent, void* stream) {
  const Parts parts(extent);
  p.inverses = static_cast<T*>(workspace);
  p.dstates = p.inverses + parts.inverses;
  p.derrors = p.dstates + parts.dstates;
  p.written = p.derrors + parts.derrors;
  cudaError_t error = chunk_inverses(p.in, p.inverses, extent, stream);
  if (error == cudaSuccess) error = delta_backward_states(p, extent, stream);
  if (error != cudaSuccess) return error;
  if constexpr (sizeof(T) == 2) {
    if (extent.dim == kBlock) return delta_64_gradients(p, extent, stream);
  }
  return by_blocks<Gradients, T>(extent, p, extent, stream);
}

}  // namespace
}  // namespace mm_rec

// Elements of the type of q.
extern "C" int64_t mm_rec_cuda_delta_rule_backward_workspace(int64_t batch, int64_t time, int64_t heads, int64_t dim) {
  using namespace mm_rec;
  const Parts parts({batch, time, heads, static_cast<int>(dim)});
  return parts.inverses + parts.dstates + parts.derrors + parts.written;
}

// Rows of q, key and v as TokenRows; the rest is contiguous. dout and dlast may be null.
extern "C" int mm_rec_cuda_delta_rule_backward(const void* dout, const float* dlast, const float* states, const void* q,
                                               int64_t q_batch, int64_t q_stride, const void* key, int64_t key_batch,
                                               int64_t key_stride, const void* v, int64_t v_batch, int64_t v_stride,
                                               int64_t dtype, const float* beta, const float* log_decay,
                                               const int64_t* position, void* dq, void* dkey, void* dv, float* dbeta,
                                               float* dlog_decay, float* dstate, void* workspace, int64_t batch,
                                               int64_t time, int64_t heads, int64_t dim, void* stream) {
  using namespace mm_rec;
  const DeltaExtent extent{batch, time, heads, static_cast<int>(dim)};
  const DeltaInputs in{{q, q_batch, q_stride}, {key, key_batch, key_stride}, {v, v_batch, v_stride}, beta, log_decay,
                       position};
  const auto run = [&](auto type) {
    using T = decltype(type);
    return backward<T>({in, states, static_cast<const T*>(dout), dlast, static_cast<T*>(dq), static_cast<T*>(dkey),
                        static_cast<T*>(dv), dbeta, dlog_decay, dstate, nullptr, nullptr, nullptr, nullptr},
                       workspace, extent, stream);
  };
  return dtype == kBFloat16 ? run(bf16{}) : run(float{});
}
