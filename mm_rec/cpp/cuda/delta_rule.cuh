// Parts that the kernels of delta_rule share. Tokens come in chunks of 64. With g the running sum of log_decay in a chunk,
//   D[i, j] = exp(g_i - g_j) for tokens j <= i of one document, else 0;  E_i = exp(g_i) up to the first document that begins,
//   A[i, j] = beta_i (key_i . key_j) D[i, j] for j < i,  R = (I + A)^-1 beta (v - E key S)  with the state S before the chunk,
//   out = E q S + [(q key^T) D] R,  S' = E_last S + (D[last, :] key)^T R.
// Sizes of heads are taken in blocks of 64, padded with zeros.
#ifndef MM_REC_DELTA_RULE_CUH
#define MM_REC_DELTA_RULE_CUH

#include "launch.cuh"
#include "tile.cuh"

namespace mm_rec {

constexpr int kChunk = 64, kBlock = 64, kDeltaThreads = 128;
constexpr float kEmpties = -87.0f;  // a log_decay whose exponential is 0

struct DeltaExtent {
  int64_t batch, time, heads;
  int dim;

  __host__ __device__ int64_t chunks() const { return ceil_div(time, kChunk); }
  __host__ __device__ int blocks() const { return static_cast<int>(ceil_div(dim, kBlock)); }
  __host__ __device__ int64_t size() const { return int64_t{dim} * dim; }  // of a state
  // First element of a state among `states` of each sequence, of the inverse of a chunk, of a head of a contiguous token.
  __host__ __device__ int64_t state_at(int64_t b, int64_t state, int64_t states, int64_t head) const {
    return ((b * states + state) * heads + head) * size();
  }
  __host__ __device__ int64_t inverse_at(int64_t b, int64_t chunk, int64_t head) const {
    return ((b * chunks() + chunk) * heads + head) * kChunk * kChunk;
  }
  __host__ __device__ int64_t token_at(int64_t b, int64_t t, int64_t head) const {
    return ((b * time + t) * heads + head) * dim;
  }
};

// Heads of tokens, one head after the other.
struct TokenRows {
  const void* first;
  int64_t batch_stride, stride;

  template <typename T>
  __device__ __forceinline__ const T* at(const DeltaExtent& extent, int64_t b, int64_t t, int64_t head) const {
    return static_cast<const T*>(first) + b * batch_stride + t * stride + head * extent.dim;
  }
};

struct DeltaInputs {
  TokenRows q, key, v;
  const float* beta;
  const float* log_decay;
  const int64_t* position;
};

// What a chunk's tokens write and forget.
struct alignas(16) ChunkDecay {
  float sum[kChunk];     // g
  float beta[kChunk];    // 0 past the last token
  float before[kChunk];  // E
  float after[kChunk];   // D[last, :]
  int document[kChunk];  // documents that begin in the chunk, up to the token
  float whole;           // E_last
};

// The same on its way from memory, two tokens a lane of the warp from thread `first` on.
class DecayLoads {
 public:
  __device__ __forceinline__ explicit DecayLoads(int first = 0) : lane_(static_cast<int>(threadIdx.x) - first) {}
  __device__ __forceinline__ void fetch(const DeltaInputs& in, const DeltaExtent& extent, int64_t b, int64_t head,
                                        int64_t t0) {
    if (lane_ < 0 || lane_ >= 32) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t t = t0 + 2 * lane_ + r, line = b * extent.time + t;
      const bool real = t < extent.time;
      log_decay_[r] = real ? in.log_decay[line * extent.heads + head] : 0.0f;
      beta_[r] = real ? in.beta[line * extent.heads + head] : 0.0f;
      position_[r] = real ? in.position[line] : 1;
    }
  }
  __device__ __forceinline__ void put(ChunkDecay& decay) const {
    if (lane_ < 0 || lane_ >= 32) return;
    const int lane = lane_;
    float own[2];
    int begins[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      begins[r] = position_[r] == 0 || log_decay_[r] < kEmpties;
      own[r] = begins[r] != 0 ? 0.0f : log_decay_[r];
    }
    float sum = own[0] + own[1];
    int document = begins[0] + begins[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float sum_before = __shfl_up_sync(kFullWarp, sum, step);
      const int document_before = __shfl_up_sync(kFullWarp, document, step);
      sum += lane >= step ? sum_before : 0.0f;
      document += lane >= step ? document_before : 0;
    }
    const float sums[2] = {sum - own[1], sum};
    const int documents[2] = {document - begins[1], document};
    const float last = __shfl_sync(kFullWarp, sum, 31);
    const int last_document = __shfl_sync(kFullWarp, document, 31);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 2 * lane + r;
      decay.sum[i] = sums[r];
      decay.beta[i] = beta_[r];
      decay.document[i] = documents[r];
      decay.before[i] = documents[r] == 0 ? __expf(sums[r]) : 0.0f;
      decay.after[i] = documents[r] == last_document ? __expf(last - sums[r]) : 0.0f;
    }
    if (lane == 0) decay.whole = last_document == 0 ? __expf(last) : 0.0f;
  }

 private:
  int lane_;
  float log_decay_[2], beta_[2];
  int64_t position_[2];
};

