// delta_rule: the inverse of I + A of each chunk, all chunks in parallel. The four blocks of 16 on the diagonal are inverted
// by forward substitution, a column a lane; from them the columns below are put together, a block of columns a warp.
#include "delta_rule.cuh"

namespace mm_rec {
namespace {

constexpr int kPart = 16, kParts = kChunk / kPart;

template <typename T>
struct Shared {
  union {
    typename DeltaTypes<T>::Square key;
    T inverse[kChunk][kChunk + 8];  // when the keys have been multiplied
  };
  Tile<kChunk, kChunk, true> lower;    // A
  Tile<kChunk, kPart, true> diagonal;  // inverses of the blocks on the diagonal
  alignas(16) float block[kParts][kPart][kPart];  // those blocks
  ChunkDecay decay;
};

// Invert the warp's block on the diagonal. Both halves of the warp have all columns, and put down different things.
template <typename T>
__device__ __forceinline__ void invert_block(Shared<T>& shared, int part) {
  const int column = threadIdx.x % kPart;
  float x[kPart];
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < i; j += 4) {
      float row[4];
      load<4>(&shared.block[part][i][j], row);
#pragma unroll
      for (int e = 0; e < 4 && j + e < i; ++e) x[i] = fmaf(-row[e], x[j + e], x[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kPart; ++i) {
    const int row = part * kPart + i, at = row * shared.diagonal.kStride + column;
    if (threadIdx.x % 32 < kPart) {
      const bf16 hi = __float2bfloat16_rn(x[i]);
      shared.diagonal.hi[at] = hi;
      shared.diagonal.lo[at] = __float2bfloat16_rn(x[i] - to_float(hi));
    } else {
      shared.inverse[row][part * kPart + column] = from_float<T>(x[i]);
    }
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
  Fragments<kChunk / 8> products = {};
  const T* key = in.key.at<T>(extent, b, t0, head);
  for (int k = 0; k < dim; k += kBlock) {
    if (k > 0) __syncthreads();
    load_tile(shared.key, key + k, in.key.stride, extent.time - t0, dim - k, dim % 8 == 0);
    if (k == 0) {
      loads.fetch(in, extent, b, head, t0);
      loads.put(shared.decay);
    }
    cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBlock; i += 16) {
      const auto left = load_left<false>(shared.key, warp_row, i);
#pragma unroll
      for (int n = 0; n < kChunk / 8; n += 2) {  // those right of the diagonal are not needed
        if (8 * n <= warp_row) multiply_step<false>(products, left, shared.key, 0, i, n, n + 2);
      }
    }
  }
  __syncthreads();
  const int part = warp_row / kPart;
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    const int column = fragment_column(n, 0);
    if (n / 2 > part) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        T* zeros = &shared.inverse[warp_row + fragment_row(2 * r)][column];
        zeros[0] = zeros[1] = from_float<T>(0.0f);
      }
      continue;
    }
    const float2 sum = *reinterpret_cast<const float2*>(&shared.decay.sum[column]);
    const int2 document = *reinterpret_cast<const int2*>(&shared.decay.document[column]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row + fragment_row(2 * r);
      const float sum_of_row = shared.decay.sum[row], beta = shared.decay.beta[row];
      const int document_of_row = shared.decay.document[row];
      const float first = column < row && document.x == document_of_row ? beta * __expf(sum_of_row - sum.x) : 0.0f;
      const float second = column + 1 < row && document.y == document_of_row ? beta * __expf(sum_of_row - sum.y) : 0.0f;
      const float pair[2] = {first * products[n][2 * r], second * products[n][2 * r + 1]};
      if (n / 2 == part) {
        store<2>(&shared.block[part][row % kPart][column % kPart], pair);
      } else {
        shared.lower.set(row, column, pair[0], pair[1]);
      }
    }
  }
  __syncwarp();
  invert_block(shared, part);
  __syncthreads();
  invert_below(shared, part);
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
