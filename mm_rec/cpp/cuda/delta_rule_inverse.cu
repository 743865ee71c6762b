// delta_rule: the inverse of I + A of each chunk, all chunks in parallel. The four blocks of 16 on the diagonal are inverted
// by forward substitution, a column a lane; from them the columns below are put together, a block of columns a warp.
#include "delta_rule.cuh"

namespace mm_rec {
namespace {

constexpr int kPart = 16, kParts = kChunk / kPart;

template <typename T>
struct Shared {
  typename DeltaTypes<T>::Square key;
  Tile<kChunk, kChunk, true> lower;    // A
  Tile<kChunk, kPart, true> diagonal;  // inverses of the blocks on the diagonal
  float block[kParts][kPart][kPart];   // those blocks
  T inverse[kChunk][kChunk + 8];
  ChunkDecay decay;
};

// Invert the warp's block on the diagonal.
template <typename T>
__device__ __forceinline__ void invert_block(Shared<T>& shared, int part) {
  const int column = threadIdx.x % kPart;
  float x[kPart];
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) x[i] = fmaf(-shared.block[part][i][j], x[j], x[i]);
  }
  if (threadIdx.x % 32 >= kPart) return;
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const int row = part * kPart + i, at = row * shared.diagonal.kStride + column;
    shared.diagonal.hi[at] = __float2bfloat16_rn(x[i]);
    shared.diagonal.lo[at] = __float2bfloat16_rn(x[i] - to_float(shared.diagonal.hi[at]));
    shared.inverse[row][part * kPart + column] = from_float<T>(x[i]);
  }
}

// The blocks below the warp's: block I is -inverse[I, I] sum over K < I of A[I, K] block K. All are kept transposed.
template <typename T>
__device__ __forceinline__ void invert_below(Shared<T>& shared, int part) {
  Left<true> columns[kParts - 1];
  columns[0] = load_left<true>(shared.diagonal, 0, part * kPart);
#pragma unroll
  for (int o = 1; o < kParts; ++o) {
    const int row = (part + o) * kPart;
    if (row >= kChunk) break;
    Fragments<2> sum = {}, block = {};
#pragma unroll
    for (int p = 0; p < o; ++p) multiply_step<false>(sum, columns[p], shared.lower, row, (part + p) * kPart);
    multiply_step<false>(block, to_left<true>(sum, 0), shared.diagonal, row, 0);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        block[n][i] = -block[n][i];
        shared.inverse[row + fragment_column(n, i)][part * kPart + fragment_row(i)] = from_float<T>(block[n][i]);
      }
    }
    if (o + 1 < kParts) columns[o] = to_left<true>(block, 0);
  }
}

template <typename T>
__global__ void __launch_bounds__(kDeltaThreads)
    inverse_kernel(const DeltaInputs in, T* __restrict__ inverses, const DeltaExtent extent) {
  auto& shared = *reinterpret_cast<Shared<T>*>(dynamic_shared());
  const int64_t b = blockIdx.z, head = blockIdx.y, chunk = blockIdx.x, t0 = chunk * kChunk;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16, dim = extent.dim;
  DecayLoads loads;
  loads.fetch(in, extent, b, head, t0);
  Fragments<kChunk / 8> products = {};
  const T* key = in.key.at<T>(extent, b, t0, head);
  for (int k = 0; k < dim; k += kBlock) {
    if (k > 0) __syncthreads();
    load_tile(shared.key, key + k, in.key.stride, extent.time - t0, dim - k, dim % 8 == 0);
    if (k == 0) loads.put(shared.decay);
    cp_async_wait<0>();
    __syncthreads();
    multiply<false, false, kBlock>(products, shared.key, warp_row, shared.key, 0);
  }
  each_decay(shared.decay, warp_row, [&](int n, int i, int row, float decay) {
    const int column = fragment_column(n, i);
    products[n][i] *= column < row ? shared.decay.beta[row] * decay : 0.0f;
    if (column / kPart == row / kPart) shared.block[row / kPart][row % kPart][column % kPart] = products[n][i];
  });
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + fragment_row(2 * r), column = fragment_column(n, 0);
      shared.lower.set(row, column, products[n][2 * r], products[n][2 * r + 1]);
      if (8 * n >= warp_row + 16) shared.inverse[row][column] = shared.inverse[row][column + 1] = from_float<T>(0.0f);
    }
  }
  __syncwarp();
  invert_block(shared, warp_row / kPart);
  __syncthreads();
  invert_below(shared, warp_row / kPart);
  __syncthreads();
  constexpr int kPiece = 16 / sizeof(T);
  T* target = inverses + extent.inverse_at(b, chunk, head);
#pragma unroll
  for (int i = threadIdx.x * kPiece; i < kChunk * kChunk; i += kDeltaThreads * kPiece) {
    *reinterpret_cast<uint4*>(target + i) = *reinterpret_cast<const uint4*>(&shared.inverse[i / kChunk][i % kChunk]);
  }
}

}  // namespace

template <typename T>
cudaError_t chunk_inverses(const DeltaInputs& in, T* inverses, const DeltaExtent& extent, void* stream) {
  const dim3 grid(static_cast<unsigned>(extent.chunks()), static_cast<unsigned>(extent.heads),
                  static_cast<unsigned>(extent.batch));
  return launch(inverse_kernel<T>, grid, dim3(kDeltaThreads), sizeof(Shared<T>), stream, in, inverses, extent);
}
template cudaError_t chunk_inverses(const DeltaInputs&, float*, const DeltaExtent&, void*);
template cudaError_t chunk_inverses(const DeltaInputs&, bf16*, const DeltaExtent&, void*);

}  // namespace mm_rec