// Call body(n, i, row, D[row, column]) for each of a thread's elements of scores of 16 tokens, from `row` on, with all 64.
template <typename Body>
__device__ __forceinline__ void each_decay(const ChunkDecay& decay, int row, const Body& body) {
  const int rows[2] = {row + fragment_row(0), row + fragment_row(2)};
  const float sums[2] = {decay.sum[rows[0]], decay.sum[rows[1]]};
  const int documents[2] = {decay.document[rows[0]], decay.document[rows[1]]};
#pragma unroll
  for (int n = 0; n < kChunk / 8; ++n) {
    const float2 sum = *reinterpret_cast<const float2*>(decay.sum + fragment_column(n, 0));
    const int2 document = *reinterpret_cast<const int2*>(decay.document + fragment_column(n, 0));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2;
      const bool together = fragment_column(n, i) <= rows[r] && (i % 2 == 0 ? document.x : document.y) == documents[r];
      body(n, i, rows[r], together ? __expf(sums[r] - (i % 2 == 0 ? sum.x : sum.y)) : 0.0f);
    }
  }
}

template <typename T>
struct DeltaTypes {
  static constexpr bool kSplit = sizeof(T) == 4;
  using Square = Tile<kChunk, kBlock, kSplit>;
};

// Start filling a tile with 64 x 64 elements, rows `stride` apart; those past `rows` and `columns` are zero. Rows begin at
// multiples of 16 bytes if `aligned`. The tile is there after cp_async_wait and a barrier.
template <typename T, bool Split>
__device__ __forceinline__ void load_tile(Tile<kChunk, kBlock, Split>& tile, const T* source, int64_t stride, int64_t rows,
                                          int columns, bool aligned) {
  const int column = static_cast<int>(threadIdx.x) % 8 * 8;
#pragma unroll
  for (int i = 0; i < kChunk * 8 / kDeltaThreads; ++i) {
    const int row = static_cast<int>(threadIdx.x) / 8 + i * (kDeltaThreads / 8);
    const bool inside = row < rows && column < columns;
    const T* from = source + (inside ? row * stride + column : 0);
    if (aligned && sizeof(T) == 2) {
      cp_async_16(tile.hi + row * tile.kStride + column, from, inside);
      continue;
    }
    float x[8] = {};
    if (aligned) {
      if (inside) load<8>(from, x);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = inside && column + j < columns ? to_float(from[j]) : 0.0f;
    }
    tile.set(row, column, x);
  }
  cp_async_commit();
}

// A left operand as accumulators.
template <bool Split>
__device__ __forceinline__ void to_fragments(const Left<Split>& left, Fragments<2>& x) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    float* pair = x[j / 2] + j % 2 * 2;
    pair[0] = __uint_as_float(left.hi[j] << 16);
    pair[1] = __uint_as_float(left.hi[j] & 0xffff0000u);
    if constexpr (Split) {
      pair[0] += __uint_as_float(left.lo[j] << 16);
      pair[1] += __uint_as_float(left.lo[j] & 0xffff0000u);
    }
  }
}

// Accumulators whose rows are columns of a matrix in memory and the other way round: element (m, n) is at n * stride + m;
// those with m past `columns` or n past `rows` are not there.
__device__ __forceinline__ void load_transposed(Fragments<8>& x, const float* source, int64_t stride, int64_t rows,
                                                int columns) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = fragment_column(n, i), column = fragment_row(i);
      x[n][i] = row < rows && column < columns ? source[row * stride + column] : 0.0f;
    }
  }
}
template <typename T>
__device__ __forceinline__ void store_transposed(T* target, int64_t stride, int64_t rows, int columns,
                                                 const Fragments<8>& x) {
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    if constexpr (sizeof(T) == 2) {
      const int row = 8 * n + fragment_row(0), column = fragment_column(0, 0);
      const uint32_t first = transpose_matrix(pack_bf16(x[n][0], x[n][1]));
      const uint32_t second = transpose_matrix(pack_bf16(x[n][2], x[n][3]));
      T* to = target + row * stride + column;
      if (row < rows && column < columns) *reinterpret_cast<uint32_t*>(to) = first;
      if (row < rows && column + 8 < columns) *reinterpret_cast<uint32_t*>(to + 8) = second;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = fragment_column(n, i), column = fragment_row(i);
        if (row < rows && column < columns) target[row * stride + column] = x[n][i];
      }
    }
  }
}

// The inverses of I + A of all chunks, (B, chunks, H, 64, 64).
template <typename T>
cudaError_t chunk_inverses(const DeltaInputs& in, T* inverses, const DeltaExtent& extent, void* stream);

// All of the forward pass of a single token (delta_rule_token.cu).
template <typename T>
cudaError_t delta_token(const DeltaInputs& in, const float* state, T* out, float* states, const DeltaExtent& extent,
                        void* stream);

// Run<type, blocks of a head>::run(arguments...)
template <template <typename, int> class Run, typename T, typename... Arguments>
cudaError_t by_blocks(const DeltaExtent& extent, const Arguments&... arguments) {
  if (extent.blocks() <= 1) return Run<T, 1>::run(arguments...);
  if (extent.blocks() <= 2) return Run<T, 2>::run(arguments...);
  if (extent.blocks() <= 4) return Run<T, 4>::run(arguments...);
  return cudaErrorInvalidValue;
}

}  // namespace mm_rec

#endif
